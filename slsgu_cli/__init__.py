"""Single layer, single gradient unlearning for CLIP and the models built on it.

The verbs of the command line and the records they take, for programs:

    import slsgu_cli as slsgu

    store = slsgu.Store("slsgu-store")
    slsgu.compute_gradients(store, "facebook")
    slsgu.rank(store, "facebook")
    slsgu.search(store, "facebook")
    slsgu.apply(store, slsgu.ApplyRequest(names=["facebook"], out=Path("edited-clip")))

A name is imported when it is first used. What a verb tells on its way goes to the sink that
`set_sink` sets; what goes wrong is an `SlsguError`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slsgu_cli.engine.apply import apply as apply
    from slsgu_cli.engine.evaluate import evaluate as evaluate
    from slsgu_cli.engine.gradients import compute_gradients as compute_gradients
    from slsgu_cli.engine.ranking import rank as rank
    from slsgu_cli.engine.search import search as search
    from slsgu_cli.errors import SlsguError as SlsguError
    from slsgu_cli.method.directions.gradient import Gradient as Gradient
    from slsgu_cli.method.directions.whitened import Whitened as Whitened
    from slsgu_cli.method.evaluation import LabelledImages as LabelledImages
    from slsgu_cli.method.evaluation import ZeroShot as ZeroShot
    from slsgu_cli.method.unlearn import unlearn as unlearn
    from slsgu_cli.progress import Sink as Sink
    from slsgu_cli.progress import set_sink as set_sink
    from slsgu_cli.recipes import forget as forget
    from slsgu_cli.recipes import run as run
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
    from slsgu_cli.records.recipe import Outputs as Outputs
    from slsgu_cli.records.recipe import Recipe as Recipe
    from slsgu_cli.records.recipe import RemovalRequest as RemovalRequest
    from slsgu_cli.records.sets import ModelSpec as ModelSpec
    from slsgu_cli.records.verification import VerifyRequest as VerifyRequest
    from slsgu_cli.sets.build import build_sets as build_sets
    from slsgu_cli.store.store import Store as Store
    from slsgu_cli.verification.verify import verify as verify

__version__ = "0.1.0"

# Where each name of the face is: what a type checker reads above.
_FACE = {
    "errors": ("SlsguError",),
    "engine.apply": ("apply",),
    "engine.evaluate": ("evaluate",),
    "method.directions.gradient": ("Gradient",),
    "method.directions.whitened": ("Whitened",),
    "method.evaluation": ("LabelledImages", "ZeroShot"),
    "engine.gradients": ("compute_gradients",),
    "method.unlearn": ("unlearn",),
    "engine.ranking": ("rank",),
    "engine.search": ("search",),
    "progress": ("Sink", "set_sink"),
    "records.directions": ("Direction", "DirectionSpec"),
    "records.method": ("Precision", "Criterion", "Tower"),
    "records.options": (
        "ApplyRequest",
        "BuildRequest",
        "PassOptions",
        "RankOptions",
        "SearchOptions",
    ),
    "recipes": ("forget", "run"),
    "records.recipe": ("Outputs", "Recipe", "RemovalRequest"),
    "records.sets": ("ModelSpec",),
    "records.verification": ("VerifyRequest",),
    "sets.build": ("build_sets",),
    "store.store": ("Store",),
    "verification.verify": ("verify",),
}
_ROOMS = {name: room for room, names in _FACE.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a name of the face when it is first used."""
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS})
