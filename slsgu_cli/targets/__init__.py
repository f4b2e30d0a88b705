"""CLIP in the models that people build on it: where its layers lie there, and which count."""
