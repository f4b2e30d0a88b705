"""Verification: the checks, how they are asked for, and what each found on each model."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from slsgu_cli.errors import UsageError
from slsgu_cli.records.codec import added
from slsgu_cli.records.figures import Accuracy
from slsgu_cli.records.method import EditHeader
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.records.words import (
    DEVICE,
    EVALUATION,
    MODEL,
    SEARCH,
    SPEED,
    choices,
    option,
    options,
)

OWN, NEW = "its name", "a new name"

# Between the kind of a spelling and the name.
KIND = ": "

# What an attempt to find the concept is made with, and what it is held against.
NEUTRAL, RANDOM = "another word", "random words"
IMAGES, MADE_UP = "its images", "a made-up class"


class Check(StrEnum):
    """The ways in which a concept may come back; the first is the model as it is."""

    BASELINE = "baseline"
    PARAPHRASE = "paraphrase"
    SPELLING = "spelling"
    AUGMENT = "augment"
    QUANTISE = "quantise"
    FINETUNE = "finetune"
    RELEARN = "relearn"
    NEIGHBOURS = "neighbours"
    NEAREST = "nearest"
    PROBE = "probe"
    RETRIEVAL = "retrieval"
    MEMBERSHIP = "membership"
    PREFIX = "prefix"
    RING_A_BELL = "ring-a-bell"
    INVERSION = "inversion"


# The checks that look for what finds it, each held against a control, and what they are told as.
ATTACKED = (Check.PREFIX, Check.RING_A_BELL, Check.INVERSION)
ATTACK = "attack."


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to verify. `rows` images of each set measure utility.

    `shots` images are learnt from, in relearning and inversion. `spellings` are other names
    of a file, each behind its kind, as in `German: Schloss`.
    """

    templates: tuple[str, ...] = ()
    spellings: tuple[str, ...] = ()
    aliases: tuple[str, ...] = option(
        (), "--alias", help="Alternative name of the concept.", panel=EVALUATION, metavar="NAME"
    )
    steps: int = option(16, "--steps", min=1, help="Number of training steps.", panel=SEARCH)
    shots: int = option(
        8, "--shots", min=1, help="Images of the concept to relearn it from.", panel=SEARCH
    )
    learning_rate: float = option(
        3e-5, "--lr", min=0.0, help="Learning rate for training.", panel=SEARCH
    )
    batch_size: int = option(
        16,
        "--batch-size",
        min=2,
        help="Image-text pairs in each mini-batch of the losses.",
        panel=SPEED,
    )
    rows: int = option(
        200,
        "--rows",
        min=1,
        help="Images of each evaluation set used to measure TA.",
        panel=EVALUATION,
    )
    attack_tokens: int = option(
        5,
        "--attack-tokens",
        min=1,
        help="Number of tokens that `prefix` puts before the name.",
        panel=SEARCH,
    )
    attack_steps: int = option(
        20,
        "--attack-steps",
        min=1,
        help="Number of single-token replacements that `prefix` makes.",
        panel=SEARCH,
    )
    attack_starts: int = option(
        2, "--attack-starts", min=1, help="Number of restarts of `prefix`.", panel=SEARCH
    )
    population: int = option(
        128,
        "--population",
        min=4,
        help="Population size of `ring-a-bell`.",
        panel=SEARCH,
    )
    generations: int = option(
        100, "--generations", min=1, help="Number of generations of `ring-a-bell`.", panel=SEARCH
    )
    inversion_steps: int = option(
        150,
        "--inversion-steps",
        min=1,
        help="Training steps of `inversion`.",
        panel=SEARCH,
    )
    seed: int = option(0, "--seed", help="Random seed for all sampling.", panel=EVALUATION)


CHECKS = tuple(check for check in Check if check is not Check.BASELINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyRequest:
    """What `verify` is asked for: the checks, on which models.

    The original model is compared with `model`, with each of `edits`, or else with the
    set's edit. `templates` is a file of them or a built-in list's name, None for the
    unseen ones that come with the tool; `spellings` is a file of names. `settings` need none
    of these.
    """

    model: ModelSpec | None = options(None)
    edits: Sequence[str] = option(
        (),
        "--edit",
        help="Edit to verify: a name or a file.",
        panel=MODEL,
        metavar="EDIT",
        without="the set's own",
        completes="edit",
    )
    checks: Sequence[Check] = option(
        CHECKS,
        "--checks",
        metavar="CHECKS",
        panel=EVALUATION,
        read=choices(CHECKS),
        help=f"Comma-separated checks: {','.join(CHECKS)}.",
        without="all",
        write=lambda checks: ",".join(checks),
        repeatable=False,
    )
    templates: str | None = option(
        None,
        "--templates",
        metavar="FILE",
        panel=EVALUATION,
        without="built-in templates",
        help="File of prompt templates the search did not use, or the name of a built-in list.",
    )
    spellings: str | None = option(
        None,
        "--spellings",
        metavar="FILE",
        panel=EVALUATION,
        without="none",
        help="File of alternative spellings, one per line. Lines starting with # name a group.",
    )
    settings: Settings = options(Settings())
    device: str = DEVICE()

    def __post_init__(self) -> None:
        """Refuse names that no check would use."""
        named = {"--alias": self.settings.aliases, "--spellings": self.spellings}
        for flag, names in named.items():
            if names and Check.SPELLING not in self.checks:
                raise UsageError(
                    f"{flag} is for the check {Check.SPELLING}, which is not among --checks",
                    hint=f"--checks {','.join([Check.SPELLING, *self.checks])}",
                )


@dataclass(frozen=True, slots=True)
class ProbeFigures:
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
class KnownClass:
    """A class of an evaluation set: its images, TA@1 in percent, its name's cosine.

    The cosine is that of the name's embedding with the concept's.
    """

    name: str
    rows: int
    top1: float
    cosine: float


@dataclass(frozen=True, slots=True)
class Told:
    """How well a classifier on image features tells images of `subject` from all others.

    It was trained on `images` of them. `accuracy` in percent is the mean over both sides,
    50 is chance; `recall` is how many of `rows` are found where one in a hundred of `others`
    is taken for them too.
    """

    classifier: str
    subject: str
    images: int
    accuracy: float
    recall: float
    rows: int
    others: int


@dataclass(frozen=True, slots=True)
class Retrieved:
    """What queries find in an index of all evaluation images, in percent.

    `precision` is the mean average precision; `recall1` and so on are the shares of queries
    that have one of the concept's images among the first so many.
    """

    query: str
    index: str
    precision: float
    recall1: float
    recall5: float
    recall10: float
    queries: int
    gallery: int


@dataclass(frozen=True, slots=True)
class Moved:
    """How far features of `rows` images lie from the original model's, as 1 - cosine.

    `identical` are the same to the bit, `far` lie more than 0.01 away.
    """

    images: str
    rows: int
    identical: int
    far: int
    mean: float
    largest: float


@dataclass(frozen=True, slots=True)
class Retrieval:
    """What the concept's images and its name find, and how far an image index moved."""

    queries: tuple[Retrieved, ...]
    moved: tuple[Moved, ...]


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
class Attempt:
    """A text that was found or learnt for the concept's class, and what it finds as its name.

    `name` says what the text was made with. `loss` is what it was chosen by, on images or
    features that `forget` is not measured on. `forget` is over images of what was sought.
    `tried` are the words that a search of words came through.
    """

    name: str
    text: str
    loss: float
    forget: Accuracy
    tried: tuple[str, ...] = added(())


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found on one model. `key` is a digest of all it was made from.

    `left_out` says why the check could not be made on this model, if it could not.
    """

    check: Check
    key: str
    settings: dict[str, str]
    probes: tuple[ProbeFigures, ...] = ()
    curves: tuple[Curve, ...] = ()
    became: Became | None = None
    classes: dict[str, tuple[KnownClass, ...]] | None = added(None)
    told: tuple[Told, ...] = added(())
    retrieval: Retrieval | None = added(None)
    attacks: tuple[Attack, ...] = ()
    attempts: tuple[Attempt, ...] = added(())
    left_out: str = added("")

    def best(self, name: str) -> Attempt:
        """Return the attempt made with `name` that was chosen: that of the least loss."""
        made_with = [attempt for attempt in self.attempts if attempt.name == name]
        return min(made_with, key=lambda attempt: attempt.loss)


@dataclass(frozen=True, slots=True)
class VerifiedModel:
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
        return next((finding for finding in self.findings if finding.check is check), None)

    def with_finding(self, finding: Finding) -> "VerifiedModel":
        """Return the model with a finding in the place of the check's last one."""
        findings = {known.check: known for known in self.findings} | {finding.check: finding}
        in_order = (findings[check] for check in Check if check in findings)
        return replace(self, findings=tuple(in_order))

    def of_checks(self, checks: Collection[Check]) -> "VerifiedModel":
        """Return the model with the findings of some checks only."""
        findings = tuple(finding for finding in self.findings if finding.check in checks)
        return replace(self, findings=findings)


@dataclass(frozen=True, slots=True)
class Verification:
    """Everything verified of one set. `data` has the fingerprints of its rows by role.

    `under_way` is the check that was begun last, with what it has found so far, while it is
    not among the findings.
    """

    name: str
    concept: str
    data: dict[str, str]
    subjects: tuple[VerifiedModel, ...]
    version: str
    under_way: Finding | None = added(None)

    def findings_of(self, key: str) -> tuple[Finding, ...]:
        """Return what was found on the model of that key, nothing where it was not verified."""
        return next((model.findings for model in self.subjects if model.key == key), ())

    def with_model(self, model: VerifiedModel) -> "Verification":
        """Return the record with a model in the place of the one of its key, or as the last."""
        models = {known.key: known for known in self.subjects} | {model.key: model}
        return replace(self, subjects=tuple(models.values()))

    @property
    def prefixes(self) -> tuple[str, ...]:
        """The words that searches tried before the name in edited models, as they came to them."""
        edited = [subject for subject in self.subjects if subject.edit is not None]
        searches = filter(None, (subject.finding(Check.PREFIX) for subject in edited))
        attempts = [each for search in searches for each in search.attempts if each.name == OWN]
        return tuple(dict.fromkeys(text for attempt in attempts for text in attempt.tried))

    def about(self) -> dict[str, str]:
        """Return in words what it was made from."""
        labels = ", ".join(subject.label for subject in self.subjects)
        return {"set": self.name, "models": labels}
