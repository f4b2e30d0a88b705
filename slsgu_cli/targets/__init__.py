"""Models built on CLIP: generate, ask, search."""
