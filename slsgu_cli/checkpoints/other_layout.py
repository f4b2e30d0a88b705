"""A layout other than the model's own, to write a copy in."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from slsgu_cli.checkpoints.naming_schemes import NamingScheme, TowerPlace


@dataclass(frozen=True, slots=True)
class OtherLayout:
    """Another layout to write a model in, for a `client`.

    All weights of `towers` go into one `file`, beside other `files` and `texts`; with "" it is
    all there is. `names` is whose names list the model's tensors, and `weights` where the copy
    lies that is read: None for the one that is edited. A layer of `optional` may be missing.
    """

    client: str
    file: str
    names: NamingScheme
    towers: tuple[TowerPlace, ...]
    weights: Path | None = None
    files: Mapping[str, Path] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
