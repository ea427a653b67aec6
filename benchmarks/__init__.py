"""Speed, measured in turns against a baseline in the same run."""
