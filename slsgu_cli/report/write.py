"""What `slsgu report` does: gather what is known of some names and write the page."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from slsgu_cli import progress
from slsgu_cli.copying import replacing
from slsgu_cli.errors import InputError, SlsguError, UsageError
from slsgu_cli.report import asked, compared, effect, layers, proof, several, verified
from slsgu_cli.report.gather import Dossier, gather
from slsgu_cli.report.page import page
from slsgu_cli.report.sections import Section, absent
from slsgu_cli.shelf import Shelf
from slsgu_cli.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportRequest:
    """What `report` is asked for. Without `examples` no model is run."""

    names: Sequence[str]
    out: Path
    examples: bool = True
    overwrite: bool = False
    device: str = "auto"


@dataclass(frozen=True, slots=True)
class Report:
    """A page that was written: its sections by name, its path and its size."""

    out: str
    nbytes: int
    sections: dict[str, list[Section]]


def write_report(store: Store, request: ReportRequest) -> Report:
    """Write the page that `request` describes. Raises UsageError, MissingError, InputError."""
    _require_place(request)
    twice = [name for name in request.names if list(request.names).count(name) > 1]
    if twice:
        raise UsageError(f"{twice[0]} is named twice")
    shelf = Shelf(store)
    dossiers = [gather(store, name, shelf) for name in request.names]
    views = _views(store, dossiers, request)
    sections = {d.name: all_sections(d, views[d.name], store.url) for d in dossiers}
    for dossier in dossiers:
        for finding in dossier.findings():
            if finding.state is not None and finding.trouble:
                progress.warn(f"{dossier.name}: {finding.trouble} Not shown; run `{finding.run}`")
    data = page(dossiers, sections).encode()
    with replacing(request.out) as partial:
        partial.write_bytes(data)
    return Report(str(request.out), len(data), sections)


def all_sections(dossier: Dossier, views: Sequence[Section], store: str) -> list[Section]:
    """Return the sections of one name in the page's order; `views` are those of images."""
    return [
        effect.result(dossier),
        asked.request(dossier),
        *views,
        verified.verification(dossier),
        layers.front(dossier),
        layers.search(dossier),
        several.trajectories(dossier),
        *several.together(dossier),
        *several.swept(dossier),
        compared.comparison(dossier),
        asked.fingerprints(dossier),
        proof.the_edit(dossier),
        proof.repeat(dossier, store),
        proof.records(dossier),
    ]


def _require_place(request: ReportRequest) -> None:
    if request.out.is_dir():
        raise InputError(f"{request.out} is a folder", hint="--out report.html")
    if request.out.exists() and not request.overwrite:
        raise InputError(f"{request.out} exists already", hint="another --out, or --overwrite")


def _views(
    store: Store, dossiers: Sequence[Dossier], request: ReportRequest
) -> dict[str, list[Section]]:
    """Return the sections that need the model, or why they are not there."""
    if not request.examples:
        told = "Left out on request, so that no model was run."
        return {
            dossier.name: _absent(told, f"slsgu report {quote(dossier.name)} --out report.html")
            for dossier in dossiers
        }
    from slsgu_cli.models import pick_device
    from slsgu_cli.report.looks import Viewer

    viewer = Viewer(store, device=pick_device(request.device))
    found = {}
    for dossier in dossiers:
        manifest, edit = dossier.manifest, dossier.edit
        if manifest.record is None or edit.record is None:
            lacking = edit if manifest.record else manifest
            found[dossier.name] = _absent(lacking.trouble or "", lacking.run)
            continue
        progress.note(
            f"{dossier.name}: running {edit.record.model} over a few images, "
            "before and after the edit (--no-examples leaves this out)"
        )
        try:
            looks = viewer.look(manifest.record, edit.record)
            found[dossier.name] = [effect.examples(looks), effect.cosines(looks)]
        except SlsguError as error:
            progress.warn(f"{dossier.name}: no images are shown: {error.message}")
            hint = error.hint or "slsgu report ... --no-examples"
            found[dossier.name] = _absent(f"{error.message}.", hint)
    return found


def _absent(trouble: str, run: str) -> list[Section]:
    return [absent(title, trouble, run) for title in (effect.IMAGES, effect.COSINES)]
