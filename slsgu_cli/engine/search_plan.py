"""The plan of a search: its set, layers, directions and evaluation.

Sets that are measured on the same rows share one base pass.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from shlex import quote

import torch
from torch import Tensor, nn

import slsgu_cli
from slsgu_cli import processes, progress
from slsgu_cli.checkpoints.edits import (
    Edit,
    earlier_edits,
    edit_digests,
    load_edit,
    warn_of_joint_searches,
)
from slsgu_cli.checkpoints.layers import in_whole_and_in_part
from slsgu_cli.clip.devices import pick_device
from slsgu_cli.clip.evaluation import Evaluation, SharedEvaluation, prepare_shared
from slsgu_cli.clip.finite import counted_by
from slsgu_cli.clip.memory import return_memory, spare
from slsgu_cli.clip.models import ResolvedModel, resolve
from slsgu_cli.clip.tokenizers import tokenizer
from slsgu_cli.engine.directions import forget_direction
from slsgu_cli.engine.earlier_keys import earlier_keys, with_keys
from slsgu_cli.engine.edited_model import add_edits
from slsgu_cli.engine.evaluator import Evaluator
from slsgu_cli.engine.gradients import load_graded
from slsgu_cli.engine.ranking import ranked_layers, search_directions
from slsgu_cli.engine.stored_covariances import Covariances, ensure_covariances, warn_of_fallback
from slsgu_cli.errors import InputError, StaleError, UsageError
from slsgu_cli.records.codec import digest
from slsgu_cli.records.directions import Direction, DirectionSpec, needed
from slsgu_cli.records.method import Criterion, FeatureHeader, GradientPointer, Precision, Ranking
from slsgu_cli.records.options import SearchOptions
from slsgu_cli.records.sets import SetManifest, Split
from slsgu_cli.store.artifacts import (
    Artifact,
    read_features,
    read_manifest,
    read_pointer,
    read_ranking,
    set_of,
)
from slsgu_cli.store.store import Store

# Part of every address of features: change it with the computation.
FEATURES_REVISION = 1


@dataclass(frozen=True, slots=True)
class SearchPlan:
    """One set to search: its gradients, the layers to try, and their directions.

    `layers` maps layers to their norms. `options` name an existing device. `earlier` edits are
    applied during the search, and `earlier_sets` are their sets.
    """

    manifest: SetManifest
    pointer: GradientPointer
    layers: dict[str, float]
    options: SearchOptions
    directions: tuple[DirectionSpec, ...]
    covariances: Covariances
    earlier: tuple[Edit, ...] = ()
    earlier_sets: tuple[SetManifest, ...] = ()

    @property
    def name(self) -> str:
        """The name of the set."""
        return self.manifest.name

    @property
    def base_pass_digest(self) -> str:
        """A digest that plans have in common if they can share a model and a base pass."""
        measured = [self.pointer.model_fingerprint, evaluation_digest(self.manifest)]
        return digest([*measured, edit_digests(self.earlier)] if self.earlier else measured)

    def measured(self, shared: SharedEvaluation, *, resumed: bool = False) -> Evaluation:
        """Return the evaluation of the concept, without concepts that are forgotten already.

        With `resumed`, it can measure many edits.
        """
        return shared.of(self.manifest, earlier=self.earlier_sets, resumed=resumed)

    def evaluators(self, store: Store, evaluation: Evaluation) -> Iterator[Evaluator]:
        """Yield an evaluator for each layer and each of its directions.

        A layer that none of the directions can use moves along its gradient.
        """
        known, device = self.covariances, self.options.device
        keys: dict[str, Tensor] = {}
        if self.earlier_sets and any(each.needs for each in self.directions):
            keys = earlier_keys(store, evaluation.model, self.earlier_sets, list(self.layers))
        for layer, weight_norm in self.layers.items():
            for direction in known.able(layer, self.directions):
                statistics = with_keys(layer, known.statistics(layer, direction), keys)
                along = forget_direction(store, self.pointer, layer, direction, statistics)
                yield Evaluator(
                    evaluation, layer, weight_norm, torch.tensor(along, device=device), direction
                )


def read_plan(store: Store, name: str, *, options: SearchOptions) -> SearchPlan:
    """Return the plan for set `name`, with the covariances that its directions need.

    Raises MissingError, StaleError, InputError and UsageError.
    """
    if options.precision is Precision.BF16:
        raise UsageError(
            "a search in bf16 would measure a rounded model",
            hint="--precision fp32, or tf32 on a GPU that has it",
        )
    manifest = read_manifest(store, name)
    pointer = read_pointer(store, manifest)
    ranking = read_ranking(store, pointer)
    store.require_writable(Artifact.TRIALS.path(name))
    if manifest.thing is not None and options.criterion is not Criterion.FA1:
        progress.warn(
            f"a {manifest.thing} without the attribute stays similar to {manifest.names[0]!r}, so "
            f"--criterion {options.criterion} costs more of the thing than --criterion fa1"
        )
    _require_ranked(options, ranking)
    options = replace(options, device=pick_device(options.device))
    directions = search_directions(options, ranking)
    scores = ranked_layers(ranking, options)
    layers = {score.layer: score.weight_norm for score in scores}
    covariances = ensure_covariances(
        store,
        manifest,
        pointer,
        list(layers),
        needs=needed(each.kind for each in directions),
        device=options.device,
    )
    warn_of_fallback(
        covariances, list(layers), directions, how="searched", out="--layer names others"
    )
    plan = SearchPlan(manifest, pointer, layers, options, directions, covariances)
    return _after_edits(store, plan) if options.after else plan


def _after_edits(store: Store, plan: SearchPlan) -> SearchPlan:
    """Return a plan on top of the edits of --after, and of the edits below these.

    Raises MissingError, StaleError, UsageError, and InputError if an edit's set is measured on
    other rows.
    """
    named = [load_edit(store, name) for name in dict.fromkeys(plan.options.after)]
    edits = sorted(
        [*named, *earlier_edits(store, named)], key=lambda e: (len(e.header.after), e.header.name)
    )
    sets = {}
    for header in (edit.header for edit in edits):
        manifest = sets[set_of(header.name)] = read_manifest(store, set_of(header.name))
        if manifest.name == plan.name:
            raise UsageError(
                f"the edit {header.name} belongs to the set {plan.name} itself",
                hint="--after names edits of other sets",
            )
        if header.model_fingerprint != plan.pointer.model_fingerprint:
            raise StaleError(
                f"the edit {header.name} was made for other weights than those of the gradients of "
                f"{plan.name}",
                hint=f"run `{Artifact.EDIT.command(header.name)}`",
            )
        require_alike({each.name: evaluation_digest(each) for each in (manifest, plan.manifest)})
    layers = [edit.header.layer for edit in edits]
    if twice := in_whole_and_in_part([*layers, *plan.layers]):
        raise UsageError(
            f"{twice} would be edited both as a whole and in part",
            hint="rank and search all sets with the same --qkv",
        )
    warn_of_joint_searches(edits)
    return replace(plan, earlier=tuple(edits), earlier_sets=tuple(sets.values()))


def read_plans(store: Store, names: Sequence[str], *, options: SearchOptions) -> list[SearchPlan]:
    """Return the plans for several sets. Raises the errors of `read_plan`, and UsageError."""
    require_distinct_names(names)
    return [read_plan(store, name, options=options) for name in names]


def grouped(plans: Sequence[SearchPlan]) -> list[list[SearchPlan]]:
    """Group plans that can share a model and a base pass, in order."""
    groups: dict[str, list[SearchPlan]] = {}
    for plan in plans:
        groups.setdefault(plan.base_pass_digest, []).append(plan)
    return list(groups.values())


def _require_ranked(options: SearchOptions, ranking: Ranking) -> None:
    """Raise StaleError if the ranking has other directions or another kind of layers.

    Raises UsageError for a parameter that no direction has.
    """
    ranked = {each.kind for each in ranking.directions}
    direction = options.direction
    if direction is not None and not set(direction.each) <= ranked:
        raise StaleError(
            f"the layers of {ranking.name} were ranked for the direction "
            f"{Direction.of(ranked)}, not {direction}",
            hint=f"run `slsgu rank {quote(ranking.name)} --direction {direction}`",
        )
    if options.qkv not in (None, ranking.qkv):
        raise StaleError(
            f"the layers of {ranking.name} were ranked with query, key and value {ranking.qkv}, "
            f"not {options.qkv}",
            hint=f"run `slsgu rank {quote(ranking.name)} --qkv {options.qkv}`",
        )
    (direction or Direction.of(ranked)).check(options.damping)


def evaluation_digest(manifest: SetManifest) -> str:
    """Return a digest of the evaluation rows and the input format of a set."""
    return digest([manifest.input, manifest.measured_on()])


def require_alike(digests: Mapping[str, str]) -> None:
    """Raise InputError unless the evaluation digests of all sets are equal."""
    first, *others = digests
    for name in others:
        if digests[name] != digests[first]:
            raise InputError(
                f"{first} and {name} are not measured on the same rows of the same model",
                hint="build both sets with the same --model, --eval, --classes and --templates",
            )


def require_distinct_names(names: Sequence[str]) -> None:
    """Raise UsageError if a set is named twice."""
    if len(set(names)) < len(names):
        raise UsageError("a set is named twice")


def share_evaluation(
    store: Store, plans: Sequence[SearchPlan], split: Split = Split.VALIDATION
) -> SharedEvaluation:
    """Load the model of some plans, apply their earlier edits, and run their joint base pass."""
    first = plans[0]
    return_memory()
    _, module = load_graded(first.pointer, first.options.device)
    add_edits(module, first.earlier)
    layers = [layer for plan in plans for layer in plan.layers]
    shared = _base_pass(store, plans, module, split, layers)
    return_memory()
    return shared


def report_evaluation(
    store: Store,
    plans: Sequence[SearchPlan],
    evaluation: SharedEvaluation,
    layers: Sequence[str] = (),
) -> SharedEvaluation:
    """Run the model of an evaluation over test rows.

    Sets without a test split are reported on the rows of the evaluation. With `layers`, edits of
    these resume from cached activations, and the cache of the search is freed first.
    """
    if not any(plan.manifest.is_split for plan in plans):
        return evaluation
    if layers:
        evaluation.release()
    return _base_pass(store, plans, evaluation.model, Split.TEST, layers)


def _base_pass(
    store: Store,
    plans: Sequence[SearchPlan],
    module: nn.Module,
    split: Split,
    layers: Sequence[str],
) -> SharedEvaluation:
    first = plans[0]
    sets = [manifest for plan in plans for manifest in (plan.manifest, *plan.earlier_sets)]
    return run_base_pass(
        store,
        list({manifest.name: manifest for manifest in sets}.values()),
        module=module,
        model=resolve(first.pointer.model),
        weights=None if first.earlier else first.pointer.model_fingerprint,
        split=split,
        options=first.options,
        layers=layers,
    )


def run_base_pass(
    store: Store,
    manifests: Sequence[SetManifest],
    *,
    module: nn.Module,
    model: ResolvedModel,
    weights: str | None,
    split: Split,
    options: SearchOptions,
    layers: Sequence[str] = (),
) -> SharedEvaluation:
    """Run a model over the evaluation rows of sets, within the cache budget.

    `weights` is the fingerprint of an original model, whose image features are cached in the
    store; None for any other model. Edits of `layers` resume from cached activations.
    """
    device, budget = options.device, options.cache_budget
    shared = prepare_shared(
        store, manifests, module, tokenize=tokenizer(model), device=device, split=split
    )
    header = None
    if weights is not None:
        header = FeatureHeader(
            model=weights,
            evals=manifests[0].measured_on(),
            split=split,
            precision=options.precision,
            device=device.partition(":")[0],
            version=slsgu_cli.__version__,
        )
        made_from = [weights, split, options.precision, header.device]
        address = digest([FEATURES_REVISION, *made_from, evaluation_digest(manifests[0])])
        path = Artifact.FEATURES.path(address)
        if _use_features(store, path, shared):
            header = None
    with counted_by(str(model.spec)):
        budget = spare(device) if budget is None else budget
        shared.base_pass(layers, cache_bytes=budget)
    if header is not None:
        arrays = {name: group.images.features.cpu().numpy() for name, group in shared.sets.items()}
        try:
            store.write_tensors(path, arrays, header)
        except InputError as error:
            progress.detail(f"{error.message}; the image features are not cached")
    return shared


def _use_features(store: Store, path: str, shared: SharedEvaluation) -> bool:
    """Give a base pass the image features of an earlier one, if the store has them."""
    known = processes.from_first(lambda: read_features(store, path))
    if {name: len(values) for name, values in known.items()} != {
        name: len(group.images) for name, group in shared.sets.items()
    }:
        return False
    for name, group in shared.sets.items():
        group.images.known = torch.from_numpy(known[name]).to(group.images.labels.device)
    return True
