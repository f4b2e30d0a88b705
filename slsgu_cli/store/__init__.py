"""What is kept, where, and whether it still stands."""
