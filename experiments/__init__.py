"""Hyperparameter research and benchmarks, on top of mnist_flax; each module is a command."""

import mnist_flax  # noqa: F401  for its handling of Ctrl-C
