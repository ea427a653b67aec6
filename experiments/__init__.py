"""Experiments: what is compared, the runner, the tables."""
