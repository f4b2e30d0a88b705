"""The records of a verification: what was done to which model, and what was measured then."""

from dataclasses import dataclass
from enum import StrEnum

from slsgu_cli.records import Accuracy, EditHeader, ModelSpec


class Check(StrEnum):
    """The ways in which a concept may come back; the first is the model as it is."""

    BASELINE = "baseline"
    PARAPHRASE = "paraphrase"
    AUGMENT = "augment"
    QUANTISE = "quantise"
    FINETUNE = "finetune"
    RELEARN = "relearn"
    NEIGHBOURS = "neighbours"
    MEMBERSHIP = "membership"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to verify. `rows` images of each set measure utility; `shots` are shown to relearn."""

    templates: tuple[str, ...]
    aliases: tuple[str, ...] = ()
    steps: int = 16
    shots: int = 8
    learning_rate: float = 3e-5
    batch_size: int = 16
    rows: int = 200
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Probe:
    """One thing done to prompts, images or weights, and the accuracies then."""

    name: str
    forget: Accuracy
    utility: dict[str, Accuracy] | None = None


@dataclass(frozen=True, slots=True)
class Point:
    """Forget accuracy after so many training steps."""

    step: int
    forget: Accuracy


@dataclass(frozen=True, slots=True)
class Curve:
    """Forget accuracy during training on pairs of images with `target` as their name."""

    name: str
    target: str
    points: tuple[Point, ...]
    utility: dict[str, Accuracy] | None


@dataclass(frozen=True, slots=True)
class NearName:
    """A class name and the cosine of its embedding with the concept's."""

    name: str
    cosine: float


@dataclass(frozen=True, slots=True)
class Taken:
    """For how many of the concept's images a name was the first guess."""

    name: str
    rows: int


@dataclass(frozen=True, slots=True)
class Became:
    """The names nearest to the forgotten one, and what its images are taken for."""

    nearest: tuple[NearName, ...]
    taken_for: tuple[Taken, ...]
    rows: int


@dataclass(frozen=True, slots=True)
class Attack:
    """Accuracy in percent of telling members from others by one figure, over seeds."""

    figure: str
    against: str
    mean: float
    deviation: float
    members: int
    others: int


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found on one model. `key` is a digest of all it was made from."""

    check: Check
    key: str
    settings: dict[str, str]
    probes: tuple[Probe, ...] = ()
    curves: tuple[Curve, ...] = ()
    became: Became | None = None
    attacks: tuple[Attack, ...] = ()


@dataclass(frozen=True, slots=True)
class Subject:
    """A model that was verified: the original, the original with an edit, another checkpoint.

    `key` is a digest of its weights: those of the model, and of the edit in it.
    """

    key: str
    label: str
    model: ModelSpec
    model_fingerprint: str
    edit: EditHeader | None
    findings: tuple[Finding, ...] = ()

    def finding(self, check: Check) -> Finding | None:
        """Return what a check found, None where it was not run."""
        return next((found for found in self.findings if found.check is check), None)


@dataclass(frozen=True, slots=True)
class Verification:
    """Everything verified of one set. `data` has the fingerprints of its rows by role."""

    name: str
    concept: str
    data: dict[str, str]
    subjects: tuple[Subject, ...]
    version: str

    def subject(self, key: str) -> Subject | None:
        """Return the subject of that key, None where it was not verified."""
        return next((subject for subject in self.subjects if subject.key == key), None)
