"""The layers that compete: matrices and norms of both towers, by their names in open_clip."""

import re
from collections.abc import Iterable

VISION, TEXT = "vision", "text"

# Parts of a parameter name that rule it out: biases, scales, embeddings looked up by position or
# token, and the queries of attention pools are no layers in the sense of the method.
_EXCLUDED = re.compile(
    r"bias|logit_scale|position|pos_embed|token_embedding|class_embedding|embeddings\."
    r"|embed_tokens|(^|\.)shared\.weight$|(^|\.)(latent|query)$"
    r"|cls_token|cls_emb|reg_token|mask_token|(^|\.)ls_?\d\.gamma|(^|\.)gamma(_\d)?$"
)
_NEITHER = re.compile(r"^(text_decoder\.|logit_)")


def tower_of(name: str) -> str | None:
    """Return which tower a parameter belongs to; None for a parameter of neither."""
    if _NEITHER.match(name):
        return None
    return VISION if name.startswith("visual.") else TEXT


def is_candidate(name: str) -> bool:
    """Return whether a parameter may be edited: matrices and norms of both towers."""
    return tower_of(name) is not None and not _EXCLUDED.search(name)


def candidates(names: Iterable[str]) -> list[str]:
    """Return the layers that may be edited among a model's parameters, sorted."""
    return sorted(filter(is_candidate, names))
