"""Records in, PNG bytes out."""
