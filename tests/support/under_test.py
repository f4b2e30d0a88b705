"""A model under test with the data of a world, as `verify` opens it."""

from slsgu_cli.clip.loading import load
from slsgu_cli.clip.models import resolve
from slsgu_cli.clip.tokenizers import token_words, tokenizer
from slsgu_cli.clip.towers import text_tower
from slsgu_cli.records.verification import Settings
from slsgu_cli.verification.model import open_model


def opened(world, *, change=None, words=None):
    """Return the world's model; with a `change`, the changed model and the original."""
    resolved = resolve(world.model)
    module = load(resolved, "cpu")
    if change:
        change(module)
    model = open_model(
        world.store,
        world.manifest,
        module,
        tokenize=tokenizer(resolved),
        settings=Settings(rows=30),
        device="cpu",
        is_original=change is None,
        words=lambda: words or token_words(resolved),
    )
    if change:
        model.original_text = lambda: text_tower(load(resolved, "cpu"))
    model.evaluation.base_pass((), cache_bytes=0)
    return model
