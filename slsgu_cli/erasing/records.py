"""What a comparison on a diffusion pipeline records."""

from dataclasses import dataclass
from enum import StrEnum

from slsgu_cli.generation.records import Budget
from slsgu_cli.records import Effect


class Method(StrEnum):
    """The rows of a comparison, in order."""

    ORIGINAL = "original"
    ESD = "esd"
    SALUN = "salun"
    OURS = "ours"


TRAINED = (Method.ESD, Method.SALUN)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a method trains: updates, learning rate, denoising steps of its samples, seed."""

    iterations: int = 1000
    rate: float = 1e-5
    steps: int = 20
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One row: a method, what its pictures show, and how long it took.

    `plan` is that of a trained method, `edit` the digest of ours. `distance` is between
    the features of its pictures of other classes and of the original's.
    """

    method: Method
    plan: Plan | None
    edit: str | None
    effect: Effect
    distance: float
    seconds: float
    where: str | None

    @property
    def label(self) -> str:
        """The method and its learning rate, as the row and its folder are called."""
        return self.method if self.plan is None else f"{self.method} {self.plan.rate:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineComparison:
    """Every outcome for one concept on one pipeline, with what all of them were made from."""

    name: str
    concept: str
    target: str
    target_fingerprint: str
    forget: str
    forget_data: str
    retain_data: str
    evals: dict[str, str]
    judge: str
    budget: Budget
    outcomes: tuple[Outcome, ...]
    version: str
