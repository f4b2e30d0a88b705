"""Sources of rows: one reader a file format, captions, class names and prompts."""
