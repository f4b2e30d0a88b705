"""`generate`: images of prompts, before and after an edit."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import chain, repeat
from pathlib import Path

import slsgu_cli
from slsgu_cli.checkpoints.edits import Edit, edit_digests, load_edit, warn_of_other_encoders
from slsgu_cli.errors import InputError, MissingError, UsageError
from slsgu_cli.figures.sheets import (
    Strip,
    Tile,
    sheet_html,
    sheet_png,
)
from slsgu_cli.records.codec import digest
from slsgu_cli.records.figures import Effect, JudgeFigures, Share
from slsgu_cli.records.targets import (
    GenerateRequest,
    Generation,
    PromptResult,
)
from slsgu_cli.sources.prompts import DEFAULT_TEMPLATES, find_class, read_classes, read_templates
from slsgu_cli.store.artifacts import Artifact, read_manifest, set_of
from slsgu_cli.store.store import Store
from slsgu_cli.targets.judge import (
    Classes,
    Judge,
    called,
    class_in,
    judge_specs,
    measured_classes,
)
from slsgu_cli.targets.models import (
    ImageJob,
    Pipeline,
    encoded,
    folder_fingerprint,
    new_values,
)
from slsgu_cli.targets.output_folder import OutputFolder


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt and its class, if known."""

    text: str
    label: str | None = None


def read_prompts(
    texts: Sequence[str], file: Path | None, classes: Sequence[str], concept: str
) -> list[Prompt]:
    """Return the prompts of the command line, then those of a file.

    A file has one prompt per line, or `prompt<TAB>class`. The class of other prompts is the
    longest class name in them. Raises UsageError without any, MissingError, InputError.
    """
    lines = [(text.strip(), "--prompt") for text in texts]
    if file is not None:
        try:
            content = file.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise MissingError(f"there is no file of prompts {file}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read prompts from {file}: {error}") from error
        numbered = enumerate(content.splitlines(), 1)
        lines += [(line.strip(), f"{file}, line {number}") for number, line in numbered]
    known = [*classes, concept] if find_class(classes, concept) is None else list(classes)
    prompts = [_prompt(line, origin, known) for line, origin in lines if line]
    if not prompts:
        raise UsageError("there is no prompt", hint=f"--prompt 'a picture of {concept}'")
    return prompts


def _prompt(line: str, origin: str, classes: Sequence[str]) -> Prompt:
    text, tab, label = line.partition("\t")
    if not tab:
        return Prompt(text, class_in(text, classes))
    text, label = text.strip(), label.strip()
    place = find_class(classes, label)
    if place is None or not text:
        raise InputError(
            f"{origin}: {label!r} is not a class of the judge",
            hint="prompt<TAB>class, with a class name of the evaluation sets or of --classes",
        )
    return Prompt(text, classes[place])


BEFORE, AFTER = "original", "unlearned"
# The class that a judge gives each image of both models.
Verdicts = dict[str, list[str]]
# The images of both models as PNG, by file.
Images = dict[str, dict[str, bytes]]


def generate(store: Store, request: GenerateRequest) -> tuple[Generation, OutputFolder]:
    """Generate images before and after the edits, judge them, and write contact sheets.

    Raises MissingError, InputError, StaleError and UsageError.
    """
    edits = [load_edit(store, name) for name in request.names]
    warn_of_other_encoders(edits)
    request = replace(request, judges=judge_specs(store, request.names[0], request.judges))
    classes = judged_classes(store, edits, request.classes, request.templates)
    if request.judges and len(classes) < 2:
        raise UsageError(
            "a judge needs at least two classes, and the set has no evaluation sets",
            hint="--classes FILE, with one class name per line",
        )
    prompts = read_prompts(
        request.prompts, request.prompt_file, tuple(classes), edits[0].header.concept
    )
    output = OutputFolder.at(store, edits[0].header.name, request.out)
    pipe = Pipeline.load(request.target, device=request.device)
    images = before_and_after(output, pipe, edits, prompts, request)
    verdicts: list[Verdicts] = []
    for spec in request.judges:
        judge = Judge.load(spec, classes, device=request.device)
        verdicts.append({key: judge.verdicts([*made.values()]) for key, made in images.items()})
    record = _record(edits, prompts, tuple(classes), request, verdicts)
    return _with_sheets(output, record, images, verdicts), output


def judged_classes(
    store: Store, edits: Sequence[Edit], classes: str | None, templates: str | None
) -> Classes:
    """Return the classes of a file if given, otherwise those of the edits' evaluation sets."""
    if classes is not None:
        known = read_classes(classes)
        texts = read_templates(templates or DEFAULT_TEMPLATES)
        return dict.fromkeys(known.names if known else (), texts)
    prompts_by_label: dict[str, Sequence[str]] = {}
    for name in (set_of(edit.header.name) for edit in edits):
        if store.exists(Artifact.SET.path(name)):
            prompts_by_label |= measured_classes(store, read_manifest(store, name))
    return prompts_by_label


def before_and_after(
    output: OutputFolder,
    pipe: Pipeline,
    edits: Sequence[Edit],
    prompts: Sequence[Prompt],
    request: GenerateRequest,
) -> Images:
    """Return the images of both models, by prompt and seed.

    Each is written as soon as it is generated, so an interrupted run can be resumed.
    """
    numbered = [(place, seed) for place in range(len(prompts)) for seed in request.seeds]
    jobs = [ImageJob(prompts[place].text, seed) for place, seed in numbered]
    files = {
        key: [f"{key}/{place:03}-seed{seed}.png" for place, seed in numbered]
        for key in (BEFORE, AFTER)
    }
    made_from = [edit_digests(edits), folder_fingerprint(request.target), jobs, request.diffusion]
    output.resume(digest([*made_from, pipe.device]), chain(*files.values()))
    values = new_values(pipe.encoders, edits)
    pipe.warn_of_readers(pipe.edited_names(values))
    images: Images = {}
    for key, names in files.items():
        made = {name: data for name in names if (data := output.read(name)) is not None}
        done = [name in made for name in names]
        with pipe.edited(values if key == AFTER else ()):
            for number, image in pipe.generate_missing(jobs, request.diffusion, done):
                made[names[number]] = encoded(image)
                output.write(names[number], made[names[number]])
        images[key] = {name: made[name] for name in names}
    return images


def effect(concepts: Sequence[str], labels: Sequence[str | None], said: Sequence[str]) -> Effect:
    """Return the effect that verdicts amount to; `labels` are the classes of the prompts."""
    pairs = [(label, verdict) for label, verdict in zip(labels, said, strict=True) if label]
    of_concept = [label == verdict for label, verdict in pairs if label in concepts]
    rest = [label == verdict for label, verdict in pairs if label not in concepts]
    return Effect(Share(sum(of_concept), len(of_concept)), Share(sum(rest), len(rest)))


def _record(
    edits: Sequence[Edit],
    prompts: Sequence[Prompt],
    classes: Sequence[str],
    request: GenerateRequest,
    verdicts: Sequence[Verdicts],
) -> Generation:
    seeds = len(request.seeds)
    labels = [prompt.label for prompt in prompts for _ in range(seeds)]
    concepts = [called(edit.header.concept, classes) for edit in edits]

    def share(key: str, place: int) -> Share | None:
        label = prompts[place].label
        if not verdicts or label is None:
            return None
        said = verdicts[0][key]
        return Share(said[place * seeds : (place + 1) * seeds].count(label), seeds)

    by_judge = [
        JudgeFigures(str(judge), *(effect(concepts, labels, said[key]) for key in (BEFORE, AFTER)))
        for judge, said in zip(request.judges, verdicts, strict=True)
    ]
    first = by_judge[0] if by_judge else None
    return Generation(
        name=edits[0].header.name,
        concept=concepts[0],
        target=str(request.target),
        edits=edit_digests(edits),
        seeds=tuple(request.seeds),
        diffusion=request.diffusion,
        prompts=tuple(
            PromptResult(prompt.text, prompt.label, share(BEFORE, place), share(AFTER, place))
            for place, prompt in enumerate(prompts)
        ),
        judge=first.judge if first else None,
        before=first.before if first else None,
        after=first.after if first else None,
        version=slsgu_cli.__version__,
        further=tuple(by_judge[1:]),
    )


def _with_sheets(
    output: OutputFolder, record: Generation, images: Images, verdicts: Sequence[Verdicts]
) -> Generation:
    """Write both sheets of the images, and last the record, which marks them as complete."""
    seeds = len(record.seeds)
    tiles = {
        key: list(map(Tile, made.values(), verdicts[0][key] if verdicts else repeat(None)))
        for key, made in images.items()
    }
    strips = []
    for place, prompt in enumerate(record.prompts):
        its = slice(place * seeds, (place + 1) * seeds)
        shown = {key: each[its] for key, each in tiles.items()}
        strips.append(Strip(prompt.prompt, prompt.label == record.concept, shown))
    title = f"Forgetting {record.concept}: {Path(record.target).name}"
    sheet = sheet_png(title, strips)
    output.write("sheet.png", sheet)
    output.write("sheet.html", sheet_html(title, _notes(record), strips).encode())
    pictures = {"sheet.png": sheet} | {
        n: png for made in images.values() for n, png in made.items()
    }
    digests = {name: sha256(png).hexdigest() for name, png in sorted(pictures.items())}
    record = replace(record, digests=digests)
    output.finish(record)
    return record


def _notes(record: Generation) -> list[str]:
    """Return notes for readers of the page, and the figures if there are any."""
    seeds = ", ".join(map(str, record.seeds))
    notes = [f"Edits: {', '.join(record.edits)}. Seeds {seeds}, {record.diffusion.steps} steps."]
    if record.judge:
        notes.append(
            f"Below each image: its class according to {record.judge}, which is not edited."
        )
    for judged in record.by_judge:
        by = f" by {judged.judge}" if record.further else ""
        for label, figures in ((BEFORE, judged.before), (AFTER, judged.after)):
            if figures.ua is not None:
                retained = "" if figures.ira is None else f", IRA {figures.ira:.1f}%"
                notes.append(f"{label}{by}: UA {figures.ua:.1f}%{retained}")
    return notes
