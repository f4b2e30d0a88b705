"""The checks of `verify`, one per module."""
