"""What `slsgu generate` does: the same prompts and seeds before and after an edit."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import slsgu_cli
from slsgu_cli import progress
from slsgu_cli.edits import Edit, load_edit
from slsgu_cli.errors import UsageError
from slsgu_cli.evalsets import read_classes, read_templates
from slsgu_cli.generation.albums import Album
from slsgu_cli.generation.judging import Classes, Judge, measured_classes, png_bytes
from slsgu_cli.generation.live import new_values
from slsgu_cli.generation.painting import Job, Painter
from slsgu_cli.generation.prompting import Prompt, read_prompts
from slsgu_cli.generation.records import Generation, PaintOptions, PromptResult
from slsgu_cli.generation.sheets import Strip, Tile, sheet_html, sheet_png
from slsgu_cli.layout import manifest_path, read_manifest, set_of
from slsgu_cli.prompts import DEFAULT_TEMPLATES, find_class
from slsgu_cli.records import Effect, ModelSpec, Share, digest
from slsgu_cli.store import Store

BEFORE, AFTER = "original", "unlearned"
# Names the CLIP that the edit was made for, as it was.
OWN = "set"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """What `generate` is asked for. `judge` None leaves the images unjudged."""

    names: Sequence[str]
    target: Path
    prompts: Sequence[str] = ()
    prompt_file: Path | None = None
    seeds: Sequence[int] = (0, 1, 2, 3)
    paint: PaintOptions = field(default_factory=PaintOptions)
    judge: ModelSpec | None = None
    classes: str | None = None
    templates: str | None = None
    out: Path | None = None
    device: str = "auto"


def generate(store: Store, request: GenerateRequest) -> tuple[Generation, Album]:
    """Generate before and after the edits, judge and lay out what came of it.

    Raises MissingError, InputError, StaleError and UsageError.
    """
    edits = [load_edit(store, name) for name in request.names]
    classes = judged_classes(store, edits, request.classes, request.templates)
    if request.judge is not None and len(classes) < 2:
        raise UsageError(
            "a judge needs classes to tell apart, and the set has no evaluation sets",
            hint="--classes FILE, one class name a line",
        )
    prompts = read_prompts(
        request.prompts, request.prompt_file, tuple(classes), edits[0].header.concept
    )
    album = Album.at(store, edits[0].header.name, request.out)
    painter = Painter.load(request.target, device=request.device)
    images = before_and_after(painter, edits, prompts, request)
    judge = request.judge and Judge.load(request.judge, classes, device=request.device)
    verdicts = {k: judge.verdicts(made) if judge else None for k, made in images.items()}
    record = _record(edits, prompts, tuple(classes), request, verdicts)
    _write(album, record, images, verdicts)
    return record, album


def judge_spec(
    store: Store, name: str, judge: str | None, pretrained: str | None
) -> ModelSpec | None:
    """Return the model that the judge's options name; `set` is the one the set is for."""
    if judge is None and pretrained is not None:
        raise UsageError("--judge-pretrained needs --judge")
    if judge == OWN:
        known = store.exists(manifest_path(name))
        return read_manifest(store, name).model if known else load_edit(store, name).header.model
    return None if judge is None else ModelSpec(judge, pretrained)


def judged_classes(
    store: Store, edits: Sequence[Edit], classes: str | None, templates: str | None
) -> Classes:
    """Return the classes of a file, else those of the evaluation sets of the edits' sets."""
    found: dict[str, Sequence[str]] = {}
    if classes is not None:
        known = read_classes(classes)
        texts = read_templates(templates or DEFAULT_TEMPLATES)
        found = dict.fromkeys(known.names if known else (), texts)
    else:
        for edit in edits:
            name = set_of(edit.header.name)
            if store.exists(manifest_path(name)):
                found |= measured_classes(store, read_manifest(store, name))
    return found


def before_and_after(
    painter: Painter, edits: Sequence[Edit], prompts: Sequence[Prompt], request: GenerateRequest
) -> dict[str, list[bytes]]:
    """Return the images as PNG, prompt by prompt and seed by seed, of both models."""
    jobs = [Job(prompt.text, seed) for prompt in prompts for seed in request.seeds]
    values = new_values(painter.encoders, edits)
    made: dict[str, list[bytes]] = {BEFORE: [], AFTER: []}
    with progress.bar("generating", 2 * len(jobs)) as ticker:
        for key, images in made.items():
            with painter.edited(values if key == AFTER else ()):
                for image in painter.paint(jobs, request.paint):
                    images.append(png_bytes(image))
                    ticker.advance()
    return made


def called(concept: str, classes: Sequence[str]) -> str:
    """Return the concept as the judge spells it."""
    place = find_class(classes, concept)
    return concept if place is None else classes[place]


def effect(concepts: Sequence[str], labels: Sequence[str | None], said: Sequence[str]) -> Effect:
    """Return what verdicts amount to, from the class that each image was to show."""
    pairs = [(label, verdict) for label, verdict in zip(labels, said, strict=True) if label]
    own = [label == verdict for label, verdict in pairs if label in concepts]
    rest = [label == verdict for label, verdict in pairs if label not in concepts]
    return Effect(Share(sum(own), len(own)), Share(sum(rest), len(rest)))


def _record(
    edits: Sequence[Edit],
    prompts: Sequence[Prompt],
    classes: Sequence[str],
    request: GenerateRequest,
    verdicts: dict[str, list[str] | None],
) -> Generation:
    seeds = len(request.seeds)
    labels = [prompt.label for prompt in prompts for _ in range(seeds)]
    concepts = [called(edit.header.concept, classes) for edit in edits]

    def share(key: str, place: int) -> Share | None:
        said, label = verdicts[key], prompts[place].label
        if said is None or label is None:
            return None
        return Share(said[place * seeds : (place + 1) * seeds].count(label), seeds)

    def whole(key: str) -> Effect | None:
        said = verdicts[key]
        return None if said is None else effect(concepts, labels, said)

    return Generation(
        name=edits[0].header.name,
        concept=concepts[0],
        target=str(request.target),
        edits={edit.header.name: digest(edit.header) for edit in edits},
        seeds=tuple(request.seeds),
        paint=request.paint,
        prompts=tuple(
            PromptResult(prompt.text, prompt.label, share(BEFORE, place), share(AFTER, place))
            for place, prompt in enumerate(prompts)
        ),
        judge=None if request.judge is None else str(request.judge),
        before=whole(BEFORE),
        after=whole(AFTER),
        version=slsgu_cli.__version__,
    )


def _write(
    album: Album,
    record: Generation,
    images: dict[str, list[bytes]],
    verdicts: dict[str, list[str] | None],
) -> None:
    """Write the images, both sheets, and last the record that says they are complete."""
    album.begin()
    seeds = len(record.seeds)
    for key, made in images.items():
        for place, image in enumerate(made):
            name = f"{place // seeds:03}-seed{record.seeds[place % seeds]}"
            album.write(f"{key}/{name}.png", image)
    strips = [
        Strip(
            prompt.prompt,
            prompt.label == record.concept,
            {
                key: _tiles(made, verdicts[key], place * seeds, seeds)
                for key, made in images.items()
            },
        )
        for place, prompt in enumerate(record.prompts)
    ]
    title = f"Forgetting {record.concept}: {Path(record.target).name}"
    album.write("sheet.png", sheet_png(title, strips))
    album.write("sheet.html", sheet_html(title, _notes(record), strips).encode())
    album.finish(record)


def _tiles(
    images: Sequence[bytes], verdicts: Sequence[str] | None, start: int, count: int
) -> list[Tile]:
    said = [None] * len(images) if verdicts is None else verdicts
    return [Tile(images[place], said[place]) for place in range(start, start + count)]


def _notes(record: Generation) -> list[str]:
    """Return what a reader of the page needs to know, and the figures if there are any."""
    seeds = ", ".join(map(str, record.seeds))
    notes = [f"Edits: {', '.join(record.edits)}. Seeds {seeds}, {record.paint.steps} steps."]
    if record.judge:
        notes.append(f"Below each image: what {record.judge}, which is not edited, takes it for.")
    for label, found in (("original", record.before), ("unlearned", record.after)):
        if found and found.ua is not None:
            kept = "" if found.ira is None else f", IRA {found.ira:.1f}%"
            notes.append(f"{label}: UA {found.ua:.1f}%{kept}")
    return notes
