"""Parts of a set that are made from words alone: captions, and a stand-in for each image."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slsgu_cli import progress
from slsgu_cli.clip.batches import text_features, to_tokens
from slsgu_cli.clip.devices import pick_device
from slsgu_cli.clip.loading import load
from slsgu_cli.clip.models import ResolvedModel, fingerprint
from slsgu_cli.clip.towers import text_tower
from slsgu_cli.errors import InputError
from slsgu_cli.method.stand_ins import stand_ins
from slsgu_cli.records.codec import encode
from slsgu_cli.records.options import BuildRequest
from slsgu_cli.records.sets import PROMPTS, DataRef
from slsgu_cli.records.words import WordList, alone, read_words, with_attribute
from slsgu_cli.sets.context import BuildContext, block_path, reference, text_digest
from slsgu_cli.sets.pairs import TAKE, Selection, first_pass, rules
from slsgu_cli.sets.sampling import priority
from slsgu_cli.sources.neutral import neutral_prompts, neutral_words
from slsgu_cli.sources.prompts import DEFAULT_TEMPLATES, find_class, read_classes, read_templates
from slsgu_cli.sources.texts import tokenizable
from slsgu_cli.store.blocks import DIGEST_BYTES, DataBlock, row_writer
from slsgu_cli.store.locks import held

# Other things with an attribute, and other attributes of its thing, to retain.
MIXED = 100


@dataclass(frozen=True, slots=True)
class Captions:
    """The captions of a part, with their classes (-1 for none), and how many were refused."""

    texts: Sequence[str]
    labels: Sequence[int]
    seen: int
    refused: Counter[str] = field(default_factory=Counter)
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class WordParts:
    """Builds the parts of one set from words."""

    context: BuildContext
    model: ResolvedModel
    request: BuildRequest
    retain_source: Selection | None
    words: WordList = field(init=False)
    templates: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Read the words and templates. Raises MissingError or InputError."""
        words = self.request.word_list
        name = self.request.templates.get(PROMPTS) or DEFAULT_TEMPLATES
        object.__setattr__(self, "words", words)
        object.__setattr__(self, "templates", read_templates(name))
        empty, *tokens = self.context.tokenize(["", *words.patterns])
        for name, row in zip(words.patterns, tokens, strict=True):
            if (row == empty).all():
                raise InputError(
                    f"the tokenizer of {self.model.spec} makes no token of {name!r}",
                    hint="write the word with letters that the model knows",
                )

    def build(self) -> dict[str, DataRef]:
        """Build forget and retain rows, and prompts to classify if there is no evaluation set."""
        parts = {"forget": self._forget(), "retain": self._retained}
        if not self.request.evals:
            parts[PROMPTS] = self._prompts()
        return {role: self._block(role, captions) for role, captions in parts.items()}

    def _forget(self) -> Captions:
        """Return each word in each template, and the descriptions."""
        texts = [*self._captions(self.words.patterns), *map(tokenizable, self.words.descriptions)]
        most = self.request.max_forget or len(texts)
        order = sorted(texts, key=lambda text: priority(self.request.seed, text))
        chosen = set(order[:most])
        rows = [text for text in texts if text in chosen]
        beyond = Counter({"beyond --max-forget": len(texts) - len(rows)})
        return Captions(rows, [-1] * len(rows), len(texts), beyond)

    @cached_property
    def _retained(self) -> Captions:
        """Return captions of the retain source, of the class names, or neutral ones."""
        request = self.request
        if self.retain_source is not None:
            first_pass(self.retain_source.readers, [self.retain_source], request.seed)
            ranked = [each.caption for each in self.retain_source.sample.ranked()]
            texts, seen = list(dict.fromkeys(ranked)), self.retain_source.seen
            refused = self.retain_source.refused
        else:
            _, rule = rules(request)
            classes = self._classes
            every = self._captions(classes) if classes else list(neutral_prompts())
            verdicts = [rule(text) for text in every]
            texts = [text for text, why in zip(every, verdicts, strict=True) if why == TAKE]
            texts.sort(key=lambda text: priority(request.seed, text))
            seen, refused = len(every), Counter(why for why in verdicts if why)
        elsewhere = self._captions(self._elsewhere)
        texts, seen = list(dict.fromkeys([*elsewhere, *texts])), seen + len(elsewhere)
        if not texts:
            raise InputError(
                f"no caption is left to retain of {seen}", hint="name others with --retain-source"
            )
        rows = texts[: request.retain_samples]
        return Captions(rows, [-1] * len(rows), seen, refused)

    def _prompts(self) -> Captions:
        """Return the prompts of all classes, those of the words included."""
        names = list(self._classes or neutral_words())
        more = (*self._elsewhere, *self.words.names)
        names += [name for name in more if find_class(names, name) is None]
        texts = self._captions(names)
        labels = np.repeat(np.arange(len(names)), len(self.templates)).tolist()
        about = {"class_names": names, "templates": list(self.templates)}
        return Captions(texts, labels, len(texts), attributes=about)

    @cached_property
    def _classes(self) -> tuple[str, ...]:
        listed = self.request.classes.get(PROMPTS)
        classes = read_classes(listed) if listed else None
        return classes.names if classes else ()

    @cached_property
    def _elsewhere(self) -> tuple[str, ...]:
        """The thing, its other attributes, and the attributes alone and of other things."""
        thing, attributes = self.request.thing, read_words(self.request.words).names
        if thing is None:
            return ()
        names = {thing, *map(alone, attributes)}
        others = [name for name in self._classes or neutral_words() if name not in names]
        others.sort(key=lambda name: priority(self.request.seed, name))
        mixed = [
            text
            for other in others[:MIXED]
            for each in attributes
            for text in (
                with_attribute(other, each),
                with_attribute(thing, each.replace(alone(each), other)),
            )
        ]
        return tuple(dict.fromkeys([thing, *map(alone, attributes), *mixed]))

    def _captions(self, names: Sequence[str]) -> list[str]:
        return [
            tokenizable(template.replace("{}", name))
            for name in names
            for template in self.templates
        ]

    def _block(self, role: str, captions: Captions) -> DataRef:
        """Write the block of a part, or reuse an earlier one."""
        recipe = {
            "role": role,
            "captions": text_digest(captions.texts),
            "retained": text_digest(self._retained.texts),
            "model": self._weights,
            "about": captions.attributes,
        }
        path = block_path(recipe)
        with held(self.context.store, path, what=f"{role} rows"):
            block = self.context.existing_block(path)
            if block is None:
                self._write(path, role, captions, recipe)
                block = DataBlock.at(self.context.store, path)
            else:
                progress.note(f"{role}: reusing {block.rows} rows of words")
        refused = captions.refused
        return reference(path, block, seen=captions.seen, refused=refused, sources=("words",))

    def _write(self, path: str, role: str, captions: Captions, recipe: dict[str, Any]) -> None:
        tokens = self.context.tokenize(captions.texts)
        features = stand_ins(self._features(tokens), self._retained_features).cpu().numpy()
        shape, rows = features.shape[1:], len(features)
        with row_writer(self.context.store, path, shape=shape, rows=rows) as writer:
            columns = zip(captions.texts, captions.labels, features, strict=True)
            for number, (text, label, feature) in enumerate(columns):
                digest = blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()
                key = f"{role}-{number:05d}"
                writer.add(feature, key=key, caption=text, label=label, source_digest=digest)
            attributes = {
                "role": role,
                "sources": ["words"],
                "seen": captions.seen,
                "refused": dict(captions.refused),
                "input": encode(self.context.spec),
                "recipe": recipe,
                "model": self._weights,
                **captions.attributes,
            }
            writer.finish(None if role == PROMPTS else tokens, attributes)

    @cached_property
    def _retained_features(self) -> Tensor:
        return self._features(self.context.tokenize(self._retained.texts))

    def _features(self, tokens: Any) -> Tensor:
        """Return the unit features of texts by the original model."""
        with torch.no_grad():
            return text_features(self._tower, to_tokens(tokens, "cpu"), self._device)

    @cached_property
    def _tower(self) -> Any:
        return text_tower(load(self.model, self._device))

    @cached_property
    def _device(self) -> str:
        return pick_device(self.request.screening.device)

    @cached_property
    def _weights(self) -> str:
        return fingerprint(self.model)
