"""Fast layers in pure JAX, each with its own gradient. Imports no other room."""
