"""Curating sets: from millions of captions to the pairs of one name, and a look at them."""
