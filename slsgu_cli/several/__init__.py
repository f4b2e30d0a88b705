"""Several steps, several concepts at once, several classes one after another."""
