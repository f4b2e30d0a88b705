"""The fast method: cached activations, early stopping, resumable and shared passes."""
