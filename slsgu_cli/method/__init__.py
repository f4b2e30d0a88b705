"""The method in plain PyTorch, to be read from `unlearn.py` on; `engine` makes it fast."""
