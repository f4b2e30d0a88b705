"""`export`: edits as a LoRA of the smallest rank that still forgets."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

import torch

from slsgu_cli import progress
from slsgu_cli.checkpoints.destinations import require_nothing_lost
from slsgu_cli.checkpoints.edit_plan import copies_of, require_distinct
from slsgu_cli.checkpoints.edits import (
    Edit,
    earlier_edits,
    load_edits,
    warn_of_joint_searches,
    warn_of_other_encoders,
)
from slsgu_cli.checkpoints.lora import (
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    Decomposed,
    lora_tensors,
    peft_config,
)
from slsgu_cli.checkpoints.number_formats import Floats
from slsgu_cli.checkpoints.stored_layer import recognised
from slsgu_cli.checkpoints.target_layers import SECOND_WIDTH
from slsgu_cli.checkpoints.targets import KINDS, Encoder, Family, read_target
from slsgu_cli.clip.devices import pick_device
from slsgu_cli.clip.evaluation import SharedEvaluation
from slsgu_cli.clip.in_place import changed_values
from slsgu_cli.engine.edited_model import EditedModel, edited_model, edited_values
from slsgu_cli.engine.effect import residuals
from slsgu_cli.engine.search_plan import (
    SearchPlan,
    evaluation_digest,
    report_evaluation,
    require_alike,
    share_evaluation,
)
from slsgu_cli.engine.stored_covariances import Covariances
from slsgu_cli.errors import InputError, StaleError, UsageError
from slsgu_cli.records.figures import Accuracy
from slsgu_cli.records.method import LoraHeader, LoraLayout
from slsgu_cli.records.options import ExportRequest, SearchOptions
from slsgu_cli.store.artifacts import Artifact, read_manifest, read_pointer, set_of
from slsgu_cli.store.atomic import replacing, require_regular
from slsgu_cli.store.store import Store

# Strengths of a LoRA that figures are reported for.
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
# The prefixes of kohya's names of text encoders, for the pipelines that clients support.
PREFIXES = {
    Family.SD1: {"text_encoder": "lora_te_"},
    Family.SD2: {"text_encoder": "lora_te_"},
    Family.SDXL: {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
    Family.FLUX: {"text_encoder": "lora_te1_"},
}


@dataclass(frozen=True, slots=True)
class ExportedEdit:
    """An edit in a LoRA, its rank there and its full rank."""

    name: str
    layer: str
    rank: int
    full_rank: int


@dataclass(frozen=True, slots=True)
class StrengthFigures:
    """The forget accuracy with a LoRA at some strength, on test rows."""

    strength: float
    name: str
    forget: Accuracy


@dataclass(frozen=True, slots=True)
class ExportResult:
    """The files and their effect; there are no figures of edits without a set."""

    files: tuple[str, ...]
    nbytes: int
    edits: tuple[ExportedEdit, ...]
    figures: tuple[StrengthFigures, ...]


def export(store: Store, request: ExportRequest) -> ExportResult:
    """Write edits as a LoRA, and measure it at several strengths.

    Raises UsageError, InputError, MissingError or StaleError, with nothing written.
    """
    edits = [edit for name in request.names for edit in load_edits(store, name)]
    require_distinct(edits)
    if lacking := earlier_edits(store, edits):
        named = " ".join(quote(edit.header.name) for edit in lacking)
        raise UsageError(
            "these edits were searched on top of others, which the LoRA must contain too",
            hint=f"name them too: {named}",
        )
    warn_of_joint_searches(edits)
    warn_of_other_encoders(edits)
    _require_output(request)
    prefixes = _prefixes(request, edits)
    parts = [Decomposed(edit.header, edit.factor * edit.delta()) for edit in edits]
    ranks = [min(request.rank or part.full_rank, part.full_rank) for part in parts]
    figures: list[StrengthFigures] = []
    if _has_sets(store, edits, rank=request.rank):
        # The edits of one text encoder are measured together, in the CLIP they were made for.
        for prefix in sorted(set(prefixes)):
            places = [place for place, each in enumerate(prefixes) if each == prefix]
            measured = _Measured(store, edits, parts, places, device=request.device)
            if request.rank is None:
                measured.lower(ranks)
            figures += measured.figures(ranks)
    tensors, header = lora_tensors(
        list(zip(parts, ranks, prefixes, strict=True)), layout=request.layout
    )
    files = _write(request.out, tensors, header, str(edits[0].header.model))
    exported = (
        ExportedEdit(edit.header.name, edit.header.layer, rank, part.full_rank)
        for edit, rank, part in zip(edits, ranks, parts, strict=True)
    )
    return ExportResult(
        files=tuple(map(str, files)),
        nbytes=sum(path.stat().st_size for path in files),
        edits=tuple(exported),
        figures=tuple(sorted(figures, key=lambda each: each.strength)),
    )


def _require_output(request: ExportRequest) -> None:
    """Raise UsageError or InputError for an output path of the wrong kind or in use."""
    out, is_file = request.out, request.layout is LoraLayout.LORA
    if is_file and out.suffix != ".safetensors":
        raise UsageError(f"a LoRA is a .safetensors file, not {out}", hint="--out NAME.safetensors")
    if not is_file and out.suffix == ".safetensors":
        raise UsageError("PEFT's layout is a folder", hint=f"--out {out.with_suffix('')}")
    require_regular(out)
    if out.exists() and not request.overwrite:
        raise InputError(f"{out} exists already", hint="another --out, or --overwrite")
    require_nothing_lost(out, (PEFT_CONFIG, PEFT_WEIGHTS))


def _has_sets(store: Store, edits: Sequence[Edit], *, rank: int | None) -> bool:
    """Return whether edits can be measured. Raises UsageError if they must be."""
    sets = dict.fromkeys(set_of(edit.header.name) for edit in edits)
    lacking = [name for name in sets if not store.exists(Artifact.SET.path(name))]
    if lacking and rank is None:
        raise UsageError(
            f"{store.url} has no set {lacking[0]} to choose a rank by",
            hint="choose it with --rank",
        )
    if lacking:
        progress.note(f"there is no set {lacking[0]}: nothing is measured")
    return not lacking


def _prefixes(request: ExportRequest, edits: Sequence[Edit]) -> list[str]:
    """Return the prefix of kohya's names for the text encoder of each edit.

    Raises InputError if the pipeline has no such encoder or does not read a layer, and
    UsageError if it is not a pipeline, or for two encoders in PEFT's layout.
    """
    if request.target is None:
        if request.encoder is not None:
            raise UsageError("--encoder goes with --target", hint="--target sdxl")
        return ["lora_te_"] * len(edits)
    is_kind = request.target in KINDS and not Path(request.target).exists()
    target = None if is_kind else read_target(Path(request.target))
    family = target.family if target else Family(request.target)
    if family not in PREFIXES:
        raise UsageError(
            f"{request.target} is {family}, whose text encoders have no names in a LoRA file that "
            "slsgu knows",
            hint="--target names a Stable Diffusion 1, 2, XL or a FLUX; --format peft is for "
            "transformers, and `slsgu apply` writes the edit into the files",
        )
    known = PREFIXES[family]
    only = next(iter(known)) if len(known) == 1 else None
    if target is not None:
        encoders = [_encoder_of(target.chosen(request.encoder), edit).name for edit in edits]
    else:
        by_width = ("text_encoder", "text_encoder_2")
        encoders = [
            request.encoder or only or by_width[min(edit.delta().shape) == SECOND_WIDTH]
            for edit in edits
        ]
    if unknown := sorted(set(encoders) - known.keys()):
        raise UsageError(
            f"{family} has no CLIP {unknown[0]}", hint=f"--encoder {' or '.join(known)}"
        )
    if request.layout is LoraLayout.PEFT and len(set(encoders)) > 1:
        raise UsageError(
            "PEFT's layout has one text encoder, but these edits belong to "
            + " and ".join(sorted(set(encoders))),
            hint="--format lora, or export the edits of one encoder at a time",
        )
    return [known[encoder] for encoder in encoders]


def _encoder_of(encoders: Sequence[Encoder], edit: Edit) -> Encoder:
    """Return the encoder with the layer that an edit was made for."""
    layer = edit.header.layer
    for encoder in encoders:
        for weights, places in copies_of(encoder, layer):
            current, dtype = weights.layer(places)
            if recognised(current, dtype, edit.header.digests):
                if why_not := encoder.why_not(layer):
                    raise InputError(f"{layer} cannot influence {encoder.name}: {why_not}")
                return encoder
    raise StaleError(
        f"no text encoder has the {layer} that the edit {edit.header.name} was made for",
        hint=f"--target needs a pipeline that uses {edit.header.model}",
    )


def _write(out: Path, tensors: dict[str, Floats], header: LoraHeader, base: str) -> list[Path]:
    """Write a LoRA in its layout; return its files."""
    with replacing(out) as partial:
        if header.layout is LoraLayout.LORA:
            Store(str(partial.parent)).write_tensors(partial.name, tensors, header)
            return [out]
        partial.mkdir()
        Store(str(partial)).write_tensors(PEFT_WEIGHTS, tensors, header)
        (partial / PEFT_CONFIG).write_text(peft_config(header, base))
    return [out / PEFT_CONFIG, out / PEFT_WEIGHTS]


class _Measured:
    """The edits at some `places`, cut to any rank, in their model; figures of their concepts.

    Ranks are those of all edits, in order.
    """

    def __init__(
        self,
        store: Store,
        edits: Sequence[Edit],
        parts: Sequence[Decomposed],
        places: Sequence[int],
        *,
        device: str,
    ) -> None:
        """Load the model and run it. Raises MissingError, or StaleError for other weights."""
        self.store, self.parts, self.places = store, parts, places
        self.edits = [edits[place] for place in places]
        layers = {edit.header.layer: 0.0 for edit in self.edits}
        options = SearchOptions(device=pick_device(device))
        names = dict.fromkeys(set_of(edit.header.name) for edit in self.edits)
        manifests = [read_manifest(store, name) for name in names]
        require_alike({manifest.name: evaluation_digest(manifest) for manifest in manifests})
        self.plans = [
            SearchPlan(
                manifest, read_pointer(store, manifest), layers, options, (), Covariances(store)
            )
            for manifest in manifests
        ]
        with torch.no_grad():
            self.shared = share_evaluation(store, self.plans)
            # Refuses a model that the edits were not made for.
            edited_values(self.shared.model, self.edits)

    def lower(self, ranks: list[int]) -> None:
        """Lower the rank of one edit after another, as long as no residual grows.

        Residuals are measured on validation rows.
        """
        whole = self._residuals(ranks)
        for place in self.places:

            def suffices(rank: int, place: int = place) -> bool:
                reduced = self._residuals([*ranks[:place], rank, *ranks[place + 1 :]])
                return all(reduced[name] <= whole[name] for name in whole)

            ranks[place] = smallest(suffices, ranks[place])

    def figures(self, ranks: Sequence[int]) -> list[StrengthFigures]:
        """Return the forget accuracy of each concept at each strength, on test rows."""
        with torch.no_grad():
            reported = report_evaluation(self.store, self.plans, self.shared)
        figures = []
        for strength in STRENGTHS:
            with self._in_place(reported, ranks, strength) as model:
                for name in (plan.name for plan in self.plans):
                    accuracy, _ = model.forget_figures(reported.forget[name])
                    figures.append(StrengthFigures(strength, name, accuracy))
        return figures

    def _residuals(self, ranks: Sequence[int]) -> dict[str, float]:
        with self._in_place(self.shared, ranks, 1.0) as model:
            return residuals(self.shared, self.edits, model)

    @contextmanager
    def _in_place(
        self, evaluation: SharedEvaluation, ranks: Sequence[int], strength: float
    ) -> Iterator[EditedModel]:
        """Apply the edits to the model, at a strength, for the length of a block."""
        changes = []
        for part, rank in ((self.parts[place], ranks[place]) for place in self.places):
            changes.append((part.header.layer, torch.from_numpy(part.delta(rank)), strength))
        values = changed_values(evaluation.model, changes)
        with torch.no_grad(), edited_model(evaluation, values) as model:
            yield model


def smallest(suffices: Callable[[int], bool], full: int) -> int:
    """Return the smallest rank that suffices, found by doubling and bisection; else `full`.

    All ranks above a sufficient one suffice.
    """
    high = 1
    while high < full and not suffices(high):
        high *= 2
    between = range(high // 2 + 1, min(high, full))
    return between.start + bisect_left(between, True, key=suffices)
