"""`generate` and `ask`: images of prompts and answers about images, before and after an edit."""

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch import Tensor

import slsgu_cli
from slsgu_cli import progress
from slsgu_cli.checkpoints.edits import Edit, edit_digests, load_edit, warn_of_other_encoders
from slsgu_cli.clip.evaluation import concept_rows, serving_rows
from slsgu_cli.clip.inputs import Ints, spans
from slsgu_cli.downstream.judge import (
    Classes,
    Judge,
    called,
    class_in,
    judge_specs,
    measured_classes,
    png_bytes,
)
from slsgu_cli.downstream.models import (
    BATCH,
    ImageJob,
    Llava,
    Pipeline,
    Question,
    folder_fingerprint,
    new_values,
    unfinished,
)
from slsgu_cli.errors import InputError, MissingError, UsageError
from slsgu_cli.figures.pictures import (
    AnsweredImage,
    Strip,
    Tile,
    answers_html,
    answers_png,
    sheet_html,
    sheet_png,
)
from slsgu_cli.method.gradients import KeptArrays
from slsgu_cli.records.codec import digest
from slsgu_cli.records.figures import Effect, JudgeFigures, Share
from slsgu_cli.records.method import SumsHeader
from slsgu_cli.records.sets import Split
from slsgu_cli.records.targets import (
    Answer,
    Answers,
    AskRequest,
    GenerateRequest,
    Generation,
    PaintOptions,
    PromptResult,
)
from slsgu_cli.sets.evaluation_sets import read_classes, read_templates
from slsgu_cli.sources.captions import DEFAULT_TEMPLATES, find_class
from slsgu_cli.store.artifacts import TABLE, Artifact, read_manifest, set_of
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.store import Arrays, Store


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, and the class it asks for where one is known."""

    text: str
    label: str | None = None


def read_prompts(
    texts: Sequence[str], file: Path | None, classes: Sequence[str], concept: str
) -> list[Prompt]:
    """Return the prompts of the command line, then those of a file.

    A file has a prompt a line, or `prompt<TAB>class`. Of other prompts the class is the
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
        raise UsageError(
            "there is nothing to generate from", hint=f"--prompt 'a picture of {concept}'"
        )
    return prompts


def _prompt(line: str, origin: str, classes: Sequence[str]) -> Prompt:
    text, tab, label = line.partition("\t")
    if not tab:
        return Prompt(text, class_in(text, classes))
    text, label = text.strip(), label.strip()
    place = find_class(classes, label)
    if place is None or not text:
        raise InputError(
            f"{origin}: {label!r} is no class that the judge knows",
            hint="prompt<TAB>class, with a class name of the evaluation sets or of --classes",
        )
    return Prompt(text, classes[place])


@dataclass(frozen=True, slots=True)
class OutputFolder:
    """A folder of pictures and the record that stands beside it once it is complete.

    `digests` are the SHA-256 of the pictures that were written, or read of an earlier run.
    """

    store: Store
    folder: str
    record: str
    digests: dict[str, str] = field(default_factory=dict)

    @classmethod
    def at(
        cls, store: Store, name: str, out: Path | None, kind: Artifact = Artifact.GENERATION
    ) -> "OutputFolder":
        """Return the folder of the set `name`: at `out`, or else in the store."""
        if out is not None:
            return cls(Store(str(out)), "", f"{TABLE[kind].folder}.json")
        return cls(store, kind.beside(name), kind.path(name))

    def write(self, path: str, data: bytes) -> None:
        """Write one file into the folder."""
        self.store.write_bytes(self._inside(path), data)
        self._note(path, data)

    def read(self, path: str) -> bytes | None:
        """Return a file of the folder; None where it is not there."""
        inside = self._inside(path)
        if not self.store.exists(inside):
            return None
        data = self.store.read_bytes(inside)
        self._note(path, data)
        return data

    def _note(self, path: str, data: bytes) -> None:
        if path.endswith(".png"):
            self.digests[path] = hashlib.sha256(data).hexdigest()

    def finish(self, record: Any) -> None:
        """Write what the folder shows. Written last, it says that the folder is complete."""
        if isinstance(record, Generation):
            record = replace(record, digests=dict(sorted(self.digests.items())))
        self.store.write_record(self.record, record)
        self.store.remove(self._inside(MADE_FROM))

    def resume(self, made_from: str, files: Iterable[str]) -> None:
        """Keep what a run that was cut short left of the same pictures; else begin anew.

        `files` are those to be written, of which none of another run may be left.
        """
        left = self.read(MADE_FROM)
        if self.store.exists(self.record) or left is None or left.decode() != made_from:
            self.begin()
            for name in files:
                self.store.remove(self._inside(name))
            self.write(MADE_FROM, made_from.encode())

    def begin(self) -> None:
        """Remove what an earlier run left, its record first."""
        self.store.remove(self.record)
        if self.folder:
            self.store.remove(self.folder)

    def where(self, path: str) -> str:
        """Return where a file of the folder lies, for people and other programs."""
        return self.store.where(self._inside(path))

    def _inside(self, path: str) -> str:
        return f"{self.folder}/{path}" if self.folder else path


BEFORE, AFTER = "original", "unlearned"
# Says what pictures are made from, while they are not complete.
MADE_FROM = ".made-from"
# What a judge takes each image of both models for.
Verdicts = dict[str, list[str]]


def generate(store: Store, request: GenerateRequest) -> tuple[Generation, OutputFolder]:
    """Generate before and after the edits, judge and lay out what came of it.

    Raises MissingError, InputError, StaleError and UsageError.
    """
    edits = [load_edit(store, name) for name in request.names]
    warn_of_other_encoders(edits)
    request = replace(request, judges=judge_specs(store, request.names[0], request.judges))
    classes = judged_classes(store, edits, request.classes, request.templates)
    if request.judges and len(classes) < 2:
        raise UsageError(
            "a judge needs classes to tell apart, and the set has no evaluation sets",
            hint="--classes FILE, one class name a line",
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
        verdicts.append({key: judge.verdicts(made) for key, made in images.items()})
    record = _record(edits, prompts, tuple(classes), request, verdicts)
    _write_sheets(output, record, images, verdicts[0] if verdicts else {})
    return record, output


def judged_classes(
    store: Store, edits: Sequence[Edit], classes: str | None, templates: str | None
) -> Classes:
    """Return the classes of a file, else those of the evaluation sets of the edits' sets."""
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
) -> dict[str, list[bytes]]:
    """Return the images as PNG, prompt by prompt and seed by seed, of both models.

    Each is written as soon as it is made: a run that was cut short is gone on with.
    """
    numbered = [(place, seed) for place in range(len(prompts)) for seed in request.seeds]
    jobs = [ImageJob(prompts[place].text, seed) for place, seed in numbered]
    files = {
        key: [f"{key}/{place:03}-seed{seed}.png" for place, seed in numbered]
        for key in (BEFORE, AFTER)
    }
    made_from = [edit_digests(edits), folder_fingerprint(request.target), jobs, request.paint]
    output.resume(digest([*made_from, pipe.device]), chain(*files.values()))
    values = new_values(pipe.encoders, edits)
    pipe.tell_of_readers(pipe.edited_names(values))
    made = {}
    with progress.bar("generating", 2 * len(jobs)) as ticker:
        for key, names in files.items():
            with pipe.edited(values if key == AFTER else ()):
                made[key] = _made(output, names, pipe, jobs, request.paint, ticker)
    return made


def _made(
    output: OutputFolder,
    names: Sequence[str],
    pipe: Pipeline,
    jobs: Sequence[ImageJob],
    paint: PaintOptions,
    ticker: progress.Ticker,
) -> list[bytes]:
    """Return the files of an output folder, painting those that are not there."""
    known = {name: data for name in names if (data := output.read(name)) is not None}
    for rows in unfinished(len(jobs), paint.batch, lambda number: names[number] in known):
        for number, image in zip(rows, pipe.paint([jobs[n] for n in rows], paint), strict=True):
            known[names[number]] = png_bytes(image)
            output.write(names[number], known[names[number]])
            ticker.advance()
    return [known[name] for name in names]


def effect(concepts: Sequence[str], labels: Sequence[str | None], said: Sequence[str]) -> Effect:
    """Return what verdicts amount to, from the class that each image was to show."""
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
        paint=request.paint,
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


def _write_sheets(
    output: OutputFolder,
    record: Generation,
    images: dict[str, list[bytes]],
    verdicts: Verdicts,
) -> None:
    """Write both sheets of the images, and last the record that says they are complete."""
    seeds = len(record.seeds)
    tiles = {key: _tiles(made, verdicts.get(key)) for key, made in images.items()}
    strips = []
    for place, prompt in enumerate(record.prompts):
        its = slice(place * seeds, (place + 1) * seeds)
        shown = {key: each[its] for key, each in tiles.items()}
        strips.append(Strip(prompt.prompt, prompt.label == record.concept, shown))
    title = f"Forgetting {record.concept}: {Path(record.target).name}"
    output.write("sheet.png", sheet_png(title, strips))
    output.write("sheet.html", sheet_html(title, _notes(record), strips).encode())
    output.finish(record)


def _tiles(images: Sequence[bytes], verdicts: Sequence[str] | None) -> list[Tile]:
    said = [None] * len(images) if verdicts is None else verdicts
    return [Tile(image, name) for image, name in zip(images, said, strict=True)]


def _notes(record: Generation) -> list[str]:
    """Return what a reader of the page needs to know, and the figures if there are any."""
    seeds = ", ".join(map(str, record.seeds))
    notes = [f"Edits: {', '.join(record.edits)}. Seeds {seeds}, {record.paint.steps} steps."]
    if record.judge:
        notes.append(f"Below each image: what {record.judge}, which is not edited, takes it for.")
    for judged in record.by_judge:
        by = f" by {judged.judge}" if record.further else ""
        for label, figures in ((BEFORE, judged.before), (AFTER, judged.after)):
            if figures.ua is not None:
                kept = "" if figures.ira is None else f", IRA {figures.ira:.1f}%"
                notes.append(f"{label}{by}: UA {figures.ua:.1f}%{kept}")
    return notes


# What is kept of answers under way: JSON, in their order.
SAID = "said"


@dataclass(frozen=True, slots=True)
class AskedImage:
    """An image to ask about, what it is called, and whether it shows the concept."""

    name: str
    image: Image.Image
    forgotten: bool = False


def ask(store: Store, request: AskRequest) -> tuple[Answers, OutputFolder]:
    """Ask every question about every image of both models, and draw what they say.

    Raises MissingError, InputError, StaleError and UsageError.
    """
    edits = [load_edit(store, name) for name in request.names]
    header = edits[0].header
    pictures = [_opened(path) for path in request.images]
    pictures = pictures or sample_pictures(store, set_of(header.name), request.samples)
    output = OutputFolder.at(store, header.name, request.out, Artifact.ANSWERS)
    llava = Llava.load(request.target, device=request.device)
    questions = [Question(p.image, text) for p in pictures for text in request.questions]
    (values,) = new_values((llava.encoder,), edits)
    made_from = [edit_digests(edits), folder_fingerprint(request.target)]
    asked = [[each.text, png_bytes(each.image).hex()] for each in questions]
    kept = KeptArrays(store, digest([*made_from, asked]), llava.device, sharded=False)
    said = _answers(llava, questions, values, kept)
    names = [picture.name for picture in pictures for _ in request.questions]
    record = Answers(
        name=header.name,
        concept=header.concept,
        target=str(request.target),
        edits=edit_digests(edits),
        answers=tuple(
            Answer(name, question.text, before, after)
            for name, question, before, after in zip(names, questions, *said, strict=True)
        ),
        version=slsgu_cli.__version__,
    )
    _write_answers(output, record, pictures, len(request.questions))
    kept.remove()
    return record, output


def _answers(
    llava: Llava, questions: Sequence[Question], values: Mapping[str, Tensor], kept: KeptArrays
) -> tuple[list[str], list[str]]:
    """Return what the model says to each question, as it is and with other values of layers.

    It goes on with what an earlier run kept. Questions of a batch are asked together again, for
    an answer depends on them in its last digits.
    """
    said: list[str] = []

    def packed() -> Arrays:
        return {SAID: np.frombuffer(json.dumps(said).encode(), np.uint8)}

    def use(_header: SumsHeader, arrays: Arrays) -> None:
        said.extend(json.loads(arrays[SAID].tobytes()))

    batches = [(new, *span) for new in ({}, values) for span in spans(len(questions), BATCH)]
    done = kept.go_on(len(batches), use)
    if done:
        progress.note(f"it goes on after {len(said)} of {2 * len(questions)} answers")
    with progress.bar("asking", 2 * len(questions) - len(said)) as ticker:
        for number, (new, start, stop) in enumerate(batches[done:], done + 1):
            with llava.encoder.edited(new):
                for answer in llava.answers(questions[start:stop]):
                    said.append(answer)
                    ticker.advance()
            if number < len(batches) and kept.due:
                kept.write(packed, len(batches), added=number, done=number)
    return said[: len(questions)], said[len(questions) :]


def sample_pictures(store: Store, name: str, count: int) -> list[AskedImage]:
    """Return images that nothing was chosen by: of a set's concept, and of its commonest others.

    Raises UsageError where there is no such set.
    """
    if not store.exists(Artifact.SET.path(name)):
        raise UsageError(f"the store has no set {name} to take images from", hint="--image FILE")
    manifest = read_manifest(store, name)
    shown = concept_rows(store, manifest, Split.TEST)
    pictures = _pictures(shown[0], shown[1][:count], forgotten=True) if shown else []
    for known in sorted(manifest.evals):
        block, rows, _ = serving_rows(store, manifest, known, Split.TEST)
        concept = find_class(block.class_names, manifest.concept)
        rows = rows[block.labels[rows] >= 0]
        common = np.argsort(-np.bincount(block.labels[rows]), kind="stable")
        others = [place for place in common if place != concept and place in block.labels[rows]]
        share = -(-count // len(manifest.evals))
        firsts = [rows[block.labels[rows] == place][0] for place in others[:share]]
        pictures += _pictures(block, np.array(firsts, int))
    if not pictures:
        raise UsageError(f"set {name} has no evaluation images", hint="--image FILE")
    return pictures


def _pictures(block: DataBlock, rows: Ints, *, forgotten: bool = False) -> list[AskedImage]:
    return [
        AskedImage(block.keys[row], Image.fromarray(pixels), forgotten)
        for row, pixels in zip(rows.tolist(), block.take(rows), strict=True)
    ]


def _opened(path: Path) -> AskedImage:
    try:
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            return AskedImage(path.name, image.convert("RGB"))
    except FileNotFoundError as error:
        raise MissingError(f"there is no image {path}") from error
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as an image: {error}") from error


def _write_answers(
    output: OutputFolder, record: Answers, pictures: Sequence[AskedImage], each: int
) -> None:
    """Write the picture and the page of answers, and last the record."""
    title = f"Forgetting {record.concept}: {Path(record.target).name}"
    groups = [
        AnsweredImage(
            png_bytes(picture.image),
            picture.forgotten,
            record.answers[place * each : (place + 1) * each],
        )
        for place, picture in enumerate(pictures)
    ]
    output.begin()
    output.write("answers.png", answers_png(title, groups))
    output.write("answers.html", answers_html(title, groups).encode())
    output.finish(record)
