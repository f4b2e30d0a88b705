"""The registry of file formats: one reader class each, in the order in which they are tried."""

from slsgu_cli.sources.arrow import ArrowSource
from slsgu_cli.sources.celeba import CelebASource
from slsgu_cli.sources.csv_table import CsvSource
from slsgu_cli.sources.image_list import ImageListSource
from slsgu_cli.sources.json_lines import JsonLinesSource
from slsgu_cli.sources.json_list import JsonListSource
from slsgu_cli.sources.parquet import ParquetSource
from slsgu_cli.sources.reader import Reader
from slsgu_cli.sources.tar import TarSource

# Shards come first: img2dataset writes a parquet file of metadata next to each tar shard.
# A format restricted to certain names precedes the general one of the same suffix.
READERS: tuple[type[Reader], ...] = (
    TarSource,
    ParquetSource,
    ArrowSource,
    CsvSource,
    JsonLinesSource,
    JsonListSource,
    CelebASource,
    ImageListSource,
)

SUFFIXES = tuple(dict.fromkeys(suffix for reader in READERS for suffix in reader.suffixes))
_DESCRIPTIONS = dict.fromkeys(f"{r.description} ({', '.join(r.suffixes)})" for r in READERS)
ACCEPTED = (
    f"{', '.join(_DESCRIPTIONS)}, "
    "folders of images with .txt captions or a metadata.csv, or of class folders"
)


def reader_class(path: str) -> type[Reader] | None:
    """Return the class that reads a file, by its name; None for an unknown format."""
    return next((reader for reader in READERS if reader.recognises(path)), None)
