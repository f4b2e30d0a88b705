"""A model under test with the data of a world, as `verify` opens it."""

from slsgu_cli.clip.loading import load
from slsgu_cli.clip.models import resolve
from slsgu_cli.records.verification import Settings
from slsgu_cli.verification.model import open_model


def opened(world, *, change=None):
    """Return the world's model; with `change`, a changed one and its original."""
    resolved = resolve(world.model)
    module = load(resolved, "cpu")
    if change:
        change(module)
    return open_model(
        world.store,
        world.manifest,
        module,
        resolved,
        settings=Settings(rows=30),
        device="cpu",
        original=(lambda: opened(world)) if change else None,
    )
