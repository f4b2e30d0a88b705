"""Single layer, single gradient unlearning for CLIP and the models built on it."""

__version__ = "0.1.0"
