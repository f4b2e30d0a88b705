"""A dry run of building sets, which reads captions and labels only."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
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
from slsgu_cli.sources.opening import scan
from slsgu_cli.store.store import Store


class Preview:
    """A dry run of building several sets: find their errors from captions and labels alone.

    No image is read. The captions of a source are read once for all sets, and the labels of an
    evaluation set once for all sets that use it.
    """

    def __init__(self, store: Store, requests: Sequence[BuildRequest]) -> None:
        self._store, self._requests = store, requests
        self._contexts: dict[ModelSpec, BuildContext] = {}
        self._selections: dict[Any, list[Selection]] = {}
        self._searches: dict[Any, SlsguError | None] = {}
        self._evals: dict[Any, tuple[list[EvalPlan], list[EvalPlan]] | SlsguError] = {}

    def errors(self) -> dict[str, SlsguError]:
        """Return the errors of the sets that cannot be built, by name."""
        errors: dict[str, SlsguError] = {}
        opened: list[tuple[BuildRequest, OpenedSources]] = []
        for request in self._requests:
            with _collecting(errors, request.name):
                check(request)
                self._context(request.model)
                sources = open_request(request)
                opened.append((request, sources))
                for selection in (sources.forget, sources.retain):
                    key = _source_key(request, selection)
                    self._selections.setdefault(key, []).append(selection)
        for request, sources in opened:
            with _collecting(errors, request.name):
                self._require(request, sources)
        return errors

    def _context(self, model: ModelSpec) -> BuildContext:
        if model not in self._contexts:
            resolved = models.resolve(model)
            spec = tokenizers.input_spec(resolved)
            tokenize = tokenizers.tokenizer(resolved)
            self._contexts[model] = BuildContext(self._store, spec, decoder(spec), tokenize)
        return self._contexts[model]

    def _require(self, request: BuildRequest, sources: OpenedSources) -> None:
        """Raise the error that building the set would raise."""
        for selection in (sources.forget, sources.retain):
            key = _source_key(request, selection)
            once(self._searches, key, partial(find_first_rows, self._selections[key]))
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


def _source_key(request: BuildRequest, selection: Selection) -> Any:
    """Return a key that selections of the same rows share."""
    return tuple(selection.sources), request.image_column, request.caption_column


def find_first_rows(selections: Sequence[Selection]) -> None:
    """Read the captions of a source until each of its selections has a row."""
    skipped: Counter[str] = Counter()
    waiting = list(selections)
    with progress.bar("reading captions", None) as ticker:
        for number, row in scan(selections[0].readers, skipped):
            ticker.advance()
            caption, cleaned = tokenized(selections[0].readers[number], row)
            for selection in waiting:
                selection.consider(number, row, caption, cleaned=cleaned, seed=0)
            waiting = [each for each in waiting if not each.sample.offered]
            if not waiting:
                return
    for selection in waiting:
        selection.refused.update(skipped)
