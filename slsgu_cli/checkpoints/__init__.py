"""The model in files."""
