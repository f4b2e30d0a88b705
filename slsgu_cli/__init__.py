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
    from slsgu_cli.clip.model_folder import require_weights as require_weights
    from slsgu_cli.clip.models import device_name as device_name
    from slsgu_cli.clip.models import fingerprint as fingerprint
    from slsgu_cli.clip.models import pick_device as pick_device
    from slsgu_cli.clip.models import resolve as resolve
    from slsgu_cli.errors import SlsguError as SlsguError
    from slsgu_cli.method.edit import FoundEdit as FoundEdit
    from slsgu_cli.method.edit import Presence as Presence
    from slsgu_cli.method.edit import apply as apply
    from slsgu_cli.method.edit import copy_original as copy_original
    from slsgu_cli.method.edit import find_edits as find_edits
    from slsgu_cli.method.evaluate import evaluate as evaluate
    from slsgu_cli.method.export import export as export
    from slsgu_cli.method.gradients import compute_gradients as compute_gradients
    from slsgu_cli.method.ranking import rank as rank
    from slsgu_cli.method.search import search as search
    from slsgu_cli.method.search import search_each as search_each
    from slsgu_cli.progress import Sink as Sink
    from slsgu_cli.progress import set_sink as set_sink
    from slsgu_cli.records.method import Criterion as Criterion
    from slsgu_cli.records.method import Direction as Direction
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
    from slsgu_cli.report.gather import written_fingerprint as written_fingerprint
    from slsgu_cli.report.page import write_report as write_report
    from slsgu_cli.report.study_sections import verified_pair as verified_pair
    from slsgu_cli.sets.build import Preview as Preview
    from slsgu_cli.sets.build import build_sets as build_sets
    from slsgu_cli.sets.build import made_from as made_from
    from slsgu_cli.sets.evaluation_sets import inspect_set as inspect_set
    from slsgu_cli.store.artifacts import Artifact as Artifact
    from slsgu_cli.store.catalog import Catalog as Catalog
    from slsgu_cli.store.catalog import Standing as Standing
    from slsgu_cli.store.files import replacing as replacing
    from slsgu_cli.store.sharing import held as held
    from slsgu_cli.store.store import Store as Store
    from slsgu_cli.study.joint import joint_search as joint_search
    from slsgu_cli.verification.verdicts import conclusion as conclusion
    from slsgu_cli.verification.verdicts import verdict_rows as verdict_rows
    from slsgu_cli.verification.verify import verify as verify

__version__ = "0.1.0"

# The module of each public name. A type checker reads them above.
_FACE = {
    "errors": ("SlsguError",),
    "checkpoints.targets": ("read_target",),
    "clip.model_folder": ("require_weights",),
    "clip.models": ("device_name", "fingerprint", "pick_device", "resolve"),
    "method.edit": ("FoundEdit", "Presence", "apply", "copy_original", "find_edits"),
    "method.evaluate": ("evaluate",),
    "method.export": ("export",),
    "method.gradients": ("compute_gradients",),
    "method.ranking": ("rank",),
    "method.search": ("search", "search_each"),
    "progress": ("Sink", "set_sink"),
    "records.method": ("Direction", "Precision", "Criterion", "Tower"),
    "records.options": (
        "ApplyRequest",
        "BuildRequest",
        "PassOptions",
        "RankOptions",
        "SearchOptions",
    ),
    "removals.recipe": ("Outputs", "Recipe", "RemovalRequest"),
    "removals.running": ("forget", "run"),
    "records.sets": ("ModelSpec",),
    "records.verification": ("VerifyRequest",),
    "report.gather": ("written_fingerprint",),
    "report.page": ("write_report",),
    "report.study_sections": ("verified_pair",),
    "sets.build": ("Preview", "build_sets", "made_from"),
    "sets.evaluation_sets": ("inspect_set",),
    "store.artifacts": ("Artifact",),
    "store.catalog": ("Catalog", "Standing"),
    "store.files": ("replacing",),
    "store.sharing": ("held",),
    "store.store": ("Store",),
    "study.joint": ("joint_search",),
    "verification.verdicts": ("conclusion", "verdict_rows"),
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
