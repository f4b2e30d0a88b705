"""What all of it is called."""
