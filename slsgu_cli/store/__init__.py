"""Artifacts: where they are, and whether they are up to date."""
