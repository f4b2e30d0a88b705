"""Records of sets: model, rows, filters, collections and downloads."""

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from shlex import quote
from typing import Any

from slsgu_cli.errors import InputError, UsageError
from slsgu_cli.records.option_fields import DEVICE, DOWNLOAD, ROWS, option

# The prefix of the name of a model in a folder.
LOCAL = "local-dir:"

# The name of the concept's own images among evaluation sets.
FORGET = "(forget)"

# The evaluation set of prompts, where a set from words has none of images.
PROMPTS = "prompts"


@dataclasses.dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model: an open_clip name with weights, `local-dir:PATH`, or `hf-hub:ID`."""

    name: str = option(
        ...,
        "--model",
        "-m",
        metavar="MODEL",
        without="the set's",
        help="Model: open_clip name, local-dir:PATH, hf-hub:ID, architecture .json or "
        "transformers folder.",
    )
    pretrained: str | None = option(
        None,
        "--pretrained",
        "-p",
        help="open_clip tag or checkpoint file for --model NAME.",
        metavar="TAG|FILE",
        without="none",
    )

    def __post_init__(self) -> None:
        """Refuse weights without a model."""
        if self.pretrained and not self.name:
            raise UsageError("--pretrained needs --model", hint="--model ARCH --pretrained TAG")

    def __str__(self) -> str:
        return f"{self.name} ({self.pretrained})" if self.pretrained else self.name

    def flags(self) -> str:
        """Return the command-line flags of this model."""
        flags = f"--model {quote(self.name)}"
        return f"{flags} --pretrained {quote(self.pretrained)}" if self.pretrained else flags


@dataclasses.dataclass(frozen=True, slots=True)
class InputSpec:
    """A model's input format; two models with equal specs can share a set.

    `height` and `width` are pixels; `mean` and `std` are per channel on the 0..1 scale;
    `tokenizer` is a digest of the tokens of a probe text.
    """

    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    resize_mode: str
    fill_color: int
    tokenizer: str
    context_length: int


@dataclasses.dataclass(frozen=True, slots=True)
class DataRef:
    """A block of rows in the store: its path, rows and refused rows.

    `refused` counts refused rows by reason, `noted` accepted rows with oddities.
    """

    path: str
    fingerprint: str
    rows: int
    seen: int
    refused: dict[str, int]
    sources: tuple[str, ...]
    noted: dict[str, int] = dataclasses.field(default_factory=dict)


class Split(StrEnum):
    """A part of the evaluation rows: validation selects layer and step, test gives the figures."""

    VALIDATION = "validation"
    TEST = "test"


def test_part(name: str) -> str:
    """Return the name of the test rows of the evaluation set `name`."""
    return f"test {name}"


@dataclasses.dataclass(frozen=True, slots=True)
class SetManifest:
    """A built set: forget rows, retain rows and evaluation rows.

    `evals` maps an evaluation set's name to its rows. Forget accuracy is measured on the rows
    of `forget_eval` labelled `concept`. If `forget_eval` is None, no evaluation set has the
    concept as a class, and the forget set's own images are classified among the classes of the
    first evaluation set and the concept. `test_fraction` is the share of every class of an
    evaluation set that is drawn by `seed` as test split; evaluation sets in `tests` have
    separate test rows instead. `command` has the words of the command line that builds the same
    set again, `request` all of its options. `words` are the names of a concept of words. If they
    are a thing with attributes, `thing` is the thing without them.
    """

    name: str
    concept: str
    patterns: tuple[str, ...]
    model: ModelSpec
    input: InputSpec
    forget: DataRef
    retain: DataRef
    evals: dict[str, DataRef]
    forget_eval: str | None
    seed: int
    command: tuple[str, ...]
    version: str
    request: dict[str, Any] = dataclasses.field(default_factory=dict)
    test_fraction: float = 0.0
    tests: dict[str, DataRef] = dataclasses.field(default_factory=dict)
    words: tuple[str, ...] = ()
    thing: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the concept's classes."""
        return self.words or (self.concept,)

    @property
    def words_alone(self) -> bool:
        """Whether the rows to forget and to retain are made from words."""
        return bool(self.words) and not self.request.get("sources")

    def blocks(self) -> dict[str, DataRef]:
        """Return every block of rows by its role: forget, retain, evaluation and test names."""
        tests = {test_part(name): ref for name, ref in self.tests.items()}
        return {"forget": self.forget, "retain": self.retain, **self.evals, **tests}

    @property
    def is_split(self) -> bool:
        """Whether there is a test split: rows that do not select layer and step."""
        return bool(self.test_fraction or self.tests)

    @property
    def regex(self) -> bool:
        """Whether `patterns` are regular expressions."""
        return bool(self.request.get("regex") and self.request.get("match"))

    @property
    def exclusions(self) -> list[str]:
        """The patterns that captions of the concept must not match."""
        return list(self.request.get("not_match") or ())

    def measured_on(self) -> dict[str, str]:
        """Return fingerprints of the rows and splits of each evaluation set."""
        split = f" {self.test_fraction:g} {self.seed}" if self.test_fraction else ""
        return {
            name: f"{ref.fingerprint} {self.tests[name].fingerprint}"
            if name in self.tests
            else ref.fingerprint + split
            for name, ref in sorted(self.evals.items())
        }

    def evaluation_blocks(self) -> dict[str, str]:
        """Return the fingerprints of all rows that accuracies are measured on."""
        concept = f"{self.forget_eval or self.forget.fingerprint}:{','.join(self.names)}"
        return self.measured_on() | {FORGET: concept}


@dataclass(frozen=True, slots=True)
class Origin:
    """The origin of a sample: a file, the row in it, and the URL of the image."""

    file: str
    row: int
    url: str | None = None


_NAME = re.compile(r"[\w][\w .+@-]*")


def check_name(name: str) -> str:
    """Return `name` if it can name artifacts. Raises UsageError."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot name a set",
            hint="use letters, digits, spaces and . _ + @ -, starting with a letter or digit",
        )
    return name


class Distributor(StrEnum):
    """How img2dataset distributes the download."""

    MULTIPROCESSING = "multiprocessing"
    PYSPARK = "pyspark"
    RAY = "ray"


@dataclass(frozen=True, slots=True)
class Concept:
    """A name with the patterns of its captions and those that exclude a caption."""

    name: str
    patterns: Sequence[str]
    excluded: Sequence[str] = ()


# The prefix of an exclusion in a file of names.
EXCLUSION = "!"


def read_names(path: str) -> list[Concept]:
    """Return the concepts of a file: NAME, aliases and !exclusions, separated by tabs.

    Each name is a pattern too. Empty lines and lines that begin with # are skipped. Raises
    InputError.
    """
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the names in {path}: {error}") from error
    concepts = [
        _concept(line, f"{path}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip() and not line.startswith("#")
    ]
    if not concepts:
        raise InputError(f"{path} has no names", hint="one a line: NAME<tab>alias<tab>!exclusion")
    twice = [name for name, count in Counter(c.name for c in concepts).items() if count > 1]
    if twice:
        raise InputError(f"{path} has {twice[0]} twice", hint="write all its aliases on one line")
    return concepts


def _concept(line: str, where: str) -> Concept:
    name, *others = (part.strip() for part in line.split("\t"))
    try:
        check_name(name)
    except UsageError as error:
        raise InputError(f"{where}: {error.message}", hint=error.hint) from error
    aliases = [other for other in others if other and not other.startswith(EXCLUSION)]
    excluded = [other[1:].strip() for other in others if other.startswith(EXCLUSION)]
    if not all(excluded):
        raise InputError(f"{where}: an exclusion is blank")
    return Concept(name, (name, *aliases), tuple(excluded))


@dataclass(frozen=True, slots=True, kw_only=True)
class Screening:
    """Filters of the matching pairs; None for no filter.

    `min_similarity` is the least cosine of a pair's own image and caption under the model.
    Images are near-duplicates if their perceptual hashes differ in at most `near_duplicates`
    bits.
    """

    min_similarity: float | None = option(
        None,
        "--min-similarity",
        help="Minimum cosine between an image and its caption.",
        panel=ROWS,
        without="no minimum",
    )
    near_duplicates: int | None = option(
        None,
        "--near-duplicates",
        metavar="BITS",
        help="Drop images whose perceptual hashes differ in at most this many bits.",
        panel=ROWS,
        without="keep all",
    )
    device: str = DEVICE()


@dataclass(frozen=True, slots=True, kw_only=True)
class ShowOptions:
    """The part of a set to show, and the rows to drop from it."""

    part: str = option(
        "forget",
        "--part",
        metavar="PART",
        panel=ROWS,
        help="Part of the set: forget, retain or the name of an evaluation set.",
    )
    images: int = option(
        48, "--images", min=1, max=400, help="Images on the contact sheet.", panel=ROWS
    )
    drop: Sequence[str] = option(
        (), "--drop", help="Drop the row with this key or hash.", panel=ROWS, metavar="KEY"
    )
    drop_from: str | None = option(
        None,
        "--drop-from",
        help="File of keys or hashes of rows to drop, one per line.",
        panel=ROWS,
        metavar="FILE",
        without="none",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadOptions:
    """Options of img2dataset, which do not change the requested rows."""

    distributor: Distributor = option(
        Distributor.MULTIPROCESSING,
        "--distributor",
        help="How img2dataset distributes the download.",
        panel=DOWNLOAD,
    )
    processes: int | None = option(
        None,
        "--processes",
        min=1,
        help="Number of download processes.",
        panel=DOWNLOAD,
        without="cores",
    )
    threads: int = 64
    timeout: int = option(
        10, "--timeout", min=1, help="Timeout for each image, in seconds.", panel=DOWNLOAD
    )
    retries: int = option(
        1, "--retries", min=0, help="Number of retries for each image.", panel=DOWNLOAD
    )
    shard_rows: int = 1000
    command: str | None = option(
        None,
        "--img2dataset",
        metavar="CMD",
        help="Path of the img2dataset command.",
        panel=DOWNLOAD,
        without="img2dataset",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectRequest:
    """A large source to collect samples from, for one concept or many, in one pass.

    The source is `metadata` (parquet with URLs to download) or `sources` (samples with images).
    The retain rows, limits, columns and seed are those of the `BuildRequest` around it.
    """

    concepts: Sequence[Concept]
    metadata: Sequence[str] = ()
    sources: Sequence[str] = ()
    url_column: str = "URL"
    download: DownloadOptions = field(default_factory=DownloadOptions)


@dataclass(frozen=True, slots=True)
class ConceptCounts:
    """The rows found for a concept (or drawn for the retain set), and reasons of failures."""

    rows: int
    refused: dict[str, int]
    shards: Sequence[str]


@dataclass(frozen=True, slots=True)
class Collection:
    """Samples collected from a large source, with counts by concept.

    `shards` of a concept are the tar files with its samples, `digests` the SHA-256 of each.
    """

    sources: Sequence[str]
    files: int
    seen: int
    refused: dict[str, int]
    concepts: dict[str, ConceptCounts]
    retain: ConceptCounts
    examples: Sequence[str]
    version: str
    digests: dict[str, str] = field(default_factory=dict)

    def shards(self) -> list[str]:
        """Return the names of all tar files with samples."""
        counts = [*self.concepts.values(), self.retain]
        return sorted({shard for one in counts for shard in one.shards})
