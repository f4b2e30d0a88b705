"""Figures: records in, PNG, SVG or HTML out."""
