"""Build a set: forget and retain rows drawn from sources, and what to measure on.

Every block of rows stands on its own and is shared between sets that ask for the same
one. The manifest is written last, so a set that can be read is a set that is whole.
"""

import difflib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

from slsgu_cli import __version__, models
from slsgu_cli.console import Console
from slsgu_cli.errors import InputError, UsageError
from slsgu_cli.evalsets import EvalPlan, build_eval, plan_eval
from slsgu_cli.layout import check_name, manifest_path
from slsgu_cli.matching import matcher
from slsgu_cli.pairs import TAKE, Rule, Tally, build_pairs, first_pass
from slsgu_cli.preprocess import decoder
from slsgu_cli.records import DataRef, ModelSpec, SetManifest
from slsgu_cli.replay import build_command
from slsgu_cli.samples import Columns
from slsgu_cli.sources import open_sources
from slsgu_cli.store import Store
from slsgu_cli.workshop import Workshop, counted

RETAIN_SAMPLES = 8000
MATCHES_CONCEPT = "about the concept"
EXCLUDED = "excluded"


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """What `build-sets` is asked for.

    Sources are in the grammar of `sources.parse_source`. `match` defaults to the concept
    itself, `retain_sources` to `sources`. `evals`, `classes` and `templates` go by the
    evaluation set's name; `forget_eval` names the set that has the concept as a class.
    """

    name: str
    concept: str
    model: ModelSpec
    sources: Sequence[str]
    match: Sequence[str] = ()
    not_match: Sequence[str] = ()
    regex: bool = False
    max_forget: int | None = None
    retain_sources: Sequence[str] = ()
    retain_samples: int = RETAIN_SAMPLES
    retain_exclude: Sequence[str] = ()
    evals: dict[str, str] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)
    templates: dict[str, str] = field(default_factory=dict)
    forget_eval: str | None = None
    image_column: str | None = None
    caption_column: str | None = None
    label_column: str | None = None
    seed: int = 0

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns that make a caption one of the forget set."""
        return tuple(self.match) or (self.concept,)


def build_sets(store: Store, request: BuildRequest, *, console: Console) -> SetManifest:
    """Build the set that `request` describes and return its manifest.

    Blocks that stand in the store for the same recipe are used again. Raises UsageError,
    MissingError or InputError, and then leaves no manifest behind.
    """
    _check(request)
    resolved = models.resolve(request.model)
    spec = models.input_spec(resolved)
    shop = Workshop(store, console, spec, decoder(spec), models.tokenizer(resolved))
    with warnings.catch_warnings():
        # PIL warns of every odd image; what cannot be used is counted instead.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        forget_tally, retain_tally, plans = _first_passes(shop, request)
        forget_eval = _forget_eval(request, plans, console)
        forget, block = build_pairs(shop, forget_tally, seed=request.seed)
        avoid = frozenset(row.tobytes() for row in block.source_digests)
        retain, _ = build_pairs(shop, retain_tally, seed=request.seed, avoid=avoid)
        evals = {plan.name: build_eval(shop, plan) for plan in plans}
    _tell(console, request, {"forget": forget, "retain": retain, **evals})
    manifest = SetManifest(
        name=request.name,
        concept=request.concept,
        patterns=request.patterns,
        model=request.model,
        input=spec,
        forget=forget,
        retain=retain,
        evals=evals,
        forget_eval=forget_eval,
        seed=request.seed,
        command=tuple(build_command(request)),
        version=__version__,
    )
    store.write_record(manifest_path(request.name), manifest)
    return manifest


def _check(request: BuildRequest) -> None:
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


def _first_passes(shop: Workshop, request: BuildRequest) -> tuple[Tally, Tally, list[EvalPlan]]:
    """Open every source and read captions and labels, so that mistakes show before the work."""
    columns = Columns(
        image=request.image_column,
        caption=request.caption_column,
        needs=frozenset(["caption"]),
    )
    labelled = Columns(
        image=request.image_column, label=request.label_column, needs=frozenset(["label"])
    )
    readers = open_sources(request.sources, columns)
    retain_sources = request.retain_sources or request.sources
    shared = list(retain_sources) == list(request.sources)
    retain_readers = readers if shared else open_sources(retain_sources, columns)
    eval_readers = {
        name: open_sources([source], labelled) for name, source in request.evals.items()
    }
    rules = _rules(request)
    forget = Tally("forget", rules[0], request.max_forget, request.sources, readers)
    retain = Tally("retain", rules[1], request.retain_samples, retain_sources, retain_readers)
    first_pass(shop, readers, [forget, retain] if shared else [forget], request.seed)
    _require_rows(forget, request)
    if not shared:
        first_pass(shop, retain_readers, [retain], request.seed)
    _require_rows(retain, request)
    plans = [
        plan_eval(
            shop,
            name,
            source=source,
            readers=eval_readers[name],
            classes=request.classes.get(name),
            templates=request.templates.get(name),
            columns=labelled,
        )
        for name, source in request.evals.items()
    ]
    return forget, retain, plans


def _rules(request: BuildRequest) -> tuple[Rule, Rule]:
    """Return which captions the forget set and the retain set take."""
    about = matcher(request.patterns, regex=request.regex and bool(request.match))
    excluded = matcher(request.not_match, regex=request.regex)
    not_retained = matcher(request.retain_exclude, regex=request.regex)

    def forget(caption: str) -> str | None:
        if not about(caption):
            return None
        return EXCLUDED if excluded(caption) else TAKE

    def retain(caption: str) -> str | None:
        if about(caption):
            return MATCHES_CONCEPT
        return EXCLUDED if excluded(caption) or not_retained(caption) else TAKE

    return forget, retain


def _require_rows(tally: Tally, request: BuildRequest) -> None:
    if tally.draw.offered:
        return
    sources = ", ".join(tally.sources)
    left_out = f" ({counted(tally.refused)})" if any(tally.refused.values()) else ""
    seen = f"{tally.captions} captions in {tally.seen} rows of {sources}{left_out}"
    if tally.role == "retain":
        raise InputError(
            f"no row is left for the retain set: {seen}",
            hint="name a source of other captions with --retain-source",
        )
    patterns = ", ".join(repr(pattern) for pattern in request.patterns)
    examples = ", ".join(repr(caption[:60]) for caption in tally.examples)
    hint = f"captions read like {examples}; " if examples else ""
    raise InputError(
        f"the forget set is empty: nothing matches {patterns} among {seen}",
        hint=f"{hint}change --match, or use --regex to match parts of words",
    )


def _forget_eval(request: BuildRequest, plans: Sequence[EvalPlan], console: Console) -> str | None:
    """Return the evaluation set that has rows of the concept. Raises InputError."""
    asked = request.forget_eval
    for plan in plans:
        if asked not in (None, plan.name):
            continue
        rows = plan.rows_of(request.concept)
        if rows:
            return plan.name
        if asked is not None:
            near = difflib.get_close_matches(request.concept, plan.class_names, 3, 0.5)
            what = "no rows of the class" if rows == 0 else "no class"
            raise InputError(
                f"evaluation set {asked} has {what} {request.concept!r}"
                + (f"; near: {', '.join(near)}" if near else ""),
                hint="name the concept with --concept as the evaluation set does",
            )
    if plans:
        console.note(
            f"no evaluation set has a class {request.concept!r}: "
            "forget accuracy will be measured on the forget set's own images"
        )
    return None


def _tell(console: Console, request: BuildRequest, refs: dict[str, DataRef]) -> None:
    """Show what was left out against the user's wish, and whether the retain set came out short."""
    silent = {MATCHES_CONCEPT, EXCLUDED}
    for name, ref in refs.items():
        left_out = {k: v for k, v in ref.refused.items() if k not in silent}
        if left_out:
            console.note(f"{name}: {ref.rows} rows kept, left out: {counted(left_out)}")
    if not request.evals:
        console.warn("there is no --eval: `search` and `eval` will have nothing to measure on")
    short = request.retain_samples - refs["retain"].rows
    if short > 0:
        console.warn(
            f"the retain set has {refs['retain'].rows} rows, {short} fewer than asked for: "
            "no more qualify"
        )
