"""Recipes: each file's `get_config()` returns the full description of one run."""
