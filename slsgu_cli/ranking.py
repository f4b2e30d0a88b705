"""What `slsgu rank` does: score every candidate layer from the stored gradients."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from shlex import quote

import numpy as np

import slsgu_cli
from slsgu_cli.errors import InputError
from slsgu_cli.layout import gradient_path, ranking_path, read_manifest, read_pointer
from slsgu_cli.naming import is_candidate, selected, tower_of
from slsgu_cli.records import (
    Alignment,
    GradientHeader,
    GradientPointer,
    LayerScore,
    Ranking,
    Tower,
)
from slsgu_cli.scoring import alignment, importance, norm, pareto_front
from slsgu_cli.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class RankOptions:
    """Which layers compete, and how alignment is read."""

    alignment: Alignment = Alignment.ABS
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    tower: Tower | None = None


def rank(store: Store, name: str, *, options: RankOptions) -> Ranking:
    """Score the candidate layers of set `name`, mark the Pareto fronts, store the ranking.

    Raises MissingError, StaleError, and InputError where no layer is left to rank.
    """
    pointer = read_pointer(store, read_manifest(store, name))
    header = store.read_header(gradient_path(pointer.forget), GradientHeader)
    scores = [
        score
        for layer in sorted(header.weights)
        if is_candidate(layer)
        and options.tower in (None, tower_of(layer))
        and selected(layer, include=options.include, exclude=options.exclude)
        and (score := _score(store, pointer, header, layer, options.alignment)) is not None
    ]
    if not scores:
        raise InputError(
            f"no layer of {name} is left to rank",
            hint="check --include, --exclude and --tower; `slsgu rank NAME` alone ranks all layers",
        )
    ranking = Ranking(
        name=name,
        forget=pointer.forget,
        retain=pointer.retain,
        alignment=options.alignment,
        scores=tuple(_with_fronts(scores)),
        version=slsgu_cli.__version__,
    )
    store.write_record(ranking_path(name), ranking)
    return ranking


def _score(
    store: Store, pointer: GradientPointer, header: GradientHeader, layer: str, kind: Alignment
) -> LayerScore | None:
    """Return the score of one layer; None where the loss does not reach it, or it is zeros.

    A step is a share of the layer's own norm, so a layer of zeros has none.
    """
    forget = store.read_tensors(gradient_path(pointer.forget), [layer])[layer]
    retain = store.read_tensors(gradient_path(pointer.retain), [layer])[layer]
    if not (np.isfinite(forget).all() and np.isfinite(retain).all()):
        raise InputError(
            f"the stored gradient of {layer} holds values that are not finite",
            hint=f"remove {gradient_path(pointer.forget)} from the store and "
            f"run `slsgu grad {quote(pointer.name)}`",
        )
    forget_norm = norm(forget)
    weight_norm = header.weights[layer].norm
    tower = tower_of(layer)
    if not forget_norm or not weight_norm or tower is None:
        return None
    return LayerScore(
        layer=layer,
        tower=tower,
        shape=header.weights[layer].shape,
        importance=importance(forget_norm, weight_norm),
        alignment=alignment(forget, retain, kind),
        forget_norm=forget_norm,
        retain_norm=norm(retain),
        weight_norm=weight_norm,
        front=False,
    )


def _with_fronts(scores: Sequence[LayerScore]) -> list[LayerScore]:
    """Mark each tower's Pareto front; order by tower, front first, falling importance."""
    marked: list[LayerScore] = []
    for tower in Tower:
        own = [score for score in scores if score.tower is tower]
        front = pareto_front([(score.importance, score.alignment) for score in own])
        rows = [replace(score, front=on) for score, on in zip(own, front, strict=True)]
        marked += sorted(rows, key=lambda row: (not row.front, -row.importance, row.layer))
    return marked
