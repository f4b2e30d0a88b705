"""Words that are searched for, bred or learnt to find a forgotten concept, and their controls.

A search over words also finds what they do not name, in a model that forgot nothing as in one
that did. So each is made again without the name, and what counts is what the name adds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from slsgu_cli.clip.batches import to_tokens
from slsgu_cli.clip.metrics import accuracies, ranks_of_truth
from slsgu_cli.records.figures import Accuracy
from slsgu_cli.records.verification import IMAGES, MADE_UP, NEUTRAL, OWN, RANDOM, Attempt, Settings
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.verification.model import LeftOut, ModelUnderTest, Training, Words
from slsgu_cli.verification.probes import TEMPLATES

# How many of the set's templates a search uses, and images of the forget set.
PROMPTS, SEARCHED = 8, 128
# How many words are promising enough for each place, and exchanges tried a step.
PROMISING, EXCHANGES = 256, 64
NEUTRAL_WORDS = ("thing", "item", "stuff")
Loss = Callable[[Tensor], Tensor]


def named(model: ModelUnderTest) -> dict[str, str]:
    """Return the concept's name and a word that names nothing, by what they are."""
    names = set(model.names)
    neutral = next((word for word in NEUTRAL_WORDS if word not in names), NEUTRAL_WORDS[0])
    return {OWN: model.names[model.concept_class], NEUTRAL: neutral}


@dataclass(frozen=True, slots=True)
class FreePrompts:
    """Prompts for a model in which some of `words`, one behind the other, are left open.

    `texts` have `{}` where they go, which is at `places` (prompts, words) of `tokens`
    (prompts, length).
    """

    model: ModelUnderTest
    words: Words
    texts: tuple[str, ...]
    tokens: Tensor
    places: Tensor

    @property
    def size(self) -> int:
        """How many words are left open."""
        return self.places.shape[1]

    def drawn(self, generator: np.random.Generator, rows: int) -> Tensor:
        """Return rows of words drawn evenly, with repetition, (rows, words)."""
        vocabulary = torch.tensor(list(self.words))
        drawn = generator.integers(0, len(vocabulary), (rows, self.size))
        return vocabulary[torch.from_numpy(drawn)]

    def spelt(self, ids: Tensor) -> str:
        """Return the text of some words (words,)."""
        return " ".join(self.words[number] for number in ids.tolist())

    def filled(self, ids: Tensor) -> Tensor:
        """Return the prompts with each row of `ids` (n, words): (n, prompts, length)."""
        rows = self.tokens.repeat(len(ids), 1, 1)
        wanted = ids.unsqueeze(1).expand(-1, len(self.tokens), -1)
        return rows.scatter_(2, self.places.expand(len(ids), -1, -1), wanted)

    def embeddings(self, ids: Tensor) -> Tensor:
        """Return the class embedding that each row of `ids` (n, words) gives, (n, width)."""
        rows = self.filled(ids)
        features = self.model.text_features(rows.flatten(0, 1).numpy())
        return F.normalize(features.view(*rows.shape[:2], -1).sum(dim=1), dim=-1)

    def reads_back(self, ids: Tensor, text: str) -> bool:
        """Return whether the prompts with `text` are the ones with `ids` (words,)."""
        tokens = self.model.tokenize([prompt.replace("{}", text) for prompt in self.texts])
        return bool((to_tokens(tokens, "cpu") == self.filled(ids.unsqueeze(0))[0]).all())

    def least(self, rows: Tensor, losses: Tensor) -> tuple[Tensor, str, float] | None:
        """Return the words of least loss that their text is read as, the text and the loss."""
        for index in losses.argsort(stable=True).tolist():
            text = self.spelt(rows[index])
            if self.reads_back(rows[index], text):
                return rows[index], text, float(losses[index])
        return None


def free_prompts(
    model: ModelUnderTest, texts: Sequence[str], size: int, words: Words
) -> FreePrompts:
    """Leave `size` words open where texts have `{}`. Raises LeftOut where none has the room."""
    present = {*model.tokenize([text.replace("{}", "") for text in texts]).flatten().tolist()}
    some = [number for number in words if number not in present][:size]
    filling = " ".join(words[number] for number in some)
    prompts = [text.replace("{}", filling) for text in texts]
    tokens = to_tokens(model.tokenize(prompts), "cpu")
    longer = to_tokens(model.tokenize([f"{prompt} {words[some[0]]}" for prompt in prompts]), "cpu")
    if size >= tokens.shape[1]:
        raise LeftOut(f"its texts have {tokens.shape[1]} tokens, and {size} words are too many")
    here = (tokens.unfold(1, size, 1) == torch.tensor(some)).all(dim=2)
    # A prompt that is full stays the same when a word is added.
    usable = (here.sum(dim=1) == 1) & (tokens != longer).any(dim=1)
    if not usable.any():
        raise LeftOut(f"no prompt of its {tokens.shape[1]} tokens has room for {size} words more")
    places = here[usable].int().argmax(dim=1, keepdim=True) + torch.arange(size)
    kept = tuple(text for text, whole in zip(texts, usable.tolist(), strict=True) if whole)
    return FreePrompts(model, words, kept, tokens[usable], places)


def recognition_loss(model: ModelUnderTest, images: Tensor) -> Loss:
    """Return what tells class embeddings (n, width) how ill they name `images`, (n,).

    It is the mean cross-entropy of the concept's class among all, the others called what
    they are: log(1 + exp(rest - s)), where s is an image's logit by the embedding and rest
    the log-sum-exp of its other logits.
    """
    rest = _other_logits(model, images).logsumexp(dim=1, keepdim=True)
    return lambda embeddings: F.softplus(rest - model.scale * images @ embeddings.T).mean(dim=0)


def _other_logits(model: ModelUnderTest, images: Tensor) -> Tensor:
    """Return the logits of images (n, width) by all classes but the concept's."""
    embeddings = model.evaluation.forget.prompts.embeddings
    others = torch.arange(len(embeddings), device=embeddings.device) != model.concept_class
    return model.scale * images @ embeddings[others].T


def prefix(model: ModelUnderTest, settings: Settings) -> list[Attempt]:
    """Search words before the name by which the forget set is recognised best.

    The same search is made before a word that names nothing. All start from the same
    words, drawn by seed.
    """
    words, table, block = model.free_words(), model.token_table(), model.forget
    rows = np.random.default_rng(settings.seed).permutation(block.rows)[:SEARCHED]
    loss = recognition_loss(model, model.image_features(block.take(np.sort(rows))))
    some = model.templates[:: -(-len(model.templates) // PROMPTS)]
    attempts: list[Attempt] = []

    def searched(start: int, name: str, word: str, prompts: FreePrompts) -> list[Attempt]:
        generator = np.random.default_rng((settings.seed, start))
        search = WordSearch(prompts, table, loss, generator)
        text, value, tried = search.run(settings.attack_steps)
        (embedding,) = model.classes((f"{text} {word}",), model.templates)
        return [Attempt(name, f"{text} {word}", value, model.called(embedding), tried)]

    for name, word in named(model).items():
        texts = [template.replace("{}", f"{{}} {word}") for template in some]
        prompts = free_prompts(model, texts, settings.attack_tokens, words)
        for start in range(settings.attack_starts):
            attempts += model.parts.made(1, partial(searched, start, name, word, prompts))
    return attempts


@dataclass(frozen=True, slots=True)
class WordSearch:
    """Greedy coordinate search of the open words (as in GCG, arXiv 2307.15043).

    One word is exchanged a step. The loss's slope in the words' embeddings names the
    promising ones for each place; of some exchanges, drawn among these, the loss is
    computed, and the least is gone on from, be it more than the last. The best is kept.
    """

    prompts: FreePrompts
    table: Tensor
    loss: Loss
    generator: np.random.Generator

    def run(self, steps: int) -> tuple[str, float, tuple[str, ...]]:
        """Return the best text found, its loss, and those gone on from, each once."""
        (ids,) = self.prompts.drawn(self.generator, 1)
        best = self.prompts.spelt(ids), float(self.losses(ids.unsqueeze(0))[0])
        tried = []
        for _ in range(steps):
            ids, text, loss = self._exchanged(ids)
            tried.append(text)
            if loss < best[1]:
                best = text, loss
            self.prompts.model.tick()
        return *best, tuple(dict.fromkeys(tried))

    def losses(self, ids: Tensor) -> Tensor:
        """Return the loss of each row of words (n, words)."""
        return self.loss(self.prompts.embeddings(ids)).cpu()

    def slopes(self, ids: Tensor) -> Tensor:
        """Return the slope of the loss in each open word's embedding, (words, width).

        By its product with a row of the token table, it is that in the word's one-hot code.
        """
        tower = self.prompts.model.evaluation.text
        tokens = tower.trim(self.prompts.filled(ids.unsqueeze(0))[0]).to(self.table.device)
        with torch.enable_grad():
            entering = tower.embed(tokens).detach().requires_grad_()
            features = tower.features(entering, tokens, 0)
            loss = self.loss(F.normalize(features.sum(dim=0, keepdim=True), dim=-1)).sum()
            (slope,) = torch.autograd.grad(loss, entering)
        rows = torch.arange(len(tokens)).unsqueeze(1)
        return slope[rows, self.prompts.places].sum(dim=0)

    def _exchanged(self, ids: Tensor) -> tuple[Tensor, str, float]:
        """Return the best of some exchanges of one word, its text and its loss."""
        vocabulary = torch.tensor(list(self.prompts.words))
        falling = -self.slopes(ids) @ self.table[vocabulary.to(self.table.device)].T
        promising = falling.topk(min(PROMISING, len(vocabulary)), dim=1).indices.cpu()
        places = torch.from_numpy(self.generator.integers(0, len(ids), EXCHANGES))
        choices = torch.from_numpy(self.generator.integers(0, promising.shape[1], EXCHANGES))
        tried = ids.repeat(EXCHANGES, 1)
        tried[torch.arange(EXCHANGES), places] = vocabulary[promising[places, choices]]
        best = self.prompts.least(tried, self.losses(tried))
        return best or (ids, self.prompts.spelt(ids), float("inf"))


# Ring-A-Bell: words in a text, how far along the concept's vector, and how texts are bred.
LENGTH, COEFFICIENT = 16, 3.0


def ring_a_bell(model: ModelUnderTest, settings: Settings) -> list[Attempt]:
    """Breed texts without the name until they come near to what it meant to the original.

    The target is the mean text feature without the name plus 3 times what the name adds to
    it, in the original model (Ring-A-Bell, arXiv 2310.10012); the text's feature is that of
    the model under test. The same is done for a word that names nothing. The nearest of the
    first texts, which are random, stands beside them.
    """
    room = model.tokenize(["a"]).shape[1] - 3
    prompts = free_prompts(model, ["{}"], min(LENGTH, room), model.free_words())
    attempts: list[Attempt] = []

    def bred(name: str, target: Tensor) -> list[Attempt]:
        generator = np.random.default_rng(settings.seed)
        breeding = Breeding(prompts, target, generator)
        first, last = breeding.run(settings.population, settings.generations)
        nearest = _bred(model, name, *last)
        return [nearest, _bred(model, RANDOM, *first)] if name == OWN else [nearest]

    for name, target in meanings(model, named(model)).items():
        attempts += model.parts.made(2 if name == OWN else 1, partial(bred, name, target))
    return attempts


def meanings(model: ModelUnderTest, words: Mapping[str, str]) -> dict[str, Tensor]:
    """Return for each word the unit feature (width,) that it leads to in the original model."""
    tower = model.original_text() if model.original_text else model.evaluation.text

    def mean(word: str) -> Tensor:
        texts = [" ".join(template.replace("{}", word).split()) for template in TEMPLATES]
        return model.text_features(model.tokenize(texts), tower).mean(dim=0)

    without = mean("")
    return {
        name: F.normalize(without + COEFFICIENT * (mean(word) - without), dim=0)
        for name, word in words.items()
    }


def _bred(model: ModelUnderTest, name: str, text: str, distance: float) -> Attempt:
    (feature,) = model.text_features(model.tokenize([text]))
    return Attempt(name, text, distance, model.called(feature))


@dataclass(frozen=True, slots=True)
class Breeding:
    """A genetic search for the text whose feature is nearest to a target.

    Of each generation the nearer half stays. Its pairs have children: the beginning of one
    text and the end of another, in which each word is another one with a probability.
    """

    prompts: FreePrompts
    target: Tensor
    generator: np.random.Generator

    def run(self, population: int, generations: int) -> tuple[tuple[str, float], ...]:
        """Return the nearest text of the first generation and of the last, each with 1 - cosine."""
        texts = self.prompts.drawn(self.generator, population)
        distances = self.distances(texts)
        first = self._nearest(texts, distances)
        for _ in range(generations):
            kept = distances.argsort(stable=True)[: population // 2]
            texts, distances = texts[kept], distances[kept]
            children = self._children(texts, population - len(kept))
            texts = torch.cat([texts, children])
            distances = torch.cat([distances, self.distances(children)])
            self.prompts.model.tick()
        return first, self._nearest(texts, distances)

    def distances(self, texts: Tensor) -> Tensor:
        """Return 1 - cosine of each row of words (n, words) with the target."""
        return 1 - (self.prompts.embeddings(texts) @ self.target).cpu()

    def _children(self, parents: Tensor, count: int) -> Tensor:
        draw = self.generator
        pairs = torch.from_numpy(draw.integers(0, len(parents), (2, count)))
        cuts = torch.from_numpy(draw.integers(0, self.prompts.size, (count, 1)))
        beginning = torch.arange(self.prompts.size) < cuts
        children = torch.where(beginning, parents[pairs[0]], parents[pairs[1]])
        others = self.prompts.drawn(draw, count)
        mutated = torch.from_numpy(draw.random(children.shape) < 1 / self.prompts.size)
        return torch.where(mutated, others, children)

    def _nearest(self, texts: Tensor, distances: Tensor) -> tuple[str, float]:
        """Return the nearest text that the tokenizer reads as these words, and its distance."""
        nearest = self.prompts.least(texts, distances)
        if nearest is None:
            raise LeftOut("its tokenizer reads none of the texts as the words they are made of")
        return nearest[1:]


# Inversion: classes that are made up, and the learning rate as a share of an embedding's size.
CLASSES, RATE = 4, 0.1
LEARNT = "<v>"


def inversion(model: ModelUnderTest, settings: Settings) -> list[Attempt]:
    """Learn one word from a few images of the concept, and find its other images by it.

    As textual inversion (arXiv 2208.01618), with the loss of telling classes apart. Words
    are learnt alike for classes made up of retain images that have nothing in common;
    these are measured on the very images they were learnt from.
    """
    table, words = model.token_table(), model.free_words()
    prompts = free_prompts(model, model.templates, 1, words)
    generator = np.random.default_rng(settings.seed)
    shots = min(settings.shots, model.forget.rows, model.retain.rows)
    concept = _some_images(model, model.forget, 1, shots, generator)
    made_up = _some_images(model, model.retain, CLASSES, shots, generator)
    size = table[torch.tensor(list(words)).to(table.device)].square().mean().sqrt()
    images, rate = torch.cat([concept, made_up]), RATE * float(size)
    embeddings, losses = learn_words(prompts, images, steps=settings.inversion_steps, rate=rate)
    learnt = zip(made_up, embeddings[1:], strict=True)
    ranks = torch.cat([_ranks(model, group, embedding) for group, embedding in learnt])
    controls = Accuracy(*accuracies(ranks), len(ranks))
    return [
        Attempt(IMAGES, LEARNT, float(losses[0]), model.called(embeddings[0])),
        Attempt(MADE_UP, LEARNT, float(losses[1:].mean()), controls),
    ]


def _some_images(
    model: ModelUnderTest, block: DataBlock, groups: int, size: int, generator: np.random.Generator
) -> Tensor:
    """Return the features of groups of images, drawn as far as there are any, (groups, size, E)."""
    groups = min(groups, block.rows // size)
    rows = generator.permutation(block.rows)[: groups * size]
    return model.image_features(block.take(rows)).view(groups, size, -1)


def _ranks(model: ModelUnderTest, images: Tensor, embedding: Tensor) -> Tensor:
    """Return the rank of a class in the concept's place for each of its images."""
    own = model.scale * images @ embedding.unsqueeze(1)
    logits = torch.cat([_other_logits(model, images), own], dim=1)
    last = torch.full((len(images),), logits.shape[1] - 1, device=images.device)
    return ranks_of_truth(logits, last)


def learn_words(
    prompts: FreePrompts, images: Tensor, *, steps: int, rate: float
) -> tuple[Tensor, Tensor]:
    """Learn the embedding of a word for each group of `images` (groups, images, E), by Adam.

    All start as the word that stands in the prompts. Returned are the class embeddings
    (groups, E) and the losses (groups,): the mean cross-entropy of each group's images.
    """
    model = prompts.model
    tower, losses = model.evaluation.text, [recognition_loss(model, group) for group in images]
    tokens, groups = tower.trim(prompts.tokens).to(images.device), len(images)
    entering = tower.embed(tokens).detach()
    # A tower may have positions of its own behind the texts.
    is_open = torch.zeros(*entering.shape[:2], 1, device=images.device)
    is_open[torch.arange(len(tokens)), prompts.places[:, 0]] = 1
    shifts = entering.new_zeros(groups, 1, 1, entering.shape[2], requires_grad=True)

    def measured() -> tuple[Tensor, Tensor]:
        shifted = (entering + is_open * shifts).flatten(0, 1)
        features = tower.features(shifted, tokens.repeat(groups, 1), 0)
        means = F.normalize(features.view(groups, len(tokens), -1).sum(dim=1), dim=-1)
        each = [loss(mean.unsqueeze(0)) for loss, mean in zip(losses, means, strict=True)]
        return means, torch.cat(each)

    training = Training.of(model, "a word", torch.optim.Adam([shifts], lr=rate), steps)
    while training.done < steps:
        with torch.enable_grad():
            (shifts.grad,) = torch.autograd.grad(measured()[1].sum(), shifts)
        training.optimizer.step()
        training.advance()
        model.tick()
    training.remove()
    with torch.no_grad():
        return measured()
