"""The options of every command."""

from dataclasses import dataclass
from pathlib import Path

from slsgu_cli.records.option_fields import COMMON, option


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonOptions:
    """The options of every command; only some commands have `recipe`."""

    store: str = option(
        "./slsgu-store",
        "--store",
        help="Folder or fsspec URL of the artifacts. Every option has an environment variable: "
        "SLSGU_STORE for this one, SLSGU_MAX_LOSS for --max-loss.",
        panel=COMMON,
        metavar="STORE",
    )
    recipe: Path | None = option(
        None,
        "--recipe",
        help="Recipe that provides options not given here.",
        panel=COMMON,
        metavar="FILE",
        without="none",
    )
    no_wait: bool = option(
        False,
        "--no-wait",
        help="Do not wait for another process that computes the same artifact.",
        panel=COMMON,
    )
    json: bool = option(
        False, "--json", help="Print the results as one JSON document.", panel=COMMON
    )
    quiet: bool = option(
        False, "--quiet", "-q", help="Print results and errors only.", panel=COMMON
    )
    verbose: bool = option(
        False, "--verbose", "-v", help="Print details of the computation.", panel=COMMON
    )
    debug: bool = option(False, "--debug", help="Print tracebacks.", panel=COMMON)
