"""Records: options, artifacts and figures."""
