"""Does it stay forgotten? What is done to a model to bring a concept back, and what comes of it."""
