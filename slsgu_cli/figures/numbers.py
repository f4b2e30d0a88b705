"""Numbers as tables and pages show them."""

import math

from slsgu_cli.records.figures import Share


def percent(value: float) -> str:
    """Return a percentage with two decimals."""
    return f"{value:.2f}%"


def roughly(value: float) -> str:
    """Return a percentage with one decimal."""
    return f"{value:.1f}%"


def norm_percent(value: float) -> str:
    """Return a share of a layer's norm in percent, with three significant digits."""
    return f"{100 * value:.3g}%"


def change(value: float) -> str:
    """Return a difference of percentages, in points."""
    shown = f"{abs(value):.2f}"
    if float(shown) == 0:
        return shown
    return f"{'−' if value < 0 else '+'}{shown}"


def number(value: float) -> str:
    """Return a number with four significant digits."""
    if value == 0 or not 1e-6 <= abs(value) < 1e6:
        shown = f"{value:.4g}"
    else:
        shown = f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"
        shown = shown.rstrip("0").rstrip(".") if "." in shown else shown
    return shown.replace("-", "−")


def cosine(value: float) -> str:
    """Return a cosine with two decimals."""
    shown = f"{value:.2f}"
    return "0.00" if float(shown) == 0 else shown.replace("-", "−")


def count(value: int) -> str:
    """Return an integer with thousands separators."""
    return f"{value:,}"


def interval(share: Share) -> str:
    """Return the exact 95% interval of a share."""
    low, high = share.interval
    return f"{low:.1f} to {high:.1f}%"
