"""A trained run as calibrated probabilities, files and explanations. May import training and all that it may."""
