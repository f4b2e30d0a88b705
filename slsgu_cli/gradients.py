"""What `slsgu grad` does: find or compute the two gradients of a set, and point to them.

A gradient is addressed by the content of what it was computed from, so the same call is
a cache hit, and concepts that share a retain set share its gradient.
"""

from dataclasses import dataclass, replace
from shlex import quote
from typing import TYPE_CHECKING

import slsgu_cli
from slsgu_cli.console import Console
from slsgu_cli.errors import InputError, MissingError, StaleError
from slsgu_cli.layout import gradient_path, pointer_path, read_manifest
from slsgu_cli.models import (
    ResolvedModel,
    fingerprint,
    input_spec,
    load,
    pick_device,
    resolve,
)
from slsgu_cli.records import (
    DataRef,
    GradientHeader,
    GradientPointer,
    ModelSpec,
    ParameterNorm,
    PassOptions,
    SetManifest,
    digest,
)
from slsgu_cli.scoring import norm
from slsgu_cli.store import Store

if TYPE_CHECKING:
    from torch import nn


# Part of every gradient's address: a change in what is computed must change it.
REVISION = 1


@dataclass(frozen=True, slots=True)
class Gradient:
    """One gradient of a set: its role, its loss, its rows and its address."""

    role: str
    loss: str
    data: DataRef
    digest: str


@dataclass(frozen=True, slots=True)
class GradResult:
    """The gradients of a set, and which of them this call computed."""

    pointer: GradientPointer
    headers: dict[str, GradientHeader]
    computed: tuple[str, ...]


def compute_gradients(
    store: Store,
    name: str,
    *,
    model: ModelSpec | None,
    options: PassOptions,
    console: Console,
) -> GradResult:
    """Ensure the forget and retain gradients of set `name` are in the store.

    Raises MissingError, InputError, and StaleError where the model takes other inputs
    than the set was built for.
    """
    manifest = read_manifest(store, name)
    resolved = resolve(model or manifest.model)
    model_fingerprint = fingerprint(resolved)
    gradients = _wanted(manifest, resolved, model_fingerprint, options)
    missing = [g for g in gradients if not _is_whole(store, g, console)]
    for gradient in gradients:
        if gradient not in missing:
            console.note(f"{gradient.role} gradient {gradient.digest}: in the store already")
    if missing:
        check_inputs(manifest, resolved)
        options = replace(options, device=pick_device(options.device))
        module = load(resolved, options.device, warn=console.warn)
        for gradient in missing:
            _compute(store, gradient, module, manifest, model_fingerprint, options, console)
    forget, retain = gradients
    pointer = GradientPointer(
        name=name,
        model=model or manifest.model,
        model_fingerprint=model_fingerprint,
        forget=forget.digest,
        retain=retain.digest,
        forget_data=forget.data.fingerprint,
        retain_data=retain.data.fingerprint,
        batch_size=options.batch_size,
        precision=options.precision,
        version=slsgu_cli.__version__,
    )
    store.write_record(pointer_path(name), pointer)
    headers = {
        g.role: store.read_header(gradient_path(g.digest), GradientHeader) for g in gradients
    }
    return GradResult(pointer, headers, tuple(g.role for g in missing))


def _is_whole(store: Store, gradient: Gradient, console: Console) -> bool:
    """Return whether the gradient can be used; one that is damaged is to be made again."""
    try:
        store.read_header(gradient_path(gradient.digest), GradientHeader)
    except MissingError:
        return False
    except (InputError, StaleError) as error:
        console.warn(f"{error.message}; it is computed again")
        return False
    return True


def load_graded(
    manifest: SetManifest, pointer: GradientPointer, device: str
) -> "tuple[ResolvedModel, nn.Module]":
    """Load the model that the gradients of a set belong to. Raises StaleError for another."""
    model = resolve(pointer.model)
    if fingerprint(model) != pointer.model_fingerprint:
        raise StaleError(
            f"{pointer.model} has other weights than when its gradients were computed",
            hint=f"run `slsgu grad {quote(manifest.name)}`",
        )
    check_inputs(manifest, model)
    return model, load(model, device)


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
        made_from = {
            "revision": REVISION,
            "model": model_fingerprint,
            "data": data.fingerprint,
            "input": manifest.input,
            "loss": loss,
            "batch_size": options.batch_size,
            "precision": options.precision,
        }
        return Gradient(role, loss, data, digest(made_from))

    return (
        address("forget", "cosine", manifest.forget),
        address("retain", retain_loss, manifest.retain),
    )


def _compute(
    store: Store,
    gradient: Gradient,
    module: "nn.Module",
    manifest: SetManifest,
    model_fingerprint: str,
    options: PassOptions,
    console: Console,
) -> None:
    from slsgu_cli.gradpass import GradientPass
    from slsgu_cli.sets import DataBlock

    block = DataBlock.open(store, gradient.data)
    size = min(options.batch_size, block.rows)
    run = GradientPass.prepare(
        module,
        gradient.loss,
        spec=manifest.input,
        options=replace(options, batch_size=size),
        console=console,
    )
    arrays, mean_loss = run.run(block, f"{gradient.role} gradient")
    weights = {
        name: ParameterNorm(tuple(p.shape), norm(p.detach().cpu().numpy()))
        for name, p in module.named_parameters()
    }
    header = GradientHeader(
        loss=gradient.loss,
        sign="+grad",
        mean_loss=mean_loss,
        batches=-(-block.rows // size),
        batch_size=options.batch_size,
        rows=block.rows,
        precision=options.precision,
        model=model_fingerprint,
        data=gradient.data.fingerprint,
        weights=weights,
        version=slsgu_cli.__version__,
    )
    store.write_tensors(gradient_path(gradient.digest), arrays, header)
