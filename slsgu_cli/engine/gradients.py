"""`grad`: the two gradients of a set, from the store or computed.

A gradient is addressed by the content that it was computed from, so the same call is a cache
hit, and concepts that share a retain set share its gradient. Partial sums are saved every half
minute, and the same call resumes from them after an interruption.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from shlex import quote
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

import slsgu_cli
from slsgu_cli import processes, progress
from slsgu_cli.clip.devices import pick_device
from slsgu_cli.clip.loading import load
from slsgu_cli.clip.models import ResolvedModel, fingerprint, resolve
from slsgu_cli.clip.tokenizers import input_spec, token_words, tokenizer
from slsgu_cli.engine.resumable import SavedSums
from slsgu_cli.errors import MissingError, StaleError, UsageError
from slsgu_cli.method.scores import norm
from slsgu_cli.records.codec import digest
from slsgu_cli.records.method import (
    GradientHeader,
    GradientPointer,
    ParameterNorm,
    SquaresHeader,
)
from slsgu_cli.records.options import PassOptions
from slsgu_cli.records.sets import DataRef, ModelSpec, SetManifest
from slsgu_cli.store.artifacts import TABLE, Artifact, read_manifest
from slsgu_cli.store.locks import held
from slsgu_cli.store.store import Store

if TYPE_CHECKING:
    from torch import nn

    from slsgu_cli.store.blocks import DataBlock


# Part of every gradient's address: a change in what is computed must change it.
REVISION = 1

# Extra passes over the forget set with prefixed captions.
AGAIN = 3


@dataclass(frozen=True, slots=True)
class Gradient:
    """One gradient of a set: its role, loss, model (by fingerprint), rows and address."""

    role: str
    loss: str
    model: str
    data: DataRef
    digest: str


@dataclass(frozen=True, slots=True)
class GradResult:
    """The gradients of a set, and which of them this call computed.

    `squared` names the roles whose squares were computed, None without squares.
    `seconds` is how long each pass of this call took.
    """

    pointer: GradientPointer
    headers: dict[str, GradientHeader]
    computed: tuple[str, ...]
    squared: tuple[str, ...] | None
    seconds: dict[str, float]


def compute_gradients(
    store: Store,
    name: str,
    *,
    model: ModelSpec | None = None,
    options: PassOptions = PassOptions(),
    squares: bool = False,
) -> GradResult:
    """Ensure the forget and retain gradients of set `name`, and squares, are in the store.

    Raises MissingError, InputError, and StaleError if the set was built for other inputs than
    the model takes.
    """
    manifest = read_manifest(store, name)
    if options.anchor is None:
        options = replace(options, anchor=manifest.thing)
    _check_anchor(manifest, options.anchor)
    spec = model or manifest.model
    resolved = resolve(spec)
    weights = fingerprint(resolved)
    if manifest.words_alone:
        _check_words(store, manifest, weights)
    gradients = _gradients(manifest, resolved, weights, options)
    kinds = [Artifact.GRADIENT, *([Artifact.SQUARES] if squares else [])]
    computed: dict[str, list[Artifact]] = {}
    seconds: dict[str, float] = {}
    module = None
    for gradient in gradients:
        label = f"{gradient.role} gradient {gradient.digest}"
        if not _missing(store, gradient, kinds):
            progress.note(f"{label}: in the store already")
            continue
        check_inputs(manifest, resolved)
        with held(store, Artifact.GRADIENT.path(gradient.digest), what=label):
            missing = _missing(store, gradient, kinds)
            if not missing:
                progress.note(f"{label}: another process computed it")
                continue
            for path in (kind.path(gradient.digest) for kind in missing):
                if store.exists(path):
                    progress.warn(f"{store.where(path)} is damaged or outdated; it is replaced")
            start = perf_counter()
            module = module or load(resolved, pick_device(options.device), warn=progress.warn)
            _compute(
                store, manifest, gradient, missing, model=resolved, module=module, options=options
            )
            computed[gradient.role] = missing
            seconds[gradient.role] = perf_counter() - start
    forget, retain = gradients
    pointer = GradientPointer(
        name=name,
        model=spec,
        model_fingerprint=weights,
        forget=forget.digest,
        retain=retain.digest,
        forget_data=forget.data.fingerprint,
        retain_data=retain.data.fingerprint,
        batch_size=options.batch_size,
        precision=options.precision,
        version=slsgu_cli.__version__,
        prefixes=tuple(options.prefixes),
        anchor=options.anchor,
    )
    store.write_record(Artifact.POINTER.path(name), pointer)
    headers = processes.from_first(
        lambda: {
            g.role: store.read_header(Artifact.GRADIENT.path(g.digest), GradientHeader)
            for g in gradients
        }
    )

    def roles(kind: Artifact) -> tuple[str, ...]:
        return tuple(role for role, kinds in computed.items() if kind in kinds)

    squared = roles(Artifact.SQUARES) if squares else None
    return GradResult(pointer, headers, roles(Artifact.GRADIENT), squared, seconds)


def _missing(store: Store, gradient: Gradient, kinds: Collection[Artifact]) -> list[Artifact]:
    """Return the results of one pass that are not in the store, or damaged."""
    return processes.from_first(
        lambda: [
            kind
            for kind in kinds
            if not store.stands(kind.path(gradient.digest), TABLE[kind].record)
        ]
    )


def _compute(
    store: Store,
    manifest: SetManifest,
    gradient: Gradient,
    kinds: Collection[Artifact],
    *,
    model: ResolvedModel,
    module: "nn.Module",
    options: PassOptions,
) -> None:
    """Compute and store a gradient, its squares, or both in one pass."""
    from slsgu_cli.engine.gradient_pass import GradientPass

    is_forget = gradient.role == "forget"
    prefixes, anchor = (options.prefixes, options.anchor) if is_forget else ((), None)
    block = open_pairs(store, manifest, gradient.role, prefixes, model, anchor=anchor)
    size, squares = min(options.batch_size, block.rows), Artifact.SQUARES in kinds
    run = GradientPass(
        module, gradient.loss, spec=manifest.input, options=replace(options, batch_size=size)
    )
    saved = SavedSums(store, gradient.digest, run.device, squares)
    means, mean_loss = run.run(block, f"{gradient.role} gradient", saved, squares=squares)
    about: dict[str, Any] = {
        "loss": gradient.loss,
        "batches": -(-block.rows // options.batch_size),
        "batch_size": options.batch_size,
        "rows": block.rows,
        "precision": options.precision,
        "version": slsgu_cli.__version__,
    }
    if squares:
        path = Artifact.SQUARES.path(gradient.digest)
        squares_header = SquaresHeader(gradient=gradient.digest, **about)
        store.write_tensors(path, means[1], squares_header, keep_first=True)
    if Artifact.GRADIENT in kinds:
        weights = {
            name: ParameterNorm(tuple(p.shape), norm(p.detach().cpu().numpy()))
            for name, p in run.parameters(block).items()
        }
        header = GradientHeader(
            sign="+grad",
            mean_loss=mean_loss,
            model=gradient.model,
            data=gradient.data.fingerprint,
            weights=weights,
            **about,
        )
        path = Artifact.GRADIENT.path(gradient.digest)
        store.write_tensors(path, means[0], header, keep_first=True)
    saved.remove()


def load_graded(pointer: GradientPointer, device: str) -> "tuple[ResolvedModel, nn.Module]":
    """Load the model that gradients belong to. Raises StaleError for other weights."""
    model = graded_model(pointer)
    return model, load(model, device)


def graded_model(pointer: GradientPointer) -> ResolvedModel:
    """Return the model that gradients belong to. Raises StaleError for other weights."""
    model = resolve(pointer.model)
    if fingerprint(model) != pointer.model_fingerprint:
        raise StaleError(
            f"{pointer.model} has other weights than when its gradients were computed",
            hint=f"run `{Artifact.POINTER.command(pointer.name)}`",
        )
    return model


def check_inputs(manifest: SetManifest, model: ResolvedModel) -> None:
    """Raise StaleError unless `model` takes its inputs as the set was built."""
    wanted = input_spec(model)
    if wanted == manifest.input:
        return
    fields = wanted.__dataclass_fields__
    first = next(f for f in fields if getattr(wanted, f) != getattr(manifest.input, f))
    raise StaleError(
        f"set {manifest.name} was built for {manifest.model}, and {model.spec} takes other "
        f"inputs: {first} {getattr(wanted, first)}, the set has {getattr(manifest.input, first)}",
        hint=f"run `slsgu build-sets {quote(manifest.name)} {model.spec.flags()} ...` "
        "with its sources",
    )


def _gradients(
    manifest: SetManifest, model: ResolvedModel, weights: str, options: PassOptions
) -> tuple[Gradient, Gradient]:
    """Return the forget and the retain gradient of a set, with their addresses."""
    retain_loss = "sigmoid" if model.config.get("init_logit_bias") is not None else "contrastive"

    def addressed(role: str, loss: str, data: DataRef) -> Gradient:
        made_from: dict[str, Any] = {
            "revision": REVISION,
            "model": weights,
            "data": data.fingerprint,
            "input": manifest.input,
            "loss": loss,
            "batch_size": options.batch_size,
            "precision": options.precision,
        }
        if role == "forget" and options.prefixes:
            made_from |= {"prefixes": list(options.prefixes), "again": AGAIN}
        if role == "forget" and options.anchor is not None:
            made_from |= {"anchor": options.anchor}
        return Gradient(role, loss, weights, data, digest(made_from))

    return (
        addressed("forget", "cosine" if options.anchor is None else "anchor", manifest.forget),
        addressed("retain", retain_loss, manifest.retain),
    )


def _check_anchor(manifest: SetManifest, anchor: str | None) -> None:
    """Raise UsageError if the name would become itself."""
    from slsgu_cli.sources.matching import matcher

    if anchor is not None and matcher(manifest.patterns)(anchor):
        raise UsageError(
            f"--to {anchor!r} contains the name to forget",
            hint=f"name something else that {manifest.concept} becomes, such as its kind",
        )


def _check_words(store: Store, manifest: SetManifest, weights: str) -> None:
    """Raise StaleError if rows of words were built for other weights than the model's."""
    from slsgu_cli.store.blocks import DataBlock

    for role in ("forget", "retain"):
        block = DataBlock.open(store, getattr(manifest, role))
        if block.attributes["model"] != weights:
            raise StaleError(
                f"the words of set {manifest.name} have features of other weights",
                hint=f"run `slsgu build-sets {quote(manifest.name)} ...` with this model",
            )


def adversarial_prefixes(store: Store, name: str) -> tuple[str, ...]:
    """Return the adversarial prefixes that `verify` found for the edit of set `name`.

    Every two of them are followed by a random prefix of as many one-token words, drawn by the
    set's seed. Raises MissingError if there are none.
    """
    from slsgu_cli.records.verification import Verification

    manifest = read_manifest(store, name)
    path = Artifact.VERIFICATION.path(name)
    tried = store.read_record(path, Verification).prefixes if store.exists(path) else ()
    if not tried:
        raise MissingError(
            f"no adversarial prefixes of {manifest.concept} are recorded for the edit of {name}",
            hint=f"run `slsgu verify {quote(name)} --checks prefix`",
        )
    words = [*token_words(resolve(manifest.model)).values()]
    generator = np.random.default_rng(manifest.seed)
    prefixes: list[str] = []
    for place in range(0, len(tried), 2):
        drawn = generator.choice(words, len(tried[place].split()))
        prefixes += [*tried[place : place + 2], " ".join(drawn)]
    return tuple(prefixes)


def open_pairs(
    store: Store,
    manifest: SetManifest,
    role: str,
    prefixes: Sequence[str],
    model: ResolvedModel,
    *,
    again: int = AGAIN,
    anchor: str | None = None,
) -> "DataBlock":
    """Open the pairs of a role, and repeat them `again` times with prefixed captions.

    With an `anchor`, each caption is to become the same with the anchor in place of the name.

    The forget gradient uses them like the random prefixes of ROME (arXiv 2202.05262). The
    covariances use them so that the edit does not change the prefixes themselves.
    """
    from slsgu_cli.sources.matching import before_names, in_place_of_names
    from slsgu_cli.store.blocks import DataBlock, RepeatedBlock

    block = DataBlock.open(store, getattr(manifest, role))
    if not prefixes and anchor is None:
        return block
    tokenize = tokenizer(model)
    others = [
        caption
        for time in range(again if prefixes else 0)
        for caption in before_names(block.captions, manifest.patterns, prefixes, shift=time)
    ]
    becoming = None
    if anchor is not None:
        captions = in_place_of_names([*block.captions, *others], manifest.patterns, anchor)
        becoming = tokenize(captions)
    return RepeatedBlock.of(block, tokenize(others) if others else block.tokens[:0], becoming)
