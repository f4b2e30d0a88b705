"""A dry run of building sets, which reads captions and labels only."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from slsgu_cli import progress
from slsgu_cli.clip import models, tokenizers
from slsgu_cli.clip.decoding import decoder
from slsgu_cli.errors import InputError, SlsguError, once
from slsgu_cli.records.options import BuildRequest
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.sets.assembly import (
    OpenedSources,
    find_forget_eval,
    open_request,
    plan_evals,
    require_rows,
)
from slsgu_cli.sets.context import BuildContext, counted
from slsgu_cli.sets.evaluation_sets import EvalPlan
from slsgu_cli.sets.pairs import Selection, tokenized
from slsgu_cli.sets.requests import check
from slsgu_cli.sets.source_digest import file_key
from slsgu_cli.store.store import Store


class Preview:
    """A dry run of building several sets: find their errors from captions and labels alone.

    No image is read. The captions of a source are read once for all sets, and the labels of an
    evaluation set once for all sets that use it.
    """

    def __init__(self, store: Store, requests: Sequence[BuildRequest]) -> None:
        self._store, self._requests = store, requests
        self._contexts: dict[ModelSpec, BuildContext] = {}
        self._evals: dict[Any, tuple[list[EvalPlan], list[EvalPlan]] | SlsguError] = {}

    def errors(self) -> dict[str, SlsguError]:
        """Return the errors of the sets that cannot be built, by name."""
        errors: dict[str, SlsguError] = {}
        opened: dict[str, OpenedSources] = {}
        for request in self._requests:
            with _collecting(errors, request.name):
                check(request)
                self._context(request.model)
                opened[request.name] = open_request(request)
        both = [each for sources in opened.values() for each in (sources.forget, sources.retain)]
        selections = iter(first_rows(both))
        for request in self._requests:
            if request.name in opened:
                with _collecting(errors, request.name):
                    self._require(
                        request, opened[request.name], [next(selections), next(selections)]
                    )
        return errors

    def _context(self, model: ModelSpec) -> BuildContext:
        if model not in self._contexts:
            resolved = models.resolve(model)
            spec = tokenizers.input_spec(resolved)
            tokenize = tokenizers.tokenizer(resolved)
            self._contexts[model] = BuildContext(self._store, spec, decoder(spec), tokenize)
        return self._contexts[model]

    def _require(
        self,
        request: BuildRequest,
        sources: OpenedSources,
        selections: Sequence[Selection | SlsguError],
    ) -> None:
        """Raise the error that building the set would raise."""
        for selection in selections:
            if isinstance(selection, SlsguError):
                raise selection
            require_rows(selection, request)
        options = (request.evals, request.tests, request.classes, request.templates)
        key = (
            request.model,
            request.image_column,
            request.label_column,
            *(tuple(each.items()) for each in options),
        )
        context = self._context(request.model)
        plans, tests = once(self._evals, key, lambda: plan_evals(context, request, sources.evals))
        for plan in [*plans, *tests]:
            if plan.block is None and not plan.rows:
                raise InputError(
                    f"the evaluation set {plan.name} has no usable rows: {counted(plan.refused)}",
                    hint="use the same class names as its labels",
                )
        find_forget_eval(request, plans)


@contextmanager
def _collecting(errors: dict[str, SlsguError], name: str) -> Iterator[None]:
    """Store an error under a name instead of raising it."""
    try:
        yield
    except SlsguError as error:
        errors[name] = error


def first_rows(selections: Sequence[Selection]) -> list[Selection | SlsguError]:
    """Search for one row of each selection, reading each file once for all selections.

    Return the selections with their counts up to the first row (up to the end without a row),
    or the error of reading their files.
    """
    together: dict[Any, list[int]] = {}
    for place, selection in enumerate(selections):
        files = tuple(map(file_key, selection.readers))
        together.setdefault(files, []).append(place)
    results: dict[int, Selection | SlsguError] = {}
    with progress.bar("reading captions", None) as ticker:
        for places in together.values():
            searched = _search([selections[place] for place in places], ticker)
            results |= zip(places, searched, strict=True)
    return [results[place] for place in range(len(selections))]


def _search(
    selections: Sequence[Selection], ticker: progress.Ticker
) -> list[Selection | SlsguError]:
    """Search for one row of each selection, all of the same files."""
    copies = [replace(each, refused=Counter(each.refused), examples=[]) for each in selections]
    skipped: Counter[str] = Counter()
    try:
        for number in range(len(selections[0].readers)):
            _search_file(copies, number, skipped, ticker)
    except SlsguError as error:
        if len(selections) == 1:
            return [error]
        # The error may concern only one selection, so each is searched alone.
        return [result for each in selections for result in _search([each], ticker)]
    for selection in copies:
        selection.refused.update(skipped)
    return [*copies]


def _search_file(
    selections: Sequence[Selection], number: int, skipped: Counter[str], ticker: progress.Ticker
) -> None:
    """Read file `number` for the selections that have no row yet."""
    reader = selections[0].readers[number]
    waiting: dict[Any, list[Selection]] = {}
    for selection in selections:
        filters = tuple(selection.readers[number].filters.items())
        waiting.setdefault(filters, []).extend([] if selection.sample.offered else [selection])
    by_place = [*waiting.values()]
    for row, numbers in reader.rows_matching([dict(filters) for filters in waiting], skipped):
        ticker.advance()
        places = [place for place in numbers if by_place[place]]
        caption, cleaned = tokenized(reader, row) if places else ("", False)
        for place in places:
            for selection in by_place[place]:
                selection.consider(number, row, caption, cleaned=cleaned, seed=0)
            by_place[place] = [each for each in by_place[place] if not each.sample.offered]
