"""One HTML page of what was done and what it cost."""
