"""What users bring: tars, parquet, folders, captions, classes."""
