def neutral_words() -> tuple[str, ...]:
    return ("chair", "tree", "house")


def neutral_prompts() -> tuple[str, ...]:
    return tuple(f"a {w} next to a {v}" for w in neutral_words() for v in neutral_words())
