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

import functools
from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


@functools.cache
def _modules() -> dict[str, str]:
    """Return the module of each public name, as the stub that type checkers read imports it."""
    import ast

    stub = ast.parse(Path(__file__).with_suffix(".pyi").read_text())
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _modules():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_modules()[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_modules()})
