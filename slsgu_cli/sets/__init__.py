"""Forget, retain and evaluation rows, collected and built."""
