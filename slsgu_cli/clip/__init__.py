"""The model in memory."""
