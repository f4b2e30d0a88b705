"""What a concept becomes in methods that need a word for it."""

# A word for all things, if `grad --to` has named none.
OBJECT = "object"


def anchor_of(chosen: str | None) -> str:
    """Return the anchor of a set, or a word for all things."""
    return OBJECT if chosen is None else chosen
