"""From a config to a run directory. May import runtime, ops, data, models and evaluation."""
