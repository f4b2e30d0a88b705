"""The options of `build-sets` that curate: many names, metadata, downloads, screening."""

from typing import Annotated

import typer

from slsgu_cli.curation.records import Distributor

MaybeName = Annotated[
    str | None, typer.Argument(metavar="[NAME]", help="Name of the set; none with --names.")
]
Names = Annotated[
    str | None,
    typer.Option("--names", help="File of many names: NAME<tab>alias<tab>!exclusion a line."),
]
Metadata = Annotated[
    list[str] | None,
    typer.Option("--metadata", help="Parquet of captions and URLs to download. Repeatable."),
]
UrlColumn = Annotated[str, typer.Option("--url-col", help="Column of URLs in --metadata.")]
DistributorOption = Annotated[
    Distributor, typer.Option("--distributor", help="How img2dataset spreads its work.")
]
Processes = Annotated[
    int | None, typer.Option("--processes", min=1, help="Download processes. Default: cores.")
]
Timeout = Annotated[int, typer.Option("--timeout", min=1, help="Seconds to wait for an image.")]
Retries = Annotated[int, typer.Option("--retries", min=0, help="Tries more for each image.")]
Img2dataset = Annotated[
    str | None,
    typer.Option("--img2dataset", metavar="CMD", help="Its command, if not on the PATH."),
]
MinSimilarity = Annotated[
    float | None,
    typer.Option("--min-similarity", help="Least cosine of an image and its own caption."),
]
NearDuplicates = Annotated[
    int | None,
    typer.Option("--near-duplicates", metavar="BITS", help="Images whose hashes differ less."),
]
Replay = Annotated[
    bool, typer.Option("--replay", help="Build NAME again as it was built, rows dropped and all.")
]
