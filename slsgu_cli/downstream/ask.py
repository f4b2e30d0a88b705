"""What `slsgu ask` does: answers of a vision-language model before and after an edit."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

import slsgu_cli
from slsgu_cli import progress
from slsgu_cli.checkpoints.edits import load_edit
from slsgu_cli.downstream.generate import OutputFolder
from slsgu_cli.downstream.judge import png_bytes
from slsgu_cli.downstream.models import Llava, Question, new_values
from slsgu_cli.errors import InputError, MissingError, UsageError
from slsgu_cli.figures.sheets import AnsweredImage, answers_html, answers_png
from slsgu_cli.records.codec import digest
from slsgu_cli.records.target_options import AskRequest
from slsgu_cli.records.targets import Answer, Answers
from slsgu_cli.sources.classes import find_class
from slsgu_cli.store.artifacts import Artifact, read_manifest, set_of
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.store import Store


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
    said: list[list[str]] = []
    with progress.bar("asking", 2 * len(questions)) as ticker:
        for new in ({}, values):
            said.append([])
            with llava.encoder.edited(new):
                for answer in llava.answers(questions):
                    said[-1].append(answer)
                    ticker.advance()
    names = [picture.name for picture in pictures for _ in request.questions]
    record = Answers(
        name=header.name,
        concept=header.concept,
        target=str(request.target),
        edits={edit.header.name: digest(edit.header) for edit in edits},
        answers=tuple(
            Answer(name, question.text, before, after)
            for name, question, before, after in zip(names, questions, *said, strict=True)
        ),
        version=slsgu_cli.__version__,
    )
    _write(output, record, pictures, len(request.questions))
    return record, output


def sample_pictures(store: Store, name: str, count: int) -> list[AskedImage]:
    """Return evaluation images of a set: of its concept, and of its commonest other classes.

    Raises UsageError where there is no such set.
    """
    if not store.exists(Artifact.SET.path(name)):
        raise UsageError(f"the store has no set {name} to take images from", hint="--image FILE")
    manifest = read_manifest(store, name)
    pictures: list[AskedImage] = []
    for known, ref in sorted(manifest.evals.items()):
        block = DataBlock.open(store, ref)
        concept_class = find_class(block.class_names, manifest.concept)
        if known == manifest.forget_eval:
            rows = np.flatnonzero(block.labels == concept_class)[:count]
            pictures = [*_pictures(block, rows, forgotten=True), *pictures]
        common = np.argsort(-np.bincount(block.labels[block.labels >= 0]), kind="stable")
        others = [int(place) for place in common if place != concept_class]
        share = -(-count // len(manifest.evals))
        rows = np.array([np.flatnonzero(block.labels == place)[0] for place in others[:share]])
        pictures += _pictures(block, rows)
    if not pictures:
        raise UsageError(f"set {name} has no evaluation images", hint="--image FILE")
    return pictures


def _pictures(
    block: DataBlock,
    rows: "np.ndarray[tuple[int], np.dtype[np.integer]]",
    *,
    forgotten: bool = False,
) -> list[AskedImage]:
    if not rows.size:
        return []
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


def _write(
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
