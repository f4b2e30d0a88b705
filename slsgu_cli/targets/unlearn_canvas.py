"""Answer sets of the UnlearnCanvas benchmark, and their figures by a judge."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import slsgu_cli
from slsgu_cli import progress
from slsgu_cli.checkpoints.edits import edit_digests, load_edit, warn_of_other_encoders
from slsgu_cli.errors import UsageError
from slsgu_cli.records.codec import digest
from slsgu_cli.records.figures import Share
from slsgu_cli.records.targets import AnswerSet, CanvasRequest
from slsgu_cli.sources.prompts import find_class, read_classes
from slsgu_cli.store.store import Store
from slsgu_cli.targets.judge import Judge, judge_specs
from slsgu_cli.targets.models import ImageJob, Pipeline, encoded, new_values, unfinished

# The prompt of the benchmark, and the judge's templates for its classes.
PROMPT = "A {object} image in {theme} style."
THEME_TEMPLATES = ("an image in {} style", "{} style")
OBJECT_TEMPLATES = ("an image of a {}", "a {}", "{}")
RECORD = "answer-set.json"


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
    request = replace(request, judges=judge_specs(store, request.names[0], request.judges))
    edits = [load_edit(store, name) for name in request.names]
    warn_of_other_encoders(edits)
    concept = edits[0].header.concept
    themes, objects = (_listed(name) for name in (request.themes, request.objects))
    of_theme, of_object = find_class(themes, concept), find_class(objects, concept)
    if (of_theme is None) == (of_object is None):
        what = "neither a theme nor an object" if of_theme is None else "a theme and an object"
        raise UsageError(f"{concept!r} is {what}", hint="--themes FILE, --objects FILE")
    place = Store(str(request.out))
    cells = [_Cell(*cell) for cell in itertools.product(themes, objects, request.seeds)]
    target = str(request.target)
    _begin(
        place,
        digest({"edits": edit_digests(edits), "target": target, "diffusion": request.diffusion}),
    )
    missing = unfinished(
        len(cells), request.diffusion.batch, lambda number: place.exists(cells[number].file)
    )
    if missing:
        pipe = Pipeline.load(request.target, device=request.device)
        values = new_values(pipe.encoders, edits)
        pipe.warn_of_readers(pipe.edited_names(values))
        left = sum(map(len, missing))
        with progress.bar("generating", left) as ticker, pipe.edited(values):
            for rows in missing:
                images = pipe.generate([cells[number].job for number in rows], request.diffusion)
                for number, image in zip(rows, images, strict=True):
                    place.write_bytes(cells[number].file, encoded(image, format="JPEG", quality=95))
                    ticker.advance()
    figures: Sequence[Share | None] = (None, None, None)
    if request.judges:
        prompted = themes[of_theme] if of_theme is not None else objects[of_object or 0]
        figures = _judged(place, request, cells, (themes, objects), prompted)
    ua, ira, cra = figures
    record = AnswerSet(
        name=edits[0].header.name,
        concept=concept,
        domain="theme" if of_theme is not None else "object",
        images=len(cells),
        judge=str(request.judges[0]) if request.judges else None,
        ua=ua,
        ira=ira,
        cra=cra,
        version=slsgu_cli.__version__,
    )
    place.write_record(RECORD, record)
    return record


def _listed(name: str) -> tuple[str, ...]:
    classes = read_classes(name)
    return classes.names if classes else ()


def _begin(place: Store, made_from: str) -> None:
    """Refuse to add to images of another edit; resume an interrupted run."""
    mark = ".made-from"
    if place.exists(mark) and place.read_bytes(mark).decode() != made_from:
        raise UsageError(
            f"{place.url} holds the answer set of another edit or other options",
            hint="another --out, or remove it",
        )
    place.write_bytes(mark, made_from.encode())


def _judged(
    place: Store,
    request: CanvasRequest,
    cells: Sequence[_Cell],
    domains: tuple[Sequence[str], Sequence[str]],
    forgotten: str,
) -> list[Share]:
    """Return UA, IRA and CRA."""
    (spec,) = request.judges
    images = [place.read_bytes(cell.file) for cell in cells]
    asked = [(cell.theme, cell.object) for cell in cells]
    hits = []
    for names, templates, truth in zip(
        domains, (THEME_TEMPLATES, OBJECT_TEMPLATES), zip(*asked, strict=True), strict=True
    ):
        judge = Judge.load(spec, dict.fromkeys(names, templates), device=request.device)
        hits.append([a == b for a, b in zip(judge.verdicts(images), truth, strict=True)])
    in_domain, cross = hits if forgotten in domains[0] else hits[::-1]
    shows = [forgotten in pair for pair in asked]
    gone = [not hit for hit, shown in zip(in_domain, shows, strict=True) if shown]
    in_domain_hits = [hit for hit, shown in zip(in_domain, shows, strict=True) if not shown]
    across = [hit for hit, shown in zip(cross, shows, strict=True) if not shown]
    return [Share(sum(part), len(part)) for part in (gone, in_domain_hits, across)]
