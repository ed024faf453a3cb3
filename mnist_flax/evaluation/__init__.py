"""Metrics, figures and pages from plain arrays. May import runtime, ops and data."""
