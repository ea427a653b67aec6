"""Where models, data, engine, tracking, deploy and slim meet: a module for each kind of work of the scripts."""
