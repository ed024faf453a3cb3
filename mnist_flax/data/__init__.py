"""From archives or TFDS to batches on devices. May import runtime."""
