"""Training that may bring the concept back: on the retain set, and on images of the concept.

How fast a model relearns the name says little alone. It is held against how fast the
original model learns a name it has never met for the same images, by the same training.
"""

from collections.abc import Iterator

import numpy as np

from slsgu_cli.records import Accuracy
from slsgu_cli.towers import EMBED
from slsgu_cli.verification.bench import Bench
from slsgu_cli.verification.records import Curve, Settings
from slsgu_cli.verification.training import Batch, cycled, pairs, trained

OWN, NEW = "its name", "a new name"
# One in four pairs of a mini-batch shows the concept: enough to teach it, not to ruin the rest.
SHARE = 4
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


def finetune(bench: Bench, settings: Settings) -> list[Curve]:
    """Train on the retain set, in which the concept does not occur."""
    rows = cycled(bench.retain.rows, settings.batch_size, seed=settings.seed)
    batches = (pairs(bench.retain, some) for some in rows)
    points, utility = trained(
        bench,
        batches,
        settings,
        measure=lambda: bench.figures(utility=False)[0],
        utility=True,
    )
    return [Curve(OWN, bench.names[bench.own], points, utility)]


def relearn(bench: Bench, settings: Settings) -> list[Curve]:
    """Train on images of the concept under its name; the original also under a new name."""
    name = bench.names[bench.own]
    curves = [_taught(bench, settings, OWN, name)]
    if bench.is_original:
        curves.append(_taught(bench, settings, NEW, new_name(name, seed=settings.seed)))
    return curves


def new_name(name: str, *, seed: int) -> str:
    """Return a made-up word about as long as `name`, of alternating consonants and vowels."""
    generator = np.random.default_rng((seed, len(name)))
    sounds = (CONSONANTS, VOWELS)
    length = min(max(len(name), 4), 12)
    return "".join(str(generator.choice(list(sounds[i % 2]))) for i in range(length))


def _taught(bench: Bench, settings: Settings, label: str, target: str) -> Curve:
    """Train on the same images with `target` as what they show, and measure by that name."""
    names, features = bench.renamed(target), bench.evaluation.forget.images.after_edit

    def measure() -> Accuracy:
        return bench.forget_accuracy(bench.classes(names, bench.templates), features(EMBED))

    points, utility = trained(
        bench,
        _mixed(bench, settings, target),
        settings,
        measure=measure,
        utility=False,
    )
    return Curve(label, target, points, utility)


def _mixed(bench: Bench, settings: Settings, target: str) -> Iterator[Batch]:
    """Yield mini-batches of which a part shows the concept, the rest is of the retain set.

    Only `shots` images of the concept occur. Their captions are the set's templates with
    `target` in them.
    """
    generator = np.random.default_rng(settings.seed)
    chosen = np.sort(generator.permutation(bench.forget.rows)[: settings.shots])
    images = bench.forget.take(chosen)
    captions = bench.tokenize([template.replace("{}", target) for template in bench.templates])
    size = max(1, settings.batch_size // SHARE)
    shown = cycled(len(chosen), size, seed=settings.seed)
    others = cycled(bench.retain.rows, settings.batch_size - size, seed=settings.seed)
    for own, rest in zip(shown, others, strict=True):
        words = captions[generator.integers(0, len(captions), size)]
        kept = pairs(bench.retain, rest)
        yield Batch(
            np.concatenate([images[own], kept.images]),
            np.concatenate([words, kept.tokens]),
            alike=size,
        )
