"""The contact sheet of a comparison: the concept, then other classes, a row for each method."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from slsgu_cli.erasing.records import Method, Outcome
from slsgu_cli.generation.gallery import Frame, Gallery
from slsgu_cli.generation.sheets import Strip, Tile, sheet_png

SHOWN = 8
LABELS = {
    Method.ORIGINAL: "Original",
    Method.ESD: "ESD-x",
    Method.SALUN: "SalUn",
    Method.OURS: "Ours",
}


def sheet(gallery: Gallery, pictures: Mapping[Outcome, Sequence[bytes]], target: Path) -> bytes:
    """Return a PNG of the first of each row's pictures, below each what the judge takes it for."""
    own = len(gallery.own)
    strips = [
        _strip(gallery, frames[:SHOWN], {
            _title(row): images[start : start + SHOWN][: len(frames)]
            for row, images in pictures.items()
        })
        for frames, start in ((gallery.own, 0), (gallery.rest, own))
    ]  # fmt: skip
    return sheet_png(f"Forgetting {gallery.name}: {target.name}", strips)


def _strip(gallery: Gallery, frames: Sequence[Frame], rows: Mapping[str, Sequence[bytes]]) -> Strip:
    labels = list(dict.fromkeys(frame.label for frame in frames))
    tiles = {title: _tiles(gallery, images) for title, images in rows.items()}
    return Strip(f"asked for {', '.join(labels)}", labels == [gallery.name], tiles)


def _tiles(gallery: Gallery, images: Sequence[bytes]) -> list[Tile]:
    said = gallery.judge.verdicts(images)
    return [Tile(image, name) for image, name in zip(images, said, strict=True)]


def _title(row: Outcome) -> str:
    return LABELS[row.method] + (f" {row.plan.rate:g}" if row.plan else "")
