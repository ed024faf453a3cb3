"""Hyperparameter research and benchmarks, on top of mnist_flax; each module is a command."""
