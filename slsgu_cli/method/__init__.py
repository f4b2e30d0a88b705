"""The paper: losses, gradients, ranking, search, edits, evaluation."""
