"""Other methods that make a diffusion pipeline forget, measured beside ours."""
