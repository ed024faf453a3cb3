"""The record recipe's claim, from scratch: many seeds, an ensemble, and the reference recipe beside them."""
