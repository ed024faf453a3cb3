"""Train, study and ship a handwritten-digit classifier in JAX and Flax."""
