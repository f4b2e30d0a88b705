"""`eval`: figures of the original model and of another one."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from slsgu_cli import progress
from slsgu_cli.checkpoints.edits import Edit, earlier_edits, load_edit
from slsgu_cli.checkpoints.layers import Layer
from slsgu_cli.clip.devices import pick_device
from slsgu_cli.clip.evaluation import SharedEvaluation
from slsgu_cli.clip.finite import counted_by
from slsgu_cli.clip.loading import load
from slsgu_cli.clip.models import fingerprint, resolve
from slsgu_cli.clip.tokenizers import tokenizer
from slsgu_cli.engine.edited_model import UNEDITED, EditedModel, edited_model, edited_values
from slsgu_cli.engine.gradients import check_inputs
from slsgu_cli.engine.search_plan import (
    evaluation_digest,
    require_alike,
    require_distinct_names,
    run_base_pass,
)
from slsgu_cli.engine.shown_classes import Matrix, choose_shown
from slsgu_cli.engine.text_structure import (
    embedded,
    prompts_without,
    same_text_tower,
    text_structure,
)
from slsgu_cli.figures.pictures import cosine_plot
from slsgu_cli.records.figures import STRUCTURE, Accuracy, TextStructure
from slsgu_cli.records.method import Tower
from slsgu_cli.records.options import SearchOptions
from slsgu_cli.records.sets import ModelSpec, SetManifest, Split
from slsgu_cli.store.artifacts import Artifact, joint_label, plot_path, read_manifest, set_of
from slsgu_cli.store.store import Store


@dataclass(frozen=True, slots=True)
class EvaluatedModel:
    """The figures of one model.

    `forget` is the accuracy on each concept, by the name of its set; `utility` is without
    the images of any of them. `cosines` is mean image-to-name cosine, (names, names).
    `structure` compares the text embeddings of neutral prompts with the original model's; None if
    fewer than two are about none of the concepts.
    """

    label: str
    forget: dict[str, Accuracy]
    utility: dict[str, Accuracy]
    cosines: Matrix
    structure: TextStructure | None


@dataclass(frozen=True, slots=True)
class EvalResult:
    """The figures of models on some sets, and the path of the cosine plot.

    `plot` is None if the store cannot be written.
    """

    names: tuple[str, ...]
    models: tuple[EvaluatedModel, ...]
    plot: str | None

    def figures(self) -> dict[str, float]:
        """Return the figures of the last model by name, as assertions use them.

        `fa1` is that of the first concept, and `fa1.NAME` that of each concept. `loss.SET` is the
        loss of TA@1 in points.
        """
        original, last = self.models[0], self.models[-1]
        figures: dict[str, float] = {}
        for name, accuracy in [("", last.forget[self.names[0]]), *last.forget.items()]:
            behind = f".{name}" if name else ""
            figures |= {f"fa1{behind}": accuracy.top1, f"fa5{behind}": accuracy.top5}
        for name, accuracy in last.utility.items():
            figures |= {f"ta1.{name}": accuracy.top1, f"ta5.{name}": accuracy.top5}
            figures[f"loss.{name}"] = original.utility[name].top1 - accuracy.top1
        if last.structure is not None:
            figures |= {name: getattr(last.structure, name) for name in STRUCTURE}
        return figures


def evaluate(
    store: Store, names: Sequence[str], *, model: ModelSpec | None = None, device: str = "auto"
) -> EvalResult:
    """Measure the original model, and `model`, or else all sets' edits together.

    A single set without an edit has only its original model measured. Edits that others build
    on are applied too, and their concepts are measured. Raises MissingError, StaleError,
    UsageError, and InputError for sets that are not measured on the same rows.
    """
    require_distinct_names(names)
    edits: list[Edit] = []
    label = "all edits" if len(names) > 1 else f"edit {names[0]}"
    if model is None and (len(names) > 1 or store.exists(Artifact.EDIT.path(names[0]))):
        later = [load_edit(store, name) for name in names]
        earlier = earlier_edits(store, later)
        edits = [*later, *earlier]
        if earlier:
            label = f"{label} after {', '.join(edit.header.name for edit in earlier)}"
        names = list(dict.fromkeys([*names, *(set_of(e.header.name) for e in edits)]))
    manifests = [read_manifest(store, name) for name in names]
    require_alike({manifest.name: evaluation_digest(manifest) for manifest in manifests})
    device, prompts = pick_device(device), prompts_without(manifests)
    with torch.no_grad():
        evaluation = _run_model(store, manifests, manifests[0].model, device, original=True)
        shown = choose_shown(evaluation, manifests)
        structure = TextStructure(len(prompts)) if len(prompts) > 1 else None
        models = [_figures(evaluation, manifests, "original", structure)]
        # Both models take the same tokens.
        tokenize = tokenizer(resolve(manifests[0].model))
        embeds = partial(embedded, prompts=prompts, tokenize=tokenize, device=device)
        if model is not None:
            other = _run_model(store, manifests, model, device)
            if structure and not same_text_tower(evaluation.model, other.model):
                before, after = (embeds(each.text).embeddings for each in (evaluation, other))
                structure = text_structure(before, after)
            models.append(_figures(other, manifests, str(model), structure))
        elif edits:
            values = edited_values(evaluation.model, edits)
            in_text = any(Layer.parse(name).recorded_tower is Tower.TEXT for name in values)
            neutral = embeds(evaluation.text) if structure and in_text else None
            with counted_by(label), edited_model(evaluation, values) as edited:
                if neutral:
                    structure = text_structure(neutral.embeddings, edited.classes(neutral))
                models.append(_figures(evaluation, manifests, label, structure, edited))
    path = plot_path(joint_label(names) if len(names) > 1 else names[0], "cosines")
    plot = cosine_plot(
        models[0].cosines,
        models[1].cosines if len(models) > 1 else None,
        shown.names,
        forgotten=shown.names[: len(names)],
        thumbnails=shown.thumbnails if shown.has_images else None,
    )
    return EvalResult(tuple(names), tuple(models), store.write_picture(path, plot))


def _run_model(
    store: Store,
    manifests: Sequence[SetManifest],
    spec: ModelSpec,
    device: str,
    *,
    original: bool = False,
) -> SharedEvaluation:
    """Load a model and run it over the evaluation rows of all sets."""
    model = resolve(spec)
    for manifest in manifests:
        check_inputs(manifest, model)
    return run_base_pass(
        store,
        manifests,
        module=load(model, device, warn=progress.warn),
        model=model,
        weights=fingerprint(model) if original else None,
        split=Split.TEST,
        options=SearchOptions(device=device),
    )


def _figures(
    evaluation: SharedEvaluation,
    manifests: Sequence[SetManifest],
    label: str,
    structure: TextStructure | None,
    model: EditedModel = UNEDITED,
) -> EvaluatedModel:
    """Return the figures of the model of the last base pass, or of one with edits in place."""
    return EvaluatedModel(
        label=label,
        forget=model.accuracies(evaluation.forget),
        utility=model.accuracies(evaluation.utility(manifests)),
        cosines=choose_shown(evaluation, manifests).cosines(model),
        structure=structure,
    )
