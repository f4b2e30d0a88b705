"""One self-contained HTML page of what was removed from a model, how, and what it cost."""
