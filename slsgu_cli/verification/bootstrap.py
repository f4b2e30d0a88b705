"""Bootstrap intervals of means."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from slsgu_cli.records.figures import CONFIDENCE

DRAWS = 20_000
Values = npt.NDArray[np.float64]


def resampled_means(values: Sequence[float] | Values, seed: int = 0) -> Values:
    """Return the means of `values` drawn with replacement, (DRAWS,)."""
    array = np.asarray(values, np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(array), (DRAWS, len(array)))
    means: Values = array[drawn].mean(axis=1)
    return means


def percentile_interval(means: Values) -> tuple[float, float]:
    """Return the 95% percentile interval of resampled means."""
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)
