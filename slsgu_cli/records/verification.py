"""Verification: the checks, the options of `verify`, and the findings on each model."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from slsgu_cli.errors import UsageError
from slsgu_cli.records.figures import Accuracy, TextStructure
from slsgu_cli.records.method import EditHeader
from slsgu_cli.records.option_fields import (
    DEVICE,
    EVALUATION,
    MODEL,
    SEARCH,
    SPEED,
    choices,
    option,
    options,
)
from slsgu_cli.records.sets import ModelSpec

OWN, NEW = "its name", "a new name"

# Between the kind of a variant of the name and the variant itself.
KIND = ": "

# The aims of an attack and of its control.
NEUTRAL, RANDOM = "another word", "random words"
IMAGES, MADE_UP = "its images", "a made-up class"


class Check(StrEnum):
    """The checks of `verify`, in the order they run; the first measures the model as it is.

    Each is declared next to its code, in the module of `verification/checks` with its name.
    """

    BASELINE = "baseline"
    PARAPHRASE = "paraphrase"
    TYPOS = "typos"
    DESCRIPTION = "description"
    AUGMENT = "augment"
    QUANTISE = "quantise"
    FINETUNE = "finetune"
    RELEARN = "relearn"
    NEIGHBOURS = "neighbours"
    NEAREST = "nearest"
    LOOK_ALIKES = "look-alikes"
    NEUTRAL_PROMPTS = "neutral-prompts"
    PROBE = "probe"
    RETRIEVAL = "retrieval"
    MEMBERSHIP = "membership"
    PREFIX = "prefix"
    RING_A_BELL = "ring-a-bell"
    INVERSION = "inversion"


CHECKS = tuple(check for check in Check if check is not Check.BASELINE)
# The checks that search for inputs and compare them with a control.
ATTACKED = (Check.PREFIX, Check.RING_A_BELL, Check.INVERSION)
# How a bound names what an attack adds to its control: "attack.prefix".
ATTACK = "attack."
# The figures of checks that bounds may name, and their checks.
BOUNDED = {f"{ATTACK}{check}": check for check in ATTACKED} | {
    f"{check}.{figure}": check
    for check in (Check.DESCRIPTION, Check.LOOK_ALIKES)
    for figure in ("mean", "worst")
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of the checks.

    `rows` images of each evaluation set measure utility. Relearning and inversion train on
    `shots` images. `spellings` are further names from a file, each after its kind, as in
    `German: Schloss`. `descriptions` are texts about the concept without its name, and
    `look_alikes` class names that replace the nearest ones. `prompts` is a digest of the neutral
    prompts.
    """

    templates: tuple[str, ...] = ()
    spellings: tuple[str, ...] = ()
    descriptions: tuple[str, ...] = ()
    look_alikes: tuple[str, ...] = ()
    prompts: str = ""
    look_alike_count: int = option(
        20,
        "--look-alike-count",
        min=1,
        help="Number of nearest class names that `look-alikes` measures.",
        panel=EVALUATION,
    )
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


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyRequest:
    """The checks to run, and the models to run them on.

    The original model is compared with `model`, with each of `edits`, or else with the
    set's edit. `templates` is a file or the name of a built-in list, None for built-in unused
    templates; `spellings` is a file of further names of the concept, `descriptions` one of
    texts about it, and `look_alikes` one of class names. `verify` fills all into `settings`.
    """

    model: ModelSpec | None = options(None)
    edits: Sequence[str] = option(
        (),
        "--edit",
        help="Edit to verify: a name or a file.",
        panel=MODEL,
        metavar="EDIT",
        without="the set's own",
    )
    checks: Sequence[Check] = option(
        CHECKS,
        "--checks",
        metavar="CHECKS",
        panel=EVALUATION,
        read=choices(CHECKS),
        help=f"Comma-separated checks: {','.join(CHECKS)}.",
        without="all",
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
    descriptions: str | None = option(
        None,
        "--descriptions",
        metavar="FILE",
        panel=EVALUATION,
        without="`description` is skipped",
        help="File of texts that describe the concept without its name: one per line, or JSON.",
    )
    look_alikes: str | None = option(
        None,
        "--look-alikes",
        metavar="FILE",
        panel=EVALUATION,
        without="the nearest class names",
        help="File of class names that look like the concept, one per line.",
    )
    settings: Settings = options(Settings())
    device: str = DEVICE()

    def __post_init__(self) -> None:
        """Refuse names and texts that no check would use."""
        custom_count = self.settings.look_alike_count != Settings().look_alike_count
        given = (
            ("--alias", self.settings.aliases, Check.TYPOS),
            ("--spellings", self.spellings, Check.TYPOS),
            ("--descriptions", self.descriptions, Check.DESCRIPTION),
            ("--look-alikes", self.look_alikes, Check.LOOK_ALIKES),
            ("--look-alike-count", custom_count, Check.LOOK_ALIKES),
        )
        for flag, value, check in given:
            if value and check not in self.checks:
                raise UsageError(
                    f"{flag} is for the check {check}, which --checks does not name",
                    hint=f"--checks {','.join([check, *self.checks])}",
                )
        if self.look_alikes and custom_count:
            raise UsageError(
                "--look-alikes names the classes, so --look-alike-count has no use",
                hint="give one of the two",
            )


@dataclass(frozen=True, slots=True)
class Variant:
    """A variant of prompts, images or weights, and the accuracies with it."""

    name: str
    forget: Accuracy
    utility: dict[str, Accuracy] | None = None


@dataclass(frozen=True, slots=True)
class Point:
    """Forget accuracy after a number of training steps."""

    step: int
    forget: Accuracy


@dataclass(frozen=True, slots=True)
class Curve:
    """Forget accuracy during training on images named `target`."""

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
class Guess:
    """A name and the number of the concept's images that it was the first guess for."""

    name: str
    rows: int


@dataclass(frozen=True, slots=True)
class Neighbourhood:
    """The names nearest to the forgotten one, and the first guesses for its images."""

    nearest: tuple[NearName, ...]
    guesses: tuple[Guess, ...]
    rows: int


@dataclass(frozen=True, slots=True)
class KnownClass:
    """A class of an evaluation set: its images, TA@1 in percent, and the cosine of its name.

    The cosine is between the embeddings of the class's and the concept's names.
    """

    name: str
    rows: int
    top1: float
    cosine: float


@dataclass(frozen=True, slots=True)
class ClassifierScore:
    """How well a classifier on image features separates images of `subject` from others.

    It was trained on `images` of them. `accuracy` in percent is balanced: 50 is chance.
    `recall` is the share of `rows` found at a false positive rate of 1% on `others`.
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
    """How well queries find the concept in an index of all evaluation images, in percent.

    `precision` is the mean average precision; `recall1`, `recall5` and `recall10` are the
    shares of queries with one of the concept's images among the first 1, 5 and 10.
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
class Shift:
    """How far features of `rows` images lie from the original model's, as 1 - cosine.

    `identical` counts features equal to the bit, `far` those more than 0.01 away.
    """

    images: str
    rows: int
    identical: int
    far: int
    mean: float
    largest: float


@dataclass(frozen=True, slots=True)
class Retrieval:
    """Retrieval by the concept's images and name, and how far the image index shifted."""

    queries: tuple[Retrieved, ...]
    shifts: tuple[Shift, ...]


@dataclass(frozen=True, slots=True)
class MembershipScore:
    """Accuracy in percent of separating members from others by one figure, over seeds."""

    figure: str
    against: str
    mean: float
    deviation: float
    members: int
    others: int


@dataclass(frozen=True, slots=True)
class Attempt:
    """A text that an attack found or learnt, and the accuracy with it as the concept's name.

    `name` says what the attack looked for. `loss` selected the text, on other images or
    features than those of `forget`. `tried` lists the words that a word search went through.
    """

    name: str
    text: str
    loss: float
    forget: Accuracy
    tried: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check on one model. `key` is a digest of everything it depends on.

    `skipped` says why the check cannot run on this model, if so.
    """

    check: Check
    key: str
    settings: dict[str, str]
    variants: tuple[Variant, ...] = ()
    curves: tuple[Curve, ...] = ()
    neighbourhood: Neighbourhood | None = None
    classes: dict[str, tuple[KnownClass, ...]] | None = None
    structure: dict[str, TextStructure] | None = None
    classifiers: tuple[ClassifierScore, ...] = ()
    retrieval: Retrieval | None = None
    membership: tuple[MembershipScore, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    skipped: str = ""

    def best(self, name: str) -> Attempt:
        """Return the attempt for `name` with the lowest loss."""
        attempts = (attempt for attempt in self.attempts if attempt.name == name)
        return min(attempts, key=lambda attempt: attempt.loss)


@dataclass(frozen=True, slots=True)
class VerifiedModel:
    """A verified model: the original, the original with an edit, or another checkpoint.

    `key` is a digest of the model's weights and of the edit.
    """

    key: str
    label: str
    model: ModelSpec
    model_fingerprint: str
    edit: EditHeader | None
    findings: tuple[Finding, ...] = ()

    def finding(self, check: Check) -> Finding | None:
        """Return the finding of a check, None if it has not run."""
        return next((finding for finding in self.findings if finding.check is check), None)

    def with_finding(self, finding: Finding) -> "VerifiedModel":
        """Return the model with a finding, which replaces an older one of the same check."""
        findings = {known.check: known for known in self.findings} | {finding.check: finding}
        in_order = (findings[check] for check in Check if check in findings)
        return replace(self, findings=tuple(in_order))

    def of_checks(self, checks: Collection[Check]) -> "VerifiedModel":
        """Return the model with only the findings of `checks`."""
        findings = tuple(finding for finding in self.findings if finding.check in checks)
        return replace(self, findings=findings)


@dataclass(frozen=True, slots=True)
class Verification:
    """All findings for one set. `data` has the fingerprints of its rows by role.

    `under_way` has the partial results of a check that was interrupted.
    """

    name: str
    concept: str
    data: dict[str, str]
    subjects: tuple[VerifiedModel, ...]
    version: str
    under_way: Finding | None = None

    def findings_of(self, key: str) -> tuple[Finding, ...]:
        """Return the findings on the model with that key, empty if it is not verified."""
        return next((model.findings for model in self.subjects if model.key == key), ())

    def with_model(self, model: VerifiedModel) -> "Verification":
        """Return the record with a model, which replaces the one with the same key."""
        models = {known.key: known for known in self.subjects} | {model.key: model}
        return replace(self, subjects=tuple(models.values()))

    @property
    def prefixes(self) -> tuple[str, ...]:
        """The words that searches tried before the name in edited models, in order."""
        edited = [subject for subject in self.subjects if subject.edit is not None]
        searches = filter(None, (subject.finding(Check.PREFIX) for subject in edited))
        attempts = [each for search in searches for each in search.attempts if each.name == OWN]
        return tuple(dict.fromkeys(text for attempt in attempts for text in attempt.tried))
