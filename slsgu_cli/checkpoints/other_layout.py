"""A layout other than the model's own, to write a copy in."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from slsgu_cli.checkpoints.naming_schemes import NamingScheme, TowerPlace


@dataclass(frozen=True, slots=True)
class OtherLayout:
    """Another layout to write a model in, for a `client`.

    All weights of `towers` go into one `file`, next to other `files` and `texts`; the name "" means
    that this file is the whole copy. `names` is the naming scheme of the model's tensors, and
    `weights` is the copy to read: None for the edited one. Layers in `optional` may be missing.
    """

    client: str
    file: str
    names: NamingScheme
    towers: tuple[TowerPlace, ...]
    weights: Path | None = None
    files: Mapping[str, Path] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
