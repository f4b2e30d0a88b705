"""Answer sets of the UnlearnCanvas benchmark, and their figures by a judge."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import slsgu_cli
from slsgu_cli.checkpoints.edits import edit_digests, load_edit, warn_of_other_encoders
from slsgu_cli.errors import UsageError
from slsgu_cli.records.codec import digest
from slsgu_cli.records.figures import Share
from slsgu_cli.records.targets import AnswerSet, CanvasRequest
from slsgu_cli.sources.prompts import find_class, read_classes
from slsgu_cli.store.store import Store
from slsgu_cli.targets.judge import Judge, called, judge_specs
from slsgu_cli.targets.models import ImageJob, Pipeline, encoded, new_values

# The prompt of the benchmark, and the judge's templates for its classes.
PROMPT = "A {object} image in {theme} style."
TEMPLATES = {
    "theme": ("an image in {} style", "{} style"),
    "object": ("an image of a {}", "a {}", "{}"),
}
RECORD = "answer-set.json"
# A digest of the inputs.
MADE_FROM = ".made-from"


@dataclass(frozen=True, slots=True)
class _Cell:
    theme: str
    object: str
    seed: int

    @property
    def file(self) -> str:
        return f"{self.theme}_{self.object}_seed{self.seed}.jpg".replace(" ", "_")

    @property
    def job(self) -> ImageJob:
        text = PROMPT.replace("{object}", self.object).replace("{theme}", self.theme)
        return ImageJob(text, self.seed)


def answer_set(store: Store, request: CanvasRequest) -> AnswerSet:
    """Generate the missing images of an answer set, and judge all of it.

    Raises MissingError, InputError, StaleError, and UsageError unless the concept is either
    a theme or an object.
    """
    if len(request.judges) > 1:
        raise UsageError("an answer set has one judge", hint="give --judge once")
    judges = judge_specs(store, request.names[0], request.judges)
    edits = [load_edit(store, name) for name in request.names]
    warn_of_other_encoders(edits)
    concept = edits[0].header.concept
    files = {"theme": request.themes, "object": request.objects}
    names = {
        kind: listed.names if (listed := read_classes(file)) else () for kind, file in files.items()
    }
    domains = [kind for kind, known in names.items() if find_class(known, concept) is not None]
    if len(domains) != 1:
        what = "a theme and an object" if domains else "neither a theme nor an object"
        raise UsageError(f"{concept!r} is {what}", hint="--themes FILE, --objects FILE")
    place = Store(str(request.out))
    made_from = {"edits": edit_digests(edits), "target": str(request.target)}
    _begin(place, digest({**made_from, "diffusion": request.diffusion}))
    cells = [
        _Cell(*cell) for cell in itertools.product(names["theme"], names["object"], request.seeds)
    ]
    done = [place.exists(cell.file) for cell in cells]
    if not all(done):
        pipe = Pipeline.load(request.target, device=request.device)
        values = new_values(pipe.encoders, edits)
        pipe.warn_of_readers(pipe.edited_names(values))
        jobs = [cell.job for cell in cells]
        with pipe.edited(values):
            for number, image in pipe.generate_missing(jobs, request.diffusion, done):
                place.write_bytes(cells[number].file, encoded(image, format="JPEG", quality=95))
    figures: Sequence[Share | None] = (None, None, None)
    if judges:
        images = [place.read_bytes(cell.file) for cell in cells]
        verdicts = {
            kind: Judge.load(
                judges[0], dict.fromkeys(names[kind], templates), device=request.device
            ).verdicts(images)
            for kind, templates in TEMPLATES.items()
        }
        figures = _figures(cells, verdicts, domains[0], called(concept, names[domains[0]]))
    ua, ira, cra = figures
    record = AnswerSet(
        name=edits[0].header.name,
        concept=concept,
        domain=domains[0],
        images=len(cells),
        judge=str(judges[0]) if judges else None,
        ua=ua,
        ira=ira,
        cra=cra,
        version=slsgu_cli.__version__,
    )
    place.write_record(RECORD, record)
    return record


def _begin(place: Store, made_from: str) -> None:
    """Refuse to add to images of another edit; resume an interrupted run."""
    if place.exists(MADE_FROM) and place.read_bytes(MADE_FROM).decode() != made_from:
        raise UsageError(
            f"{place.url} holds the answer set of another edit or other options",
            hint="another --out, or remove it",
        )
    place.write_bytes(MADE_FROM, made_from.encode())


def _figures(
    cells: Sequence[_Cell], verdicts: Mapping[str, Sequence[str]], domain: str, forgotten: str
) -> list[Share]:
    """Return UA, IRA and CRA."""
    (other,) = verdicts.keys() - {domain}
    gone, in_domain, across = [], [], []
    for number, cell in enumerate(cells):
        hits = {kind: each[number] == getattr(cell, kind) for kind, each in verdicts.items()}
        if getattr(cell, domain) == forgotten:
            gone.append(not hits[domain])
        else:
            in_domain.append(hits[domain])
            across.append(hits[other])
    return [Share(sum(part), len(part)) for part in (gone, in_domain, across)]
