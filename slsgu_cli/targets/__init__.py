"""Models built on CLIP: generate images, ask questions, search for an edit."""
