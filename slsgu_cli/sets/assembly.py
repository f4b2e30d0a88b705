"""One set from its sources: forget and retain rows, evaluation rows, the manifest."""

import difflib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from slsgu_cli import __version__, progress
from slsgu_cli.clip import models, tokenizers
from slsgu_cli.clip.decoding import decoder
from slsgu_cli.clip.model_folder import require_weights
from slsgu_cli.errors import InputError
from slsgu_cli.records.codec import encode
from slsgu_cli.records.options import BuildRequest
from slsgu_cli.records.sets import PROMPTS, DataRef, SetManifest, test_part
from slsgu_cli.sets.context import BuildContext, counted
from slsgu_cli.sets.dropped_rows import drop
from slsgu_cli.sets.evaluation_sets import EvalPlan, build_eval, label_columns, plan_eval
from slsgu_cli.sets.pair_filter import pair_filter
from slsgu_cli.sets.pairs import (
    MATCHES_CONCEPT,
    Selection,
    Upstream,
    build_pairs,
    first_pass,
    rules,
)
from slsgu_cli.sets.requests import build_command, check
from slsgu_cli.sets.scan import EXCLUDED
from slsgu_cli.sets.words import WordParts
from slsgu_cli.sources.opening import open_sources
from slsgu_cli.sources.reader import Columns, Reader
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.store import Store


def build_from_sources(
    store: Store,
    request: BuildRequest,
    upstream: Mapping[str, Upstream],
    *,
    original: BuildRequest,
) -> SetManifest:
    """Build the set that `request` describes and return its manifest.

    The manifest records the `original` request, whose samples may have been collected into the
    sources of `request`; `upstream` counts the rows that this collection refused, for `forget`
    and `retain`. Blocks in the store with the same recipe are reused. Raises UsageError,
    MissingError or InputError without writing a manifest.
    """
    check(request)
    resolved = models.resolve(request.model)
    require_weights(resolved)
    spec = tokenizers.input_spec(resolved)
    pairs = pair_filter(request.screening, resolved, spec)
    context = BuildContext(store, spec, decoder(spec), tokenizers.tokenizer(resolved), pairs)
    with warnings.catch_warnings():
        # PIL warns about every odd image; unusable images are counted instead.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        opened = open_request(request)
        words_alone = bool(request.words and not request.sources)
        if not words_alone:
            _first_passes(opened, request, upstream)
        plans, tests = plan_evals(context, request, opened.evals)
        forget_eval = find_forget_eval(request, plans)
        if words_alone:
            retained = opened.retain if request.retain_sources else None
            parts = WordParts(context, resolved, request, retained).build()
        else:
            parts = _pairs(context, opened, request.seed)
        parts |= {plan.name: build_eval(context, plan) for plan in plans}
        parts |= {test_part(plan.name): build_eval(context, plan) for plan in tests}
    # A dropped row may no longer be in the sample.
    parts |= {
        part: drop(store, parts[part], rows, strict=False)
        for part, rows in request.dropped.items()
        if part in parts
    }
    if PROMPTS in parts:
        forget_eval = PROMPTS
    _report(request, parts)
    manifest = SetManifest(
        name=request.name,
        concept=request.concept,
        patterns=request.patterns,
        model=request.model,
        input=spec,
        forget=parts["forget"],
        retain=parts["retain"],
        evals={n: parts[n] for n in (PROMPTS, *request.evals) if n in parts},
        forget_eval=forget_eval,
        seed=request.seed,
        command=tuple(build_command(original)),
        version=__version__,
        request=encode(original),
        test_fraction=request.test_fraction,
        tests={plan.name: parts[test_part(plan.name)] for plan in tests},
        words=request.word_list.names if request.words else (),
        thing=request.thing,
    )
    store.write_record(Artifact.SET.path(request.name), manifest)
    return manifest


def _pairs(context: BuildContext, opened: "OpenedSources", seed: int) -> dict[str, DataRef]:
    """Build the forget and retain rows of images and captions."""
    forget, block = build_pairs(context, opened.forget, seed=seed)
    avoid = frozenset(row.tobytes() for row in block.source_digests)
    retain, _ = build_pairs(context, opened.retain, seed=seed, avoid=avoid)
    return {"forget": forget, "retain": retain}


@dataclass(frozen=True, slots=True)
class OpenedSources:
    """The opened sources of a set's pairs and evaluation rows, not yet read."""

    forget: Selection
    retain: Selection
    evals: Mapping[str, Sequence[Reader]]


def _first_passes(
    opened: OpenedSources, request: BuildRequest, upstream: Mapping[str, Upstream]
) -> None:
    """Read the captions of the sources first, so that mistakes show early."""
    forget, retain = opened.forget, opened.retain
    for selection in (forget, retain):
        if selection.role in upstream:
            selection.follow(upstream[selection.role])
    shared = retain.readers is forget.readers
    first_pass(forget.readers, [forget, retain] if shared else [forget], request.seed)
    require_rows(forget, request)
    if not shared:
        first_pass(retain.readers, [retain], request.seed)
    require_rows(retain, request)


def open_request(request: BuildRequest) -> OpenedSources:
    """Open every source of a set. Raises UsageError, MissingError or InputError."""
    columns = Columns(
        image=request.image_column, caption=request.caption_column, needs=frozenset(["caption"])
    )
    readers = open_sources(request.sources, columns)
    retain_sources = request.retain_sources or request.sources
    shared = list(retain_sources) == list(request.sources)
    of_retain = replace(columns, images=bool(request.sources))
    retain_readers = readers if shared else open_sources(retain_sources, of_retain)
    labelled = label_columns(request)
    evals = {name: open_sources([source], labelled) for name, source in request.evals.items()}
    forget, retain = rules(request)
    return OpenedSources(
        Selection("forget", forget, request.max_forget, request.sources, readers),
        Selection(
            "retain",
            retain,
            request.retain_samples,
            retain_sources,
            retain_readers,
            needs_images=bool(request.sources),
        ),
        evals,
    )


def plan_evals(
    context: BuildContext, request: BuildRequest, readers: Mapping[str, Sequence[Reader]]
) -> tuple[list[EvalPlan], list[EvalPlan]]:
    """Read the labels of the evaluation rows, and of the test rows from other sources.

    Raises UsageError, MissingError or InputError.
    """
    plans = [
        plan_eval(context, request, name, source=source, readers=readers[name])
        for name, source in request.evals.items()
    ]
    tests = []
    for plan in plans:
        if plan.name in request.tests:
            source, among = request.tests[plan.name], plan.class_names
            others = open_sources([source], label_columns(request))
            tests.append(
                plan_eval(context, request, plan.name, source=source, readers=others, among=among)
            )
    return plans, tests


def require_rows(selection: Selection, request: BuildRequest) -> None:
    """Raise InputError if no row qualifies for the selection."""
    if selection.sample.offered:
        return
    sources = ", ".join(selection.sources)
    refused = f" ({counted(selection.refused)})" if any(selection.refused.values()) else ""
    seen = f"{selection.captions} captions in {selection.seen} rows of {sources}{refused}"
    if selection.role == "retain":
        raise InputError(
            f"the retain set has no rows: {seen}",
            hint="name a source of other captions with --retain-source; for a sweep over all "
            "classes, use --folds",
        )
    patterns = ", ".join(repr(pattern) for pattern in request.patterns)
    examples = ", ".join(repr(caption[:60]) for caption in selection.examples)
    hint = f"captions read like {examples}; " if examples else ""
    raise InputError(
        f"the forget set is empty: nothing matches {patterns} among {seen}",
        hint=f"{hint}change --match, or use --regex to match parts of words",
    )


def find_forget_eval(request: BuildRequest, plans: Sequence[EvalPlan]) -> str | None:
    """Return the evaluation set with rows of the concept. Raises InputError."""
    wanted = request.forget_eval
    names = request.word_list.names if request.words else (request.concept,)
    for plan in plans:
        if wanted not in (None, plan.name):
            continue
        counts = [plan.rows_of(name) for name in names]
        rows = None if set(counts) == {None} else sum(count or 0 for count in counts)
        if rows:
            return plan.name
        if wanted is not None:
            near = difflib.get_close_matches(request.concept, plan.class_names, 3, 0.5)
            what = "no rows of the class" if rows == 0 else "no class"
            raise InputError(
                f"evaluation set {wanted} has {what} {request.concept!r}"
                + (f"; near: {', '.join(near)}" if near else ""),
                hint="name the concept with --concept as the evaluation set does",
            )
    if plans:
        progress.note(
            f"no evaluation set has a class {request.concept!r}: "
            "forget accuracy will be measured on the forget set's own images"
        )
    return None


def _report(request: BuildRequest, refs: dict[str, DataRef]) -> None:
    """Report rows that were refused unexpectedly, and a retain set with too few rows."""
    expected = {MATCHES_CONCEPT, EXCLUDED}
    for name, ref in refs.items():
        refused = {k: v for k, v in ref.refused.items() if k not in expected}
        if refused:
            progress.note(f"{name}: {ref.rows} rows; refused: {counted(refused)}")
    if PROMPTS in refs:
        progress.note(
            "the set has no images: the vision tower stays as it is, and figures are of prompts, "
            "not of images (--eval NAME=SOURCE adds images to measure on)"
        )
    elif not request.evals:
        progress.warn("there is no --eval: `search` and `eval` will have no evaluation set")
    short = request.retain_samples - refs["retain"].rows
    if short > 0 and (request.sources or request.retain_sources):
        progress.warn(
            f"the retain set has {refs['retain'].rows} rows, {short} fewer than requested: "
            "no other rows qualify"
        )
