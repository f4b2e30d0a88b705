"""What a comparison records: each method's figures, and what they cost."""

from dataclasses import dataclass, replace
from enum import StrEnum

from slsgu_cli.records import Accuracy


class Method(StrEnum):
    """The rows of the paper's Table 1, in its order."""

    ORIGINAL = "original"
    FT = "ft"
    GA = "ga"
    GAFT = "gaft"
    SALUN = "salun"
    SSD = "ssd"
    OURS = "ours"


TRAINED = (Method.FT, Method.GA, Method.GAFT, Method.SALUN)
UNRETAINED = (Method.GA, Method.SSD)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a baseline runs. It trains on the first `retain_rows` of the retain set, if any."""

    epochs: int = 10
    batch_size: int = 32
    retain_rows: int
    seed: int = 0

    def of(self, method: Method) -> "Plan":
        """Return the plan as far as it matters to a method."""
        return replace(self, retain_rows=0) if method in UNRETAINED else self


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One row: a method at one setting, after the epoch that is reported.

    `setting` is the learning rate, of SSD its alpha. Original and ours have no `plan`;
    ours names its `edit`. Passes are in units of the set's forget and retain rows, and
    `where` is what the seconds were measured on.
    """

    method: Method
    setting: float | None
    plan: Plan | None
    edit: str | None
    epoch: int | None
    forget: Accuracy
    utility: dict[str, Accuracy]
    seconds: float
    forget_passes: float
    retain_passes: float
    where: str | None


@dataclass(frozen=True, slots=True)
class PassTime:
    """How long one pass of gradients took, and on what."""

    seconds: float
    where: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Every outcome for one concept, with what all of them were made from.

    `passes` has the times of the passes whose results are stored: by the digest of the
    gradient, or `squares DIGEST`.
    """

    name: str
    model_fingerprint: str
    forget: str
    retain: str
    evals: dict[str, str]
    passes: dict[str, PassTime]
    outcomes: tuple[Outcome, ...]
    version: str
