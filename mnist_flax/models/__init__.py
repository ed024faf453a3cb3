"""Networks: Linen modules, and pure functions of their parameters. May import runtime, ops and data."""
