"""From a picture to numbers. May import inference and all that it may."""
