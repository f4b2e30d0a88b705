"""`build-sets`: one set, many sets, or a set again."""

import difflib
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from shlex import quote
from typing import Any

from slsgu_cli import __version__, progress
from slsgu_cli.clip import models, tokenizers
from slsgu_cli.clip.decoding import decoder
from slsgu_cli.clip.model_folder import require_weights
from slsgu_cli.errors import InputError, SlsguError, StaleError, UsageError, once
from slsgu_cli.records.codec import decode, digest, encode
from slsgu_cli.records.options import BuildRequest, MetadataSource
from slsgu_cli.records.sets import (
    CollectRequest,
    Concept,
    ConceptCounts,
    DataRef,
    ModelSpec,
    SetManifest,
    check_name,
    test_part,
)
from slsgu_cli.records.words import command_line
from slsgu_cli.sets.collection import FORGET, RETAIN, Collected, collect
from slsgu_cli.sets.context import BuildContext, counted, screen_for
from slsgu_cli.sets.evaluation_sets import (
    EvalPlan,
    build_eval,
    drop,
    label_columns,
    plan_eval,
    read_classes,
    read_templates,
)
from slsgu_cli.sets.metadata import EXCLUDED
from slsgu_cli.sets.pairs import (
    MATCHES_CONCEPT,
    Selection,
    Upstream,
    build_pairs,
    first_pass,
    rules,
    tokenized,
)
from slsgu_cli.sources.opening import open_sources
from slsgu_cli.sources.rows import Columns, Reader
from slsgu_cli.store.artifacts import Artifact, read_manifest
from slsgu_cli.store.store import Store


def _build_from_sources(
    store: Store, request: BuildRequest, upstream: Mapping[str, Upstream]
) -> SetManifest:
    """Build the set that `request` describes and return its manifest.

    Blocks that stand in the store for the same recipe are used again. `upstream` says what
    was left out of the sources before they came here, for `forget` and `retain`. Raises
    UsageError, MissingError or InputError, and then leaves no manifest behind.
    """
    check(request)
    resolved = models.resolve(request.model)
    require_weights(resolved)
    spec = tokenizers.input_spec(resolved)
    screen = screen_for(request.screening, resolved, spec)
    context = BuildContext(store, spec, decoder(spec), tokenizers.tokenizer(resolved), screen)
    with warnings.catch_warnings():
        # PIL warns of every odd image; what cannot be used is counted instead.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        opened = _open(request)
        _first_passes(opened, request, upstream)
        plans, tests = _plans(context, request, opened.evals)
        forget_eval = _forget_eval(request, plans)
        forget, block = build_pairs(context, opened.forget, seed=request.seed)
        avoid = frozenset(row.tobytes() for row in block.source_digests)
        retain, _ = build_pairs(context, opened.retain, seed=request.seed, avoid=avoid)
        parts = {"forget": forget, "retain": retain}
        parts |= {plan.name: build_eval(context, plan) for plan in plans}
        parts |= {test_part(plan.name): build_eval(context, plan) for plan in tests}
    # A row that a person took out may be none of those that there are now.
    parts |= {
        part: drop(store, parts[part], rows, strict=False)
        for part, rows in request.dropped.items()
        if part in parts
    }
    _tell(request, parts)
    manifest = SetManifest(
        name=request.name,
        concept=request.concept,
        patterns=request.patterns,
        model=request.model,
        input=spec,
        forget=parts["forget"],
        retain=parts["retain"],
        evals={plan.name: parts[plan.name] for plan in plans},
        forget_eval=forget_eval,
        seed=request.seed,
        command=tuple(build_command(request)),
        version=__version__,
        request=encode(request),
        test_fraction=request.test_fraction,
        tests={plan.name: parts[test_part(plan.name)] for plan in tests},
    )
    store.write_record(Artifact.SET.path(request.name), manifest)
    return manifest


@dataclass(frozen=True, slots=True)
class OpenedSources:
    """What a set is drawn from and measured on, opened; nothing is read yet."""

    forget: Selection
    retain: Selection
    evals: Mapping[str, Sequence[Reader]]


def _first_passes(
    opened: OpenedSources, request: BuildRequest, upstream: Mapping[str, Upstream]
) -> None:
    """Read the captions of the sources, so that mistakes show before the work."""
    forget, retain = opened.forget, opened.retain
    for selection in (forget, retain):
        if selection.role in upstream:
            selection.follow(upstream[selection.role])
    shared = retain.readers is forget.readers
    first_pass(forget.readers, [forget, retain] if shared else [forget], request.seed)
    _require_rows(forget, request)
    if not shared:
        first_pass(retain.readers, [retain], request.seed)
    _require_rows(retain, request)


def _open(request: BuildRequest) -> OpenedSources:
    """Open every source of a set. Raises UsageError, MissingError or InputError."""
    columns = Columns(
        image=request.image_column, caption=request.caption_column, needs=frozenset(["caption"])
    )
    readers = open_sources(request.sources, columns)
    retain_sources = request.retain_sources or request.sources
    shared = list(retain_sources) == list(request.sources)
    retain_readers = readers if shared else open_sources(retain_sources, columns)
    labelled = label_columns(request)
    evals = {name: open_sources([source], labelled) for name, source in request.evals.items()}
    forget, retain = rules(request)
    return OpenedSources(
        Selection("forget", forget, request.max_forget, request.sources, readers),
        Selection("retain", retain, request.retain_samples, retain_sources, retain_readers),
        evals,
    )


def _plans(
    context: BuildContext, request: BuildRequest, readers: Mapping[str, Sequence[Reader]]
) -> tuple[list[EvalPlan], list[EvalPlan]]:
    """Read the labels of the rows that layers and steps are chosen by, and reported on if others.

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


def _require_rows(selection: Selection, request: BuildRequest) -> None:
    if selection.draw.offered:
        return
    sources = ", ".join(selection.sources)
    left_out = f" ({counted(selection.refused)})" if any(selection.refused.values()) else ""
    seen = f"{selection.captions} captions in {selection.seen} rows of {sources}{left_out}"
    if selection.role == "retain":
        raise InputError(
            f"no row is left for the retain set: {seen}",
            hint="name a source of other captions with --retain-source; a sweep over all classes "
            "that there are deals them with --folds",
        )
    patterns = ", ".join(repr(pattern) for pattern in request.patterns)
    examples = ", ".join(repr(caption[:60]) for caption in selection.examples)
    hint = f"captions read like {examples}; " if examples else ""
    raise InputError(
        f"the forget set is empty: nothing matches {patterns} among {seen}",
        hint=f"{hint}change --match, or use --regex to match parts of words",
    )


def _forget_eval(request: BuildRequest, plans: Sequence[EvalPlan]) -> str | None:
    """Return the evaluation set that has rows of the concept. Raises InputError."""
    wanted = request.forget_eval
    for plan in plans:
        if wanted not in (None, plan.name):
            continue
        rows = plan.rows_of(request.concept)
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


def _tell(request: BuildRequest, refs: dict[str, DataRef]) -> None:
    """Show what was left out against the user's wish, and whether the retain set came out short."""
    silent = {MATCHES_CONCEPT, EXCLUDED}
    for name, ref in refs.items():
        left_out = {k: v for k, v in ref.refused.items() if k not in silent}
        if left_out:
            progress.note(f"{name}: {ref.rows} rows kept, left out: {counted(left_out)}")
    if not request.evals:
        progress.warn("there is no --eval: `search` and `eval` will have nothing to measure on")
    short = request.retain_samples - refs["retain"].rows
    if short > 0:
        progress.warn(
            f"the retain set has {refs['retain'].rows} rows, {short} fewer than asked for: "
            "no more qualify"
        )


class Preview:
    """What building several sets would end with, by their captions and labels.

    No image is read. Captions of a source are read once for all the sets, and labels of an
    evaluation set once for all that are measured on it.
    """

    def __init__(self, store: Store, requests: Sequence[BuildRequest]) -> None:
        self._store, self._requests = store, requests
        self._contexts: dict[ModelSpec, BuildContext] = {}
        self._evals: dict[Any, tuple[list[EvalPlan], list[EvalPlan]] | SlsguError] = {}

    def errors(self) -> dict[str, SlsguError]:
        """Return what stands in the way of sets, by their names, of those that cannot be built."""
        errors: dict[str, SlsguError] = {}
        opened: dict[str, OpenedSources] = {}
        for request in self._requests:
            with _collecting(errors, request.name):
                check(request)
                self._context(request.model)
                opened[request.name] = _open(request)
        both = [each for sources in opened.values() for each in (sources.forget, sources.retain)]
        found = iter(first_rows(both))
        for request in self._requests:
            if request.name in opened:
                with _collecting(errors, request.name):
                    self._require(request, opened[request.name], [next(found), next(found)])
        return errors

    def _context(self, model: ModelSpec) -> BuildContext:
        if model not in self._contexts:
            resolved = models.resolve(model)
            spec = tokenizers.input_spec(resolved)
            tokenize = tokenizers.tokenizer(resolved)
            self._contexts[model] = BuildContext(self._store, spec, decoder(spec), tokenize)
        return self._contexts[model]

    def _require(
        self, request: BuildRequest, sources: OpenedSources, found: Sequence[Selection | SlsguError]
    ) -> None:
        """Raise what building a set would end with. Raises UsageError, MissingError, InputError."""
        for selection in found:
            if isinstance(selection, SlsguError):
                raise selection
            _require_rows(selection, request)
        named = (request.evals, request.tests, request.classes, request.templates)
        key = (
            request.model,
            request.image_column,
            request.label_column,
            *(tuple(each.items()) for each in named),
        )
        context = self._context(request.model)
        plans, tests = once(self._evals, key, lambda: _plans(context, request, sources.evals))
        for plan in [*plans, *tests]:
            if plan.block is None and not plan.rows:
                raise InputError(
                    f"no row is left for the evaluation set {plan.name}: {counted(plan.refused)}",
                    hint="name its classes as its labels do",
                )
        _forget_eval(request, plans)


@contextmanager
def _collecting(errors: dict[str, SlsguError], name: str) -> Iterator[None]:
    """Keep an error under a name instead of raising it."""
    try:
        yield
    except SlsguError as error:
        errors[name] = error


def first_rows(selections: Sequence[Selection]) -> list[Selection | SlsguError]:
    """Look for a row of each selection; files are read once for all selections of them.

    Return each with what it counted: until its first row, or as `first_pass` does where it has
    none; or what reading its files raises.
    """
    together: dict[Any, list[int]] = {}
    for place, selection in enumerate(selections):
        files = tuple(map(file_key, selection.readers))
        together.setdefault(files, []).append(place)
    looked: dict[int, Selection | SlsguError] = {}
    with progress.bar("reading captions", None) as ticker:
        for places in together.values():
            found = _found_rows([selections[place] for place in places], ticker)
            looked |= zip(places, found, strict=True)
    return [looked[place] for place in range(len(selections))]


def file_key(reader: Any) -> tuple[Any, ...]:
    """Return what is the same for readers of one file, but for the values they filter by."""
    others = (getattr(reader, each.name) for each in fields(reader) if each.name != "filters")
    return type(reader), *others, *sorted(reader.filters)


def _found_rows(
    selections: Sequence[Selection], ticker: progress.Ticker
) -> list[Selection | SlsguError]:
    """Do what `first_rows` does for selections of the same files."""
    looking = [replace(each, refused=Counter(each.refused), examples=[]) for each in selections]
    trouble: Counter[str] = Counter()
    try:
        for number in range(len(selections[0].readers)):
            _look(looking, number, trouble, ticker)
    except SlsguError as error:
        if len(selections) == 1:
            return [error]
        # It may be of one of them: each is told what is wrong with its own rows.
        return [found for each in selections for found in _found_rows([each], ticker)]
    for selection in looking:
        selection.refused.update(trouble)
    return [*looking]


def _look(
    selections: Sequence[Selection], number: int, trouble: Counter[str], ticker: progress.Ticker
) -> None:
    """Read file `number` of the selections for those that have no row yet."""
    reader = selections[0].readers[number]
    waiting: dict[Any, list[Selection]] = {}
    for selection in selections:
        filters = tuple(selection.readers[number].filters.items())
        waiting.setdefault(filters, []).extend([] if selection.draw.offered else [selection])
    by_place = [*waiting.values()]
    for row, passed in reader.rows_passing([dict(filters) for filters in waiting], trouble):
        ticker.advance()
        left = [place for place in passed if by_place[place]]
        caption, odd = tokenized(reader, row) if left else ("", False)
        for place in left:
            for selection in by_place[place]:
                selection.consider(number, row, caption, odd=odd, seed=0)
            by_place[place] = [each for each in by_place[place] if not each.draw.offered]


def made_from(request: BuildRequest, identities: dict[Any, Any]) -> str:
    """Return a digest of the files that a set is built from, and of its classes and prompts.

    Files that are in `identities` are not looked at again; others are put there. Raises
    MissingError or InputError where they cannot be read.
    """
    columns = Columns(
        image=request.image_column, caption=request.caption_column, label=request.label_column
    )
    named = {*request.sources, *request.retain_sources}
    named |= {*request.evals.values(), *request.tests.values()}
    classes = {name: encode(read_classes(text)) for name, text in request.classes.items()}
    prompts = {name: list(read_templates(text)) for name, text in request.templates.items()}
    files = []
    for reader in open_sources(sorted(named), columns):
        key = file_key(reader)
        if key not in identities:
            identities[key] = reader.identity()
        files.append(identities[key])
    return digest([digest(files), classes, prompts])


def build_sets(store: Store, request: BuildRequest) -> SetManifest:
    """Build the set, from a collection if the request asks for one."""
    if request.collect is None:
        return _build_from_sources(store, request, {})
    collected = collect(store, request.collect)
    record = collected.record
    counts = record.concepts[request.name]
    if not counts.shards:
        raise _nothing(request, collected, counts)
    of_collection = replace(request, sources=_shards(store, collected, counts, FORGET))
    upstream = {"forget": Upstream(record.seen, {**record.refused, **counts.refused})}
    if request.collect.retain_samples:
        if not record.retain.shards:
            raise InputError(
                f"no row to retain was had from {record.files} files",
                hint="name other rows with --retain-source",
            )
        retained = _shards(store, collected, record.retain, RETAIN)
        of_collection = replace(of_collection, retain_sources=retained)
        upstream["retain"] = Upstream(record.seen, {**record.refused, **record.retain.refused})
    return _build_from_sources(store, of_collection, upstream)


def build_many(
    store: Store, request: BuildRequest, concepts: Sequence[Concept]
) -> tuple[list[SetManifest], list[str]]:
    """Build a set for each concept from one collection; return them, and names without one.

    A concept that nothing is found of does not stop the others.
    """
    built, failed = [], []
    for concept in concepts:
        single = replace(
            request,
            name=concept.name,
            concept=concept.name,
            match=concept.patterns,
            not_match=concept.excluded,
        )
        try:
            built.append(build_sets(store, single))
        except InputError as error:
            failed.append(concept.name)
            progress.warn(f"{concept.name}: {error.message}")
    return built, failed


def require_all(failed: Sequence[str]) -> None:
    """Raise InputError naming the concepts that no set was built for."""
    if failed:
        raise InputError(
            f"no set was built for {len(failed)} of the names: {', '.join(failed)}",
            hint="the warnings above say why; correct their patterns",
        )


def _shards(store: Store, collected: Collected, counts: ConceptCounts, role: str) -> list[str]:
    """Return the sources that hold a concept's samples, or those to retain.

    Raises InputError where one is not what its digest was made of.
    """
    for shard in counts.shards:
        # Collections of earlier versions have none.
        if digest := collected.record.digests.get(shard):
            store.require_digest(f"{collected.folder}/{shard}", digest)
    places = [store.where(f"{collected.folder}/{shard}") for shard in counts.shards]
    return [f"{place}?role={role}" for place in places]


def _nothing(request: BuildRequest, collected: Collected, counts: ConceptCounts) -> SlsguError:
    record = collected.record
    patterns = ", ".join(repr(pattern) for pattern in request.patterns)
    if counts.found:
        why = ", ".join(f"{count} {what}" for what, count in counts.refused.items())
        return InputError(
            f"none of the {counts.found} images of {request.name} could be had: {why}",
            hint="look at the URLs, or try again later",
        )
    examples = ", ".join(repr(" ".join(text.split())[:60]) for text in record.examples)
    return InputError(
        f"the forget set is empty: nothing matches {patterns} among {record.seen} captions",
        hint=f"captions read like {examples}; change --match, or --caption-col",
    )


@dataclass(frozen=True, slots=True)
class Replayed:
    """A set that was built again, and by part whether its rows are those it had."""

    manifest: SetManifest
    same: dict[str, bool]


def replay(store: Store, name: str) -> Replayed:
    """Build the set `name` once more, rows dropped by hand included.

    Raises StaleError where the manifest does not say how.
    """
    before = read_manifest(store, name)
    if not before.request:
        raise StaleError(
            f"the manifest of {name} does not say how it was built",
            hint=f"run `slsgu build-sets {quote(name)}` with its sources",
        )
    request = decode(BuildRequest, before.request)
    request = replace(request, test_fraction=before.test_fraction)
    after = build_sets(store, request)
    had = {part: ref.fingerprint for part, ref in before.blocks().items()}
    has = {part: ref.fingerprint for part, ref in after.blocks().items()}
    return Replayed(after, {part: had.get(part) == has[part] for part in has})


def check(request: BuildRequest) -> None:
    """Raise UsageError for a request that contradicts itself."""
    check_name(request.name)
    if not request.concept.strip():
        raise UsageError("the concept to forget is blank")
    if not request.sources:
        raise UsageError("there is no source to build from", hint="name one with --source")
    for option, value in (
        ("--retain-samples", request.retain_samples),
        ("--max-forget", 1 if request.max_forget is None else request.max_forget),
    ):
        if value < 1:
            raise UsageError(f"{option} is {value}; it must be 1 or more")
    named = {
        "--classes": request.classes,
        "--templates": request.templates,
        "--test": request.tests,
        "--forget-eval": [] if request.forget_eval is None else [request.forget_eval],
    }
    for option, names in named.items():
        for name in names:
            if name not in request.evals:
                known = ", ".join(sorted(request.evals)) or "none"
                raise UsageError(
                    f"{option} speaks of an evaluation set {name}; there are: {known}",
                    hint=f"add --eval {name}=SOURCE",
                )


def with_collection(
    request: BuildRequest, concepts: Sequence[Concept], source: MetadataSource
) -> BuildRequest:
    """Return `request` with what it takes to collect its samples, where it does.

    Samples are collected from metadata, and from any source for several concepts at once;
    the sets of all of these have the same rows to retain. Raises UsageError.
    """
    if not source.metadata and not concepts:
        return request
    if source.metadata and request.sources:
        raise UsageError(
            "--metadata and --source cannot be read together",
            hint="other rows to retain are named with --retain-source",
        )
    if concepts and (request.match or request.not_match):
        raise UsageError("--names has patterns of its own", hint="put aliases into its lines")
    single = Concept(request.name, request.patterns, tuple(request.not_match))
    retained = () if request.retain_sources else tuple(request.retain_exclude)
    collected = CollectRequest(
        concepts=tuple(concepts) or (single,),
        regex=request.regex,
        metadata=tuple(source.metadata),
        sources=tuple(request.sources),
        url_column=source.url_column,
        caption_column=request.caption_column,
        image_column=request.image_column,
        retain_samples=0 if request.retain_sources else request.retain_samples,
        retain_exclude=retained,
        max_forget=request.max_forget,
        seed=request.seed,
        download=source.download,
    )
    return replace(request, sources=(), collect=collected)


# The options that a command line begins with; the others follow in their order.
FIRST = ("name", "model", "concept")


def build_command(request: BuildRequest) -> list[str]:
    """Return the words of the `build-sets` command that asks for the same.

    A set of a file of names, or with rows dropped by hand, is asked for by its manifest.
    """
    collect = request.collect
    if request.dropped or (collect is not None and len(collect.concepts) > 1):
        return ["slsgu", "build-sets", request.name, "--replay"]
    first = [name for name in FIRST if name != "concept" or request.concept != request.name]
    words = ["slsgu", "build-sets", *command_line(request, fields=first)]
    if collect is None:
        words += command_line(request, fields=["sources"])
    else:
        source = MetadataSource(metadata=collect.metadata, url_column=collect.url_column)
        words += command_line(source, also=("url_column",))
    if collect is None or not collect.retain_samples:
        words += command_line(request, fields=["retain_sources"])
    rest = [each.name for each in fields(request)]
    said = {*FIRST, "sources", "retain_sources"}
    return words + command_line(request, fields=[name for name in rest if name not in said])
