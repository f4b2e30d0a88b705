"""What a search is asked for and measures on: options, set, layers, directions, base passes.

Sets that are measured on the same rows share one base pass.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from shlex import quote
from typing import TYPE_CHECKING

import slsgu_cli
from slsgu_cli import progress
from slsgu_cli.checkpoints.edits import (
    Edit,
    earlier_edits,
    edit_digests,
    load_edit,
    warn_of_joint_searches,
)
from slsgu_cli.checkpoints.layers import in_whole_and_in_part
from slsgu_cli.checkpoints.targets import prompt_note
from slsgu_cli.clip import processes
from slsgu_cli.clip.models import ResolvedModel, pick_device, resolve, tokenizer
from slsgu_cli.errors import InputError, StaleError, UsageError
from slsgu_cli.method.directions import (
    Covariances,
    ensure_covariances,
    forget_direction,
    tell_of_unwhitened,
)
from slsgu_cli.method.gradients import load_graded
from slsgu_cli.method.ranking import ranked_layers
from slsgu_cli.records.codec import digest
from slsgu_cli.records.method import (
    Direction,
    FeatureHeader,
    GradientPointer,
    LayerScore,
    Precision,
    Ranking,
)
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

if TYPE_CHECKING:
    from torch import nn

    from slsgu_cli.clip.evaluation import Evaluation, SharedEvaluation
    from slsgu_cli.method.trial import EarlierConcepts, Probe


# Part of every address of features: a change in what is computed must change it.
FEATURES_REVISION = 1


@dataclass(frozen=True, slots=True)
class SearchPlan:
    """One set to search: its gradients, the layers to try, and the directions they move in.

    `options` have the direction, the damping and the device that are in force. `earlier` are
    edits that are in place while it is searched, and `earlier_sets` those they forget.
    """

    manifest: SetManifest
    pointer: GradientPointer
    layers: tuple[LayerScore, ...]
    options: SearchOptions
    covariances: Covariances | None
    earlier: tuple[Edit, ...] = ()
    earlier_sets: tuple[SetManifest, ...] = ()

    @property
    def name(self) -> str:
        """The name of the set."""
        return self.manifest.name

    @property
    def base_pass_digest(self) -> str:
        """A digest that is equal for plans which can share a model and a base pass."""
        measured = [self.pointer.model_fingerprint, evaluation_digest(self.manifest)]
        return digest([*measured, self.after] if self.earlier else measured)

    @property
    def after(self) -> dict[str, str]:
        """The digests of the edits that are in place, by name."""
        return edit_digests(self.earlier)

    def measured(self, shared: "SharedEvaluation", *, resumed: bool = False) -> "Evaluation":
        """Return what the concept is measured on, with nothing that is forgotten already.

        Many edits can be measured where they are `resumed`.
        """
        return shared.of(self.manifest, beside=self.earlier_sets, resumed=resumed)

    def guard(self, shared: "SharedEvaluation") -> "EarlierConcepts":
        """Return what tells whether a step brings back what is forgotten already."""
        from slsgu_cli.method.trial import EarlierConcepts

        return EarlierConcepts(shared, self.earlier)

    def probes(self, store: Store, evaluation: "Evaluation") -> "Iterator[Probe]":
        """Yield a probe for every layer and each direction that it can move in.

        Where it cannot be whitened, that is its gradient.
        """
        import torch

        from slsgu_cli.method.trial import Probe

        both = self.options.moves is Direction.BOTH
        for score in self.layers:
            for direction in self.options.moves.each:
                covariances = self.covariances if direction.whitens else None
                if covariances is not None and not covariances.has(score.layer):
                    if both:
                        continue
                    covariances = None
                damping = self.options.damping if covariances else None
                along = forget_direction(
                    store, self.pointer, score.layer, damping=damping or 0, covariances=covariances
                )
                on_device = torch.from_numpy(along).to(self.options.device)
                yield Probe(evaluation, score, on_device, damping)


def read_plan(store: Store, name: str, *, options: SearchOptions) -> SearchPlan:
    """Return what to search of set `name`, with the covariances its directions take.

    Raises MissingError, StaleError, InputError and UsageError.
    """
    if options.precision is Precision.BF16:
        raise UsageError(
            "a search in bf16 would count accuracies of a rounded model",
            hint="--precision fp32, or tf32 on a GPU that has it",
        )
    if options.shard:
        processes.require_several("search")
    manifest = read_manifest(store, name)
    pointer = read_pointer(store, manifest)
    ranking = read_ranking(store, pointer)
    store.require_writable(Artifact.TRIALS.path(name))
    options = _resolved(options, ranking)
    layers = ranked_layers(store, ranking, options)
    if note := prompt_note(str(ranking.target), ranking.readers):
        progress.note(note)
    covariances = None
    if options.moves.whitens:
        names = [score.layer for score in layers]
        covariances = ensure_covariances(
            store, manifest, pointer, names, device=options.device, shard=options.shard
        )
        tell_of_unwhitened(covariances, names, how="searched", out="--layer names others")
    plan = SearchPlan(manifest, pointer, tuple(layers), options, covariances)
    return _on_top(store, plan) if options.after else plan


def _on_top(store: Store, plan: SearchPlan) -> SearchPlan:
    """Return a plan with the edits that it stands on, those that they stand on among them.

    Raises MissingError, StaleError, UsageError, and InputError where an edit's set is measured
    on other rows.
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
                f"the edit {header.name} is of the set {plan.name} itself",
                hint="--after names edits of other sets",
            )
        if header.model_fingerprint != plan.pointer.model_fingerprint:
            raise StaleError(
                f"the edit {header.name} was made for other weights than the gradients of "
                f"{plan.name}",
                hint=f"run `{Artifact.EDIT.command(header.name)}`",
            )
        require_alike({each.name: evaluation_digest(each) for each in (manifest, plan.manifest)})
    moved = [edit.header.layer for edit in edits]
    if twice := in_whole_and_in_part([*moved, *(score.layer for score in plan.layers)]):
        raise UsageError(
            f"{twice} is changed as a whole and a third of it as well",
            hint="rank and search all sets with the same --qkv",
        )
    warn_of_joint_searches(edits)
    return replace(plan, earlier=tuple(edits), earlier_sets=tuple(sets.values()))


def read_plans(store: Store, names: Sequence[str], *, options: SearchOptions) -> list[SearchPlan]:
    """Return what to search of several sets. Raises what `read_plan` does, and UsageError."""
    require_distinct_names(names)
    return [read_plan(store, name, options=options) for name in names]


def grouped(plans: Sequence[SearchPlan]) -> list[list[SearchPlan]]:
    """Return plans in groups that can share a model and a base pass, in their order."""
    groups: dict[str, list[SearchPlan]] = {}
    for plan in plans:
        groups.setdefault(plan.base_pass_digest, []).append(plan)
    return list(groups.values())


def _resolved(options: SearchOptions, ranking: Ranking) -> SearchOptions:
    """Return the options with the ranking's direction and damping, and the device.

    Raises StaleError where the layers were ranked for another direction, or other layers were.
    """
    direction = options.direction or ranking.direction
    if not set(direction.each) <= set(ranking.direction.each):
        raise StaleError(
            f"the layers of {ranking.name} were ranked for the direction {ranking.direction}, "
            f"not {direction}",
            hint=f"run `slsgu rank {quote(ranking.name)} --direction {direction}`",
        )
    if options.qkv not in (None, ranking.qkv):
        raise StaleError(
            f"the layers of {ranking.name} were ranked with query, key and value {ranking.qkv}, "
            f"not {options.qkv}",
            hint=f"run `slsgu rank {quote(ranking.name)} --qkv {options.qkv}`",
        )
    if direction is Direction.GRADIENT and options.damping is not None:
        raise UsageError(
            "--damping is for the whitened direction",
            hint=f"run `slsgu rank {quote(ranking.name)} --direction whitened`",
        )
    damping = ranking.damping if options.damping is None else options.damping
    return replace(
        options, direction=direction, damping=damping, device=pick_device(options.device)
    )


def evaluation_digest(manifest: SetManifest) -> str:
    """Return a digest of the evaluation rows of a set and of how they are taken in."""
    return digest([manifest.input, manifest.measured_on()])


def require_alike(digests: Mapping[str, str]) -> None:
    """Raise InputError unless all sets have the same digest of what they are measured on."""
    first, *others = digests
    for name in others:
        if digests[name] != digests[first]:
            raise InputError(
                f"{first} and {name} are not measured on the same rows of the same model",
                hint="build both sets with the same --model, --eval, --classes and --templates",
            )


def require_distinct_names(names: Sequence[str]) -> None:
    """Raise UsageError where a set is named twice."""
    if len(set(names)) < len(names):
        raise UsageError("a set is named twice")


def share_evaluation(
    store: Store, plans: Sequence[SearchPlan], split: Split = Split.VALIDATION
) -> "SharedEvaluation":
    """Load the model of some plans and run it once over what all of them measure on.

    The edits that the plans stand on are in it. Tells of towers that are not split.
    """
    from slsgu_cli.clip.inputs import return_memory
    from slsgu_cli.method.trial import add_edits

    first = plans[0]
    return_memory()
    _, module = load_graded(
        first.manifest, first.pointer, first.options.device, shard=first.options.shard
    )
    add_edits(module, first.earlier)
    layers = [score for plan in plans for score in plan.layers]
    shared = _base_pass(store, plans, module, split).run(layers)
    for tower in {score.tower for score in layers}:
        if not shared.tower(tower).exact_split:
            progress.detail(f"the {tower} tower is not split: every trial runs all of it")
    return_memory()
    return shared


def report_evaluation(
    store: Store,
    plans: Sequence[SearchPlan],
    evaluation: "SharedEvaluation",
    layers: Sequence[LayerScore] = (),
) -> "SharedEvaluation":
    """Run the model of an evaluation over the rows that sets are reported on.

    Where no set has rows of its own to report on, they are those of the evaluation. Edits of
    `layers` resume there: what was kept to choose them by makes room.
    """
    if not any(plan.manifest.is_split for plan in plans):
        return evaluation
    if layers:
        evaluation.release()
    return _base_pass(store, plans, evaluation.model, Split.TEST).run(layers)


def _base_pass(
    store: Store, plans: Sequence[SearchPlan], module: "nn.Module", split: Split
) -> "BasePass":
    first = plans[0]
    sets = [manifest for plan in plans for manifest in (plan.manifest, *plan.earlier_sets)]
    return BasePass(
        store=store,
        manifests=tuple({manifest.name: manifest for manifest in sets}.values()),
        module=module,
        model=resolve(first.pointer.model),
        weights=None if first.earlier else first.pointer.model_fingerprint,
        split=split,
        options=first.options,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BasePass:
    """A model to run once over what sets measure on.

    `weights` are the fingerprint of an original model, whose image features are taken from the
    store, or kept there; None of a model that is edited or another one.
    """

    store: Store
    manifests: tuple[SetManifest, ...]
    module: "nn.Module"
    model: ResolvedModel
    weights: str | None
    split: Split
    options: SearchOptions

    def run(self, layers: Sequence[LayerScore] = ()) -> "SharedEvaluation":
        """Run the model within the cache budget, keeping what edits of `layers` resume from."""
        from slsgu_cli.clip.evaluation import prepare_shared
        from slsgu_cli.clip.inputs import spare
        from slsgu_cli.clip.zeroshot import counted_by

        device, budget = self.options.device, self.options.cache_budget
        tokenize = tokenizer(self.model)
        shared = prepare_shared(
            self.store,
            self.manifests,
            self.module,
            tokenize=tokenize,
            device=device,
            split=self.split,
        )
        known = nullcontext() if self.weights is None else self._features(shared, self.weights)
        with counted_by(str(self.model.spec)), known:
            if budget is None:
                budget = spare(device)
            shared.base_pass((score.layer for score in layers), cache_bytes=budget)
        return shared

    @contextmanager
    def _features(self, shared: "SharedEvaluation", weights: str) -> Iterator[None]:
        """Let a base pass take image features from the store, or keep them there."""
        import torch

        first, device = self.manifests[0], self.options.device
        header = FeatureHeader(
            model=weights,
            evals=first.measured_on(),
            split=self.split,
            precision=self.options.precision,
            device=device.partition(":")[0],
            version=slsgu_cli.__version__,
        )
        made_from = [header.model, header.split, header.precision, header.device]
        address = digest([FEATURES_REVISION, *made_from, evaluation_digest(first)])
        path = Artifact.FEATURES.path(address)
        known = processes.from_first(lambda: read_features(self.store, path))
        fits = {name: len(group.images) for name, group in shared.sets.items()}
        if {name: len(values) for name, values in known.items()} == fits:
            for name, values in known.items():
                shared.sets[name].images.known = torch.from_numpy(values).to(device)
            yield
            return
        yield
        arrays = {name: group.images.features.cpu().numpy() for name, group in shared.sets.items()}
        try:
            self.store.write_tensors(path, arrays, header)
        except InputError as error:
            progress.detail(f"{error.message}; features are not kept")
