"""`ask`: answers about images, before and after an edit."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

import slsgu_cli
from slsgu_cli import progress
from slsgu_cli.checkpoints.edits import edit_digests, load_edit
from slsgu_cli.clip.batches import Ints
from slsgu_cli.clip.evaluation import concept_rows, serving_rows
from slsgu_cli.errors import InputError, MissingError, UsageError
from slsgu_cli.figures.sheets import AnsweredImage, answers_html, answers_png
from slsgu_cli.records.sets import Split
from slsgu_cli.records.targets import Answer, Answers, AskRequest
from slsgu_cli.sources.prompts import find_class
from slsgu_cli.store.artifacts import Artifact, read_manifest, set_of
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.store import Store
from slsgu_cli.targets.models import Llava, Question, encoded, new_values
from slsgu_cli.targets.output_folder import OutputFolder


@dataclass(frozen=True, slots=True)
class AskedImage:
    """An image to ask about, its name, and whether it shows the concept."""

    name: str
    image: Image.Image
    forgotten: bool = False


def ask(store: Store, request: AskRequest) -> tuple[Answers, OutputFolder]:
    """Ask both models every question about every image, and draw their answers.

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
    answers = []
    with progress.bar("asking", 2 * len(questions)) as ticker:
        for new in ({}, values):
            with llava.encoder.edited(new):
                for answer in llava.answers(questions):
                    answers.append(answer)
                    ticker.advance()
    count = len(request.questions)
    names = [picture.name for picture in pictures for _ in request.questions]
    before, after = answers[: len(names)], answers[len(names) :]
    record = Answers(
        name=header.name,
        concept=header.concept,
        target=str(request.target),
        edits=edit_digests(edits),
        answers=tuple(
            Answer(name, question.text, original, edited)
            for name, question, original, edited in zip(
                names, questions, before, after, strict=True
            )
        ),
        version=slsgu_cli.__version__,
    )
    title = f"Forgetting {record.concept}: {request.target.name}"
    groups = [
        AnsweredImage(
            encoded(picture.image),
            picture.forgotten,
            record.answers[place * count : (place + 1) * count],
        )
        for place, picture in enumerate(pictures)
    ]
    output.begin()
    output.write("answers.png", answers_png(title, groups))
    output.write("answers.html", answers_html(title, groups).encode())
    output.finish(record)
    return record, output


def sample_pictures(store: Store, name: str, count: int) -> list[AskedImage]:
    """Return test images of a set's concept, and of its most common other classes.

    Raises UsageError if there is no such set.
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
