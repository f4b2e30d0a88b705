"""`grad`: the two gradients of a set, from the store or computed.

A gradient is addressed by the content that it was computed from, so the same call is a cache
hit, and concepts that share a retain set share its gradient. Partial sums are saved every half
minute, and the same call resumes from them after an interruption.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
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
from slsgu_cli.errors import InputError, MissingError, StaleError
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
from slsgu_cli.store.artifacts import Artifact, read_manifest
from slsgu_cli.store.locks import held
from slsgu_cli.store.store import Store

if TYPE_CHECKING:
    from torch import nn

    from slsgu_cli.store.blocks import DataBlock


# Part of every gradient's address: a change in what is computed must change it.
REVISION = 1

# Extra passes over the forget set with prefixed captions.
AGAIN = 3

# The results that one pass can write: the mean gradient and the mean of its squares.
HEADERS: dict[Artifact, Any] = {
    Artifact.GRADIENT: GradientHeader,
    Artifact.SQUARES: SquaresHeader,
}


@dataclass(frozen=True, slots=True)
class Gradient:
    """One gradient of a set: its role, its loss, its rows and its address."""

    role: str
    loss: str
    data: DataRef
    digest: str

    @property
    def label(self) -> str:
        """The name of the gradient in messages."""
        return f"{self.role} gradient {self.digest}"


@dataclass(frozen=True, slots=True)
class GradResult:
    """The gradients of a set, and which of them this call computed.

    `squared` names the roles whose squares were computed, None without squares.
    `seconds` is how long each pass of this call took.
    """

    pointer: GradientPointer
    headers: dict[str, GradientHeader]
    computed: tuple[str, ...]
    squared: tuple[str, ...] | None = None
    seconds: dict[str, float] = field(default_factory=dict)


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
    resolved = resolve(model or manifest.model)
    model_fingerprint = fingerprint(resolved)
    gradients = _wanted(manifest, resolved, model_fingerprint, options)
    kinds = [kind for kind in HEADERS if squares or kind is Artifact.GRADIENT]
    missing = processes.from_first(
        lambda: {g.role: [kind for kind in kinds if not _stands(store, kind, g)] for g in gradients}
    )
    for gradient in gradients:
        if not missing[gradient.role]:
            progress.note(f"{gradient.label}: in the store already")
    wanted = [gradient for gradient in gradients if missing[gradient.role]]
    if wanted:
        check_inputs(manifest, resolved)

    @cache
    def job() -> _Job:
        device = pick_device(options.device)
        module = load(resolved, device, warn=progress.warn)
        return _Job(store, manifest, resolved, module, model_fingerprint, options)

    seconds = {}
    for gradient in wanted:
        with held(store, Artifact.GRADIENT.path(gradient.digest), what=gradient.label):
            # Another process may have computed it while this one waited.
            kinds_to_compute = missing[gradient.role] = [
                kind
                for kind in missing[gradient.role]
                if not processes.agreed(store.stands(kind.path(gradient.digest), HEADERS[kind]))
            ]
            if not kinds_to_compute:
                progress.note(f"{gradient.label}: another process computed it")
                continue
            start = perf_counter()
            job().compute(gradient, kinds_to_compute)
            seconds[gradient.role] = perf_counter() - start
    pointer = _pointer(name, model or manifest.model, model_fingerprint, gradients, options)
    store.write_record(Artifact.POINTER.path(name), pointer)
    headers = processes.from_first(
        lambda: {
            g.role: store.read_header(Artifact.GRADIENT.path(g.digest), GradientHeader)
            for g in gradients
        }
    )
    return GradResult(
        pointer,
        headers,
        computed=tuple(role for role, kinds in missing.items() if Artifact.GRADIENT in kinds),
        squared=tuple(role for role, kinds in missing.items() if Artifact.SQUARES in kinds)
        if squares
        else None,
        seconds=seconds,
    )


def _pointer(
    name: str,
    model: ModelSpec,
    model_fingerprint: str,
    gradients: tuple[Gradient, Gradient],
    options: PassOptions,
) -> GradientPointer:
    forget, retain = gradients
    return GradientPointer(
        name=name,
        model=model,
        model_fingerprint=model_fingerprint,
        forget=forget.digest,
        retain=retain.digest,
        forget_data=forget.data.fingerprint,
        retain_data=retain.data.fingerprint,
        batch_size=options.batch_size,
        precision=options.precision,
        version=slsgu_cli.__version__,
        prefixes=tuple(options.prefixes),
    )


def _stands(store: Store, kind: Artifact, gradient: Gradient) -> bool:
    """Return whether a file can be used; warn about a damaged one."""
    try:
        store.read_header(kind.path(gradient.digest), HEADERS[kind])
    except MissingError:
        return False
    except (InputError, StaleError) as error:
        progress.warn(f"{error.message}; it is computed again")
        return False
    return True


def load_graded(
    manifest: SetManifest, pointer: GradientPointer, device: str
) -> "tuple[ResolvedModel, nn.Module]":
    """Load the model that the gradients of a set belong to. Raises StaleError for another."""
    model = graded_model(pointer)
    check_inputs(manifest, model)
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
    differing = [f for f in fields if getattr(wanted, f) != getattr(manifest.input, f)]
    first = differing[0]
    raise StaleError(
        f"set {manifest.name} was built for {manifest.model}, and {model.spec} takes other "
        f"inputs: {first} {getattr(wanted, first)}, the set has {getattr(manifest.input, first)}",
        hint=f"run `slsgu build-sets {quote(manifest.name)} {model.spec.flags()} ...` "
        "with its sources",
    )


def _wanted(
    manifest: SetManifest, model: ResolvedModel, model_fingerprint: str, options: PassOptions
) -> tuple[Gradient, Gradient]:
    retain_loss = "sigmoid" if model.config.get("init_logit_bias") is not None else "contrastive"

    def address(role: str, loss: str, data: DataRef) -> Gradient:
        made_from: dict[str, Any] = {
            "revision": REVISION,
            "model": model_fingerprint,
            "data": data.fingerprint,
            "input": manifest.input,
            "loss": loss,
            "batch_size": options.batch_size,
            "precision": options.precision,
        }
        if role == "forget" and options.prefixes:
            made_from |= {"prefixes": list(options.prefixes), "again": AGAIN}
        return Gradient(role, loss, data, digest(made_from))

    return (
        address("forget", "cosine", manifest.forget),
        address("retain", retain_loss, manifest.retain),
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
) -> "DataBlock":
    """Open the pairs of a role, and repeat them `again` times with prefixed captions.

    The forget gradient uses them like the random prefixes of ROME (arXiv 2202.05262). The
    covariances use them so that the edit does not change the prefixes themselves.
    """
    from slsgu_cli.sources.matching import before_names
    from slsgu_cli.store.blocks import DataBlock, RepeatedBlock

    block = DataBlock.open(store, getattr(manifest, role))
    if not prefixes:
        return block
    captions = [
        caption
        for time in range(again)
        for caption in before_names(block.captions, manifest.patterns, prefixes, shift=time)
    ]
    return RepeatedBlock.of(block, tokenizer(model)(captions))


@dataclass(frozen=True, slots=True)
class _Job:
    """A loaded model and a set, to compute gradients from."""

    store: Store
    manifest: SetManifest
    model: ResolvedModel
    module: "nn.Module"
    model_fingerprint: str
    options: PassOptions

    def compute(self, gradient: Gradient, kinds: Collection[Artifact]) -> None:
        """Compute and store a gradient, its squares, or both in one pass."""
        from slsgu_cli.engine.gradient_pass import GradientPass

        prefixes = self.options.prefixes if gradient.role == "forget" else ()
        block = open_pairs(self.store, self.manifest, gradient.role, prefixes, self.model)
        size = min(self.options.batch_size, block.rows)
        run = GradientPass.prepare(
            self.module,
            gradient.loss,
            spec=self.manifest.input,
            options=replace(self.options, batch_size=size),
        )
        label = f"{gradient.role} gradient"
        squares = Artifact.SQUARES in kinds
        saved = SavedSums(self.store, gradient.digest, run.options.device, squares)
        if squares:
            arrays, squared, mean_loss = run.run_squared(block, label, saved)
            squares_header = self._squares_header(gradient, block.rows)
            path = Artifact.SQUARES.path(gradient.digest)
            self.store.write_tensors(path, squared, squares_header, keep_first=True)
        else:
            arrays, mean_loss = run.run(block, label, saved)
        if Artifact.GRADIENT in kinds:
            header = self._header(gradient, block.rows, mean_loss)
            path = Artifact.GRADIENT.path(gradient.digest)
            self.store.write_tensors(path, arrays, header, keep_first=True)
        saved.remove()

    def _header(self, gradient: Gradient, rows: int, mean_loss: float) -> GradientHeader:
        weights = {
            name: ParameterNorm(tuple(p.shape), norm(p.detach().cpu().numpy()))
            for name, p in self.module.named_parameters()
        }
        return GradientHeader(
            loss=gradient.loss,
            sign="+grad",
            mean_loss=mean_loss,
            batches=-(-rows // self.options.batch_size),
            batch_size=self.options.batch_size,
            rows=rows,
            precision=self.options.precision,
            model=self.model_fingerprint,
            data=gradient.data.fingerprint,
            weights=weights,
            version=slsgu_cli.__version__,
        )

    def _squares_header(self, gradient: Gradient, rows: int) -> SquaresHeader:
        return SquaresHeader(
            gradient=gradient.digest,
            loss=gradient.loss,
            batches=-(-rows // self.options.batch_size),
            batch_size=self.options.batch_size,
            rows=rows,
            precision=self.options.precision,
            version=slsgu_cli.__version__,
        )
