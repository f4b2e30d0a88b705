"""Formats of names and figures in tables."""

import re
from collections.abc import Callable, Collection, Sequence

from slsgu_cli.checkpoints.layers import known_as
from slsgu_cli.records.directions import DirectionSpec
from slsgu_cli.records.figures import Accuracy


def artifact_name(name: str) -> str:
    """Return the name of an artifact, with digests and layer names shortened."""
    if re.fullmatch(r"[0-9a-f]{24}", name):
        return name[:12]
    return known_as(name)


STEP = "{:.4g}".format
SIGNED = "{:+.2f}".format


def direction_format(directions: Collection[DirectionSpec]) -> Callable[[DirectionSpec], str]:
    """Return the format of directions: their kinds, with parameters where kinds do not suffice."""
    kinds = {direction.kind for direction in directions}
    return str if len(kinds) < len(directions) else lambda direction: str(direction.kind)


def brief_state(state: str) -> str:
    """Return the state of a request without its bounds."""
    return state.partition(" within")[0]


def file_size(count: int) -> str:
    """Return a number of bytes with a unit."""
    from rich.filesize import decimal

    return decimal(count)


def accuracies(utility: dict[str, Accuracy], sets: Sequence[str], *forget: Accuracy) -> list[float]:
    """Return top-1 and top-5 accuracy of the concept, if given, and of each set."""
    listed = [*forget, *(utility[name] for name in sets)]
    return [figure for accuracy in listed for figure in (accuracy.top1, accuracy.top5)]
