"""The fingerprint of a model that was written without a concept."""

from pathlib import Path

from slsgu_cli.clip.models import fingerprint, resolve
from slsgu_cli.errors import SlsguError
from slsgu_cli.records.ledger import written_at
from slsgu_cli.records.sets import ModelSpec


def written_fingerprint(model: ModelSpec, place: Path) -> str | None:
    """Return the present fingerprint of a copy of a model; None if it is not a CLIP."""
    try:
        return fingerprint(resolve(written_at(model, place)))
    except (SlsguError, OSError):
        return None
