"""What curation is asked for and what it leaves behind."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum


class Distributor(StrEnum):
    """How img2dataset spreads its work."""

    MULTIPROCESSING = "multiprocessing"
    PYSPARK = "pyspark"
    RAY = "ray"


@dataclass(frozen=True, slots=True)
class Concept:
    """A name with the patterns that find it and those that rule a caption out."""

    name: str
    patterns: Sequence[str]
    excluded: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Screening:
    """Which pairs are kept of those that match.

    `min_similarity` is the least cosine of a pair's own image and caption under the model;
    `near_duplicates` the most bits in which two images' perceptual hashes may differ and
    count as one. None: no such test.
    """

    min_similarity: float | None = None
    near_duplicates: int | None = None
    device: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadOptions:
    """How img2dataset is run. None of this changes which rows are asked for."""

    distributor: Distributor = Distributor.MULTIPROCESSING
    processes: int | None = None
    threads: int = 64
    timeout: int = 10
    retries: int = 1
    shard_rows: int = 1000
    command: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectRequest:
    """Which rows to take out of a large source, for one concept or many, in one pass.

    The source is `metadata` (parquet with URLs to download) or else `sources` (samples with
    images). `retain_samples` rows about none of the concepts are drawn too; 0 for none. Of
    a concept in metadata no more is downloaded than it takes to have `max_forget` rows.
    """

    concepts: Sequence[Concept]
    regex: bool = False
    metadata: Sequence[str] = ()
    sources: Sequence[str] = ()
    url_column: str = "URL"
    caption_column: str | None = None
    image_column: str | None = None
    retain_samples: int = 0
    retain_exclude: Sequence[str] = ()
    max_forget: int | None = None
    seed: int = 0
    download: DownloadOptions = field(default_factory=DownloadOptions)


@dataclass(frozen=True, slots=True)
class Tried:
    """Rows found for a concept (or drawn to retain), and why some could not be had."""

    found: int
    refused: dict[str, int]
    shards: Sequence[str]


@dataclass(frozen=True, slots=True)
class Collection:
    """Samples taken out of a large source: what was read and what was had, by concept.

    `shards` of a concept are the tar files that hold its samples.
    """

    sources: Sequence[str]
    files: int
    seen: int
    refused: dict[str, int]
    concepts: dict[str, Tried]
    retain: Tried
    examples: Sequence[str]
    version: str
