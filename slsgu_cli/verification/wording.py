"""Other words for a concept: templates that its set does not have, other spellings, other names."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from slsgu_cli.errors import UsageError
from slsgu_cli.records.verification import KIND, ProbeFigures, Settings
from slsgu_cli.sets.evaluation_sets import read_templates
from slsgu_cli.store.artifacts import read_manifest
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.store import Store
from slsgu_cli.verification.model import ModelUnderTest

# For people, brands and objects alike; none takes an article.
TEMPLATES = (
    "a photo of {}",
    "a drawing of {}",
    "a sketch of {}",
    "a simple {} symbol",
    "the {} logo",
    "a close-up of {}",
    "an image showing {}",
    "this is {}",
    "a picture with {} in it",
    "what everybody knows as {}",
    "the one and only {}",
    "{}, as seen on the web",
)
TOGETHER = "all templates"
TEMPLATE = "template: "


def unseen_templates(store: Store, name: str, wanted: str | None) -> tuple[str, ...]:
    """Return the built-in templates, or those of a file, that the set `name` does not have.

    Raises UsageError where none is left, MissingError and InputError.
    """
    refs = read_manifest(store, name).evals.values()
    known = {template for ref in refs for template in DataBlock.open(store, ref).templates}
    offered = TEMPLATES if wanted is None else read_templates(wanted)
    unseen = tuple(template for template in dict.fromkeys(offered) if template not in known)
    if not unseen:
        raise UsageError(
            f"every template of --templates {wanted} is one that {name} is measured with",
            hint="give templates that the set does not have",
        )
    return unseen


def paraphrase(model: ModelUnderTest, settings: Settings) -> list[ProbeFigures]:
    """Measure with all unseen templates together, and with each alone."""
    sets = model.evaluation.utility
    everything = {model.names, *(group.names for group in sets.values())}
    alone = {names: _alone(model, names, settings.templates) for names in sorted(everything)}
    together = {names: F.normalize(each.sum(dim=0), dim=-1) for names, each in alone.items()}
    utility = {
        name: group.accuracy(group.images.features, together[group.names])
        for name, group in sets.items()
    }
    probes = [ProbeFigures(TOGETHER, model.forget_accuracy(together[model.names]), utility)]
    for template, embeddings in zip(settings.templates, alone[model.names], strict=True):
        probes.append(ProbeFigures(TEMPLATE + template, model.forget_accuracy(embeddings)))
    return probes


def _alone(model: ModelUnderTest, names: tuple[str, ...], templates: tuple[str, ...]) -> Tensor:
    """Return the class embeddings by each template alone, (templates, classes, width)."""
    return torch.stack([model.classes(names, (template,)) for template in templates])


# Of each kind of typing error, how many are drawn, and the keys that are beside each other.
TYPOS = 3
KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
SHORTEST_PART = 2


def spelling(model: ModelUnderTest, settings: Settings) -> list[ProbeFigures]:
    """Measure with other spellings in the place of the name, and with other names.

    What the tokenizer takes for the name itself is left out.
    """
    name = model.names[model.concept_class]
    listed = [*spellings(name, seed=settings.seed)]
    listed += [("alias", alias) for alias in settings.aliases]
    listed += [(kind, text) for kind, _, text in (s.partition(KIND) for s in settings.spellings)]
    own, *rows = model.tokenize([name, *(text for _, text in listed)])
    others = [pair for pair, row in zip(listed, rows, strict=True) if (row != own).any()]
    if not others:
        return []
    embeddings = model.classes(tuple(text for _, text in others), model.templates)
    return [
        ProbeFigures(f"{kind}{KIND}{text}", model.called(embedding))
        for (kind, text), embedding in zip(others, embeddings, strict=True)
    ]


def spellings(name: str, *, seed: int) -> Iterator[tuple[str, str]]:
    """Yield kinds and texts of other spellings of a name, each text once.

    Typing errors are drawn by seed: two letters in the wrong order, one left out, one
    doubled, one from the key beside it. The others are all there are: the word in two, or
    two words as one, capitals, plural, possessive, and the name said twice.
    """
    known = {name}
    for kind, text in (*_typos(name, np.random.default_rng(seed)), *_forms(name)):
        if text not in known:
            known.add(text)
            yield kind, text


def _typos(name: str, generator: np.random.Generator) -> Iterator[tuple[str, str]]:
    letters = [place for place, letter in enumerate(name) if letter.isalnum()]
    pairs = [place for place in letters if name[place + 1 : place + 2].isalnum()]
    changes: dict[str, tuple[list[int], Callable[[int], str]]] = {
        "swapped": (pairs, lambda i: name[:i] + name[i + 1] + name[i] + name[i + 2 :]),
        "dropped": (letters, lambda i: name[:i] + name[i + 1 :]),
        "doubled": (letters, lambda i: name[: i + 1] + name[i:]),
        "mistyped": (
            [place for place in letters if _beside(name[place])],
            lambda i: name[:i] + str(generator.choice(list(_beside(name[i])))) + name[i + 1 :],
        ),
    }
    for kind, (places, change) in changes.items():
        texts = [change(place) for place in generator.permutation(places).tolist()]
        some = [text for text in dict.fromkeys(texts) if text.strip() and text != name][:TYPOS]
        yield from ((kind, text) for text in some)


def _beside(letter: str) -> str:
    """Return the letters on the keys left and right of one; nothing for what is on no key."""
    row = next((row for row in KEYS if letter.lower() in row), "")
    place = row.find(letter.lower())
    return row[max(0, place - 1) : place] + row[place + 1 : place + 2] if row else ""


def _forms(name: str) -> Iterator[tuple[str, str]]:
    for place in range(SHORTEST_PART, len(name) - SHORTEST_PART + 1):
        if name[place - SHORTEST_PART : place + SHORTEST_PART].isalnum():
            yield from (("split", name[:place] + mark + name[place:]) for mark in " -")
    yield from (("joined", name.replace(" ", mark)) for mark in ("", "-"))
    yield from (("case", text) for text in (name.lower(), name.upper(), name.title()))
    yield from (("form", name + ending) for ending in ("s", "'s"))
    yield "twice", f"{name} {name}"
