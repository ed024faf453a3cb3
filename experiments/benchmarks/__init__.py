"""The contenders of `experiments.benchmark`, and what benchmarks know about cores."""
