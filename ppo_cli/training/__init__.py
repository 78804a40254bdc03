"""One training run, from a configuration to a run directory."""
