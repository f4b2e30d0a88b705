"""Whether a concept stays forgotten."""
