"""Whole stores: sets that are built, graded and ranked."""

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

from slsgu_cli import progress
from slsgu_cli.engine.gradients import compute_gradients
from slsgu_cli.engine.ranking import rank
from slsgu_cli.engine.stored_covariances import REVISIONS
from slsgu_cli.records.directions import Direction, Statistic
from slsgu_cli.records.method import (
    CovarianceHeader,
    Criterion,
    GradientPointer,
    Ranking,
    UtilityMetric,
)
from slsgu_cli.records.options import BuildRequest, PassOptions, RankOptions, SearchOptions
from slsgu_cli.records.sets import ModelSpec, SetManifest
from slsgu_cli.sets.build import build_sets
from slsgu_cli.store.artifacts import Artifact, read_manifest, read_pointer, read_ranking
from slsgu_cli.store.store import Store


@dataclass
class Listener(progress.Sink):
    """Records the package's messages until the end of the test."""

    heard: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        progress.set_sink(self)

    def note(self, text: str) -> None:
        self.heard.append(text)

    warn = detail = note


def plain_options(**options) -> SearchOptions:
    """Return the paper's search options, along the ranking's direction."""
    paper = {
        "criterion": Criterion.FA1,
        "utility": UtilityMetric.TA1,
        "overshoot": 1.0,
        "max_class_loss": 100.0,
    }
    return SearchOptions(**paper | {"exact": True} | options)


@dataclass(frozen=True)
class World:
    """A store with one set, its model, and the sources it was built from."""

    store: Store
    name: str
    model: ModelSpec
    sources: dict[str, str]

    @property
    def folder(self) -> Path:
        """The model's folder."""
        return Path(self.model.name.removeprefix("local-dir:"))

    @property
    def manifest(self) -> SetManifest:
        return read_manifest(self.store, self.name)

    @property
    def pointer(self) -> GradientPointer:
        return read_pointer(self.store, self.manifest)

    @property
    def ranking(self) -> Ranking:
        return read_ranking(self.store, self.pointer)

    def copied(self, folder: Path) -> "World":
        """Return the same world in its own store."""
        shutil.copytree(self.store.root, folder)
        return replace(self, store=Store(str(folder)))

    def build(self, **changes) -> SetManifest:
        """Build the set, with `changes` to the request; all rows are validation and test rows."""
        request = BuildRequest(
            name=self.name,
            concept=self.name,
            model=self.model,
            sources=[self.sources["pairs"]],
            retain_samples=60,
            test_fraction=0,
            label_column="label",
            evals={name: self.sources[name] for name in ("first", "second")},
            templates=dict.fromkeys(("first", "second"), self.sources["templates"]),
        )
        return build_sets(self.store, replace(request, **changes))

    def grade(self, **options) -> None:
        """Compute the gradients and rank the layers."""
        compute_gradients(self.store, self.name, model=None, options=PassOptions(**options))
        rank(self.store, self.name, options=RankOptions(direction=Direction.GRADIENT))


def lose_covariance(world, layer, revision=REVISIONS[Statistic.INPUTS]):
    """Mark a layer's covariance as not capturable in a given revision of the code."""
    for path in map(Artifact.COVARIANCE.path, world.store.names("covariances", ".safetensors")):
        header = world.store.read_header(path, CovarianceHeader)
        arrays = world.store.read_tensors(path)
        del arrays[layer], header.layers[layer]
        header = replace(header, uncaptured=(layer,), revision=revision)
        world.store.write_tensors(path, arrays, header)
