"""Several steps, concepts and classes."""
