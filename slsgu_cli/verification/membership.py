"""Membership inference: can a row of the forget set be told from one that was not in it?

The attack of the code released with the paper: logistic regression on one figure a pair,
trained and scored on stratified splits, repeated over seeds. The figures are the pair's
cosine and its contrastive loss within a mini-batch.
"""

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
SEEDS, SPLITS = 10, 10
TEST_SHARE = 0.1
CLIP = 100.0
TOLERANCE = 1e-10
ITERATIONS = 100


def attack(members: Values, others: Values, *, seed: int = 0) -> Values:
    """Return the accuracy in percent for each of ten seeds, the mean over ten splits each.

    From both sides as many values are drawn as the smaller one has, so 50 is chance.
    """
    size = min(len(members), len(others))
    found = []
    for number in range(seed, seed + SEEDS):
        generator = np.random.default_rng(number)
        drawn = [generator.permutation(side)[:size] for side in (others, members)]
        values = np.clip(np.concatenate(drawn), -CLIP, CLIP)
        truth = np.repeat([0.0, 1.0], size)
        scores = [_score(values, truth, test) for test in _splits(size, generator)]
        found.append(100 * float(np.mean(scores)))
    return np.array(found)


def fit(values: Values, truth: Values) -> tuple[float, float]:
    """Return slope and intercept of the logistic regression of `truth` (0 or 1) on `values`.

    Minimises slope^2 / 2 plus the sum of the log losses, as scikit-learn does by default,
    by Newton's method with step halving: the problem is convex and has two unknowns.
    """
    w = np.zeros(2)
    design = np.stack([values, np.ones_like(values)], axis=1)
    penalty = np.diag([1.0, 0.0])
    loss = _loss(w, design, truth)
    for _ in range(ITERATIONS):
        chance = _probability(design @ w)
        slope = design.T @ (chance - truth) + penalty @ w
        curvature = (design * (chance * (1 - chance))[:, None]).T @ design + penalty
        step = np.linalg.lstsq(curvature, slope, rcond=None)[0]
        while (moved := _loss(w - step, design, truth)) > loss and np.abs(step).max() > TOLERANCE:
            step = step / 2
        w, loss = w - step, moved
        if np.abs(step).max() <= TOLERANCE * max(1.0, float(np.abs(w).max())):
            break
    return float(w[0]), float(w[1])


def _loss(w: Values, design: Values, truth: Values) -> float:
    z = design @ w
    return float(0.5 * w[0] ** 2 + np.sum(np.logaddexp(0, z) - truth * z))


def _probability(z: Values) -> Values:
    return np.exp(-np.logaddexp(0, -z))


def _score(values: Values, truth: Values, test: npt.NDArray[np.bool_]) -> float:
    slope, intercept = fit(values[~test], truth[~test])
    return float(np.mean((slope * values[test] + intercept > 0) == truth[test]))


def _splits(size: int, generator: np.random.Generator) -> list[npt.NDArray[np.bool_]]:
    """Return which of two times `size` values are tested on, a tenth of each side.

    Where the tenth is an odd number, one side, drawn anew each time, has one value more.
    """
    total = int(np.ceil(TEST_SHARE * 2 * size))
    masks = []
    for _ in range(SPLITS):
        more = int(generator.integers(2))
        counts = [total // 2 + (total % 2 and more == side) for side in range(2)]
        mask = np.zeros(2 * size, dtype=bool)
        for side, count in enumerate(counts):
            mask[side * size + generator.permutation(size)[:count]] = True
        masks.append(mask)
    return masks
