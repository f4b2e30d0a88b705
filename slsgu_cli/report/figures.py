"""Figures as a reader of the page sees them, and how sure a share of few images is."""

import math

# The two-sided 95% quantile of the normal distribution.
QUANTILE = 1.959964


def percent(value: float) -> str:
    """Return a percentage with two decimals."""
    return f"{value:.2f}%"


def share(value: float) -> str:
    """Return a share of a layer's norm in percent, to three digits."""
    return f"{100 * value:.3g}%"


def change(value: float) -> str:
    """Return a difference of percentages, in points, with a real minus sign."""
    shown = f"{abs(value):.2f}"
    if float(shown) == 0:
        return shown
    return f"{'−' if value < 0 else '+'}{shown}"


def number(value: float) -> str:
    """Return a number to four digits, with a real minus sign."""
    if value == 0 or not 1e-6 <= abs(value) < 1e6:
        shown = f"{value:.4g}"
    else:
        shown = f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"
        shown = shown.rstrip("0").rstrip(".") if "." in shown else shown
    return shown.replace("-", "−")


def cosine(value: float) -> str:
    """Return a cosine with two decimals, with a real minus sign."""
    shown = f"{value:.2f}"
    return "0.00" if float(shown) == 0 else shown.replace("-", "−")


def count(value: int) -> str:
    """Return an integer with thousands set apart."""
    return f"{value:,}"


def interval(share: float, rows: int) -> str:
    """Return the 95% interval of a percentage seen over `rows` images (Wilson's)."""
    low, high = wilson(share / 100, rows)
    return f"{100 * low:.1f} to {100 * high:.1f}%"


def wilson(share: float, rows: int) -> tuple[float, float]:
    """Return Wilson's 95% interval of a proportion `share` of `rows` independent draws."""
    square = QUANTILE**2 / rows
    middle = (share + square / 2) / (1 + square)
    half = QUANTILE * math.sqrt(share * (1 - share) / rows + square / (4 * rows)) / (1 + square)
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))
