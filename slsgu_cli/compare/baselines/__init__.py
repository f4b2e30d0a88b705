"""The baselines of `compare`, one per module."""
