"""Breaking runs on purpose, and checking that nothing is lost."""
