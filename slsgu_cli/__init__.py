"""Single layer, single gradient unlearning for CLIP and the models built on it.

The commands as functions, and the records they take:

    import slsgu_cli as slsgu

    store = slsgu.Store("slsgu-store")
    slsgu.compute_gradients(store, "facebook")
    slsgu.rank(store, "facebook")
    slsgu.search(store, "facebook")
    slsgu.apply(store, slsgu.ApplyRequest(names=["facebook"], out=Path("edited-clip")))

A name is imported when it is first used. Progress goes to the sink that `set_sink` sets;
errors are subclasses of `SlsguError`. `slsgu_cli.removals` uses this interface alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slsgu_cli.checkpoints.targets import read_target as read_target
    from slsgu_cli.clip.devices import device_name as device_name
    from slsgu_cli.clip.devices import pick_device as pick_device
    from slsgu_cli.clip.model_folder import require_weights as require_weights
    from slsgu_cli.clip.models import fingerprint as fingerprint
    from slsgu_cli.clip.models import resolve as resolve
    from slsgu_cli.engine.apply import apply as apply
    from slsgu_cli.engine.apply import copy_original as copy_original
    from slsgu_cli.engine.evaluate import evaluate as evaluate
    from slsgu_cli.engine.export import export as export
    from slsgu_cli.engine.find_edits import FoundEdit as FoundEdit
    from slsgu_cli.engine.find_edits import Presence as Presence
    from slsgu_cli.engine.find_edits import find_edits as find_edits
    from slsgu_cli.engine.gradients import compute_gradients as compute_gradients
    from slsgu_cli.engine.ranking import rank as rank
    from slsgu_cli.engine.search import search as search
    from slsgu_cli.engine.search import search_each as search_each
    from slsgu_cli.errors import SlsguError as SlsguError
    from slsgu_cli.method.directions.gradient import Gradient as Gradient
    from slsgu_cli.method.directions.whitened import Whitened as Whitened
    from slsgu_cli.method.evaluation import LabelledImages as LabelledImages
    from slsgu_cli.method.evaluation import ZeroShot as ZeroShot
    from slsgu_cli.method.unlearn import unlearn as unlearn
    from slsgu_cli.progress import Sink as Sink
    from slsgu_cli.progress import set_sink as set_sink
    from slsgu_cli.records.directions import Direction as Direction
    from slsgu_cli.records.directions import DirectionSpec as DirectionSpec
    from slsgu_cli.records.method import Criterion as Criterion
    from slsgu_cli.records.method import Precision as Precision
    from slsgu_cli.records.method import Tower as Tower
    from slsgu_cli.records.options import ApplyRequest as ApplyRequest
    from slsgu_cli.records.options import BuildRequest as BuildRequest
    from slsgu_cli.records.options import PassOptions as PassOptions
    from slsgu_cli.records.options import RankOptions as RankOptions
    from slsgu_cli.records.options import SearchOptions as SearchOptions
    from slsgu_cli.records.sets import ModelSpec as ModelSpec
    from slsgu_cli.records.verification import VerifyRequest as VerifyRequest
    from slsgu_cli.removals.recipe import Outputs as Outputs
    from slsgu_cli.removals.recipe import Recipe as Recipe
    from slsgu_cli.removals.recipe import RemovalRequest as RemovalRequest
    from slsgu_cli.removals.running import forget as forget
    from slsgu_cli.removals.running import run as run
    from slsgu_cli.report.page import write_report as write_report
    from slsgu_cli.report.verification_sections import verified_pair as verified_pair
    from slsgu_cli.report.written import written_fingerprint as written_fingerprint
    from slsgu_cli.sets.build import build_sets as build_sets
    from slsgu_cli.sets.inspection import inspect_set as inspect_set
    from slsgu_cli.sets.preview import Preview as Preview
    from slsgu_cli.sets.source_digest import source_digest as source_digest
    from slsgu_cli.store.artifacts import Artifact as Artifact
    from slsgu_cli.store.atomic import replacing as replacing
    from slsgu_cli.store.catalog import Catalog as Catalog
    from slsgu_cli.store.catalog import Standing as Standing
    from slsgu_cli.store.locks import held as held
    from slsgu_cli.store.store import Store as Store
    from slsgu_cli.study.joint import joint_search as joint_search
    from slsgu_cli.verification.results import conclusion as conclusion
    from slsgu_cli.verification.results import verdict_rows as verdict_rows
    from slsgu_cli.verification.verify import verify as verify

__version__ = "0.1.0"

# The module of each public name. A type checker reads them above.
_FACE = {
    "checkpoints.targets": ("read_target",),
    "clip.devices": (
        "device_name",
        "pick_device",
    ),
    "clip.model_folder": ("require_weights",),
    "clip.models": (
        "fingerprint",
        "resolve",
    ),
    "engine.apply": (
        "apply",
        "copy_original",
    ),
    "engine.evaluate": ("evaluate",),
    "engine.export": ("export",),
    "engine.find_edits": (
        "FoundEdit",
        "Presence",
        "find_edits",
    ),
    "engine.gradients": ("compute_gradients",),
    "engine.ranking": ("rank",),
    "engine.search": (
        "search",
        "search_each",
    ),
    "errors": ("SlsguError",),
    "method.directions.gradient": ("Gradient",),
    "method.directions.whitened": ("Whitened",),
    "method.evaluation": (
        "LabelledImages",
        "ZeroShot",
    ),
    "method.unlearn": ("unlearn",),
    "progress": (
        "Sink",
        "set_sink",
    ),
    "records.directions": (
        "Direction",
        "DirectionSpec",
    ),
    "records.method": (
        "Criterion",
        "Precision",
        "Tower",
    ),
    "records.options": (
        "ApplyRequest",
        "BuildRequest",
        "PassOptions",
        "RankOptions",
        "SearchOptions",
    ),
    "records.sets": ("ModelSpec",),
    "records.verification": ("VerifyRequest",),
    "removals.recipe": (
        "Outputs",
        "Recipe",
        "RemovalRequest",
    ),
    "removals.running": (
        "forget",
        "run",
    ),
    "report.page": ("write_report",),
    "report.verification_sections": ("verified_pair",),
    "report.written": ("written_fingerprint",),
    "sets.build": ("build_sets",),
    "sets.inspection": ("inspect_set",),
    "sets.preview": ("Preview",),
    "sets.source_digest": ("source_digest",),
    "store.artifacts": ("Artifact",),
    "store.atomic": ("replacing",),
    "store.catalog": (
        "Catalog",
        "Standing",
    ),
    "store.locks": ("held",),
    "store.store": ("Store",),
    "study.joint": ("joint_search",),
    "verification.results": (
        "conclusion",
        "verdict_rows",
    ),
    "verification.verify": ("verify",),
}
_ROOMS = {name: room for room, names in _FACE.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS})
