"""Checks that try to recover a forgotten concept."""
