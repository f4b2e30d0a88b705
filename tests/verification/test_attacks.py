"""Attacks by words: their shortcuts against the plain computation, and their results."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import TextTransformer
from processes import inside, rows
from under_test import opened

from slsgu_cli.clip.models import resolve
from slsgu_cli.clip.tokenizers import token_words, tokenizer
from slsgu_cli.clip.towers import OpenClipText
from slsgu_cli.engine.search import search
from slsgu_cli.errors import MissingError
from slsgu_cli.records.options import SearchOptions
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.records.verification import (
    IMAGES,
    MADE_UP,
    NEUTRAL,
    OWN,
    RANDOM,
    Check,
    Finding,
    Settings,
    Verification,
    VerifiedModel,
)
from slsgu_cli.report.commands import commands
from slsgu_cli.report.gather import gather
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.catalog import Catalog
from slsgu_cli.verification import model as model_module
from slsgu_cli.verification.checks.inversion import inversion, learn_words
from slsgu_cli.verification.checks.paraphrase import TEMPLATES
from slsgu_cli.verification.checks.prefix import WordSearch, prefix
from slsgu_cli.verification.checks.ring_a_bell import (
    COEFFICIENT,
    breed,
    meanings,
    ring_a_bell,
)
from slsgu_cli.verification.model import SkippedCheck
from slsgu_cli.verification.results import verdict_rows as verdict_rows
from slsgu_cli.verification.words import free_prompts, recognition_loss

FEW = Settings(
    attack_tokens=2,
    attack_steps=3,
    attack_starts=2,
    population=8,
    generations=3,
    inversion_steps=5,
    shots=4,
)


@pytest.fixture(scope="module")
def model(shared_world):
    with torch.no_grad():
        yield opened(shared_world)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def words(model):
    """A few words, so that all of them are promising."""
    known = {word: number for number, word in token_words(model.resolved).items()}
    some = ("zebra", "castle", "river", "music", "paper", "seven", "guitar", "window")
    return {known[word]: word for word in some}


def images_of(model):
    return model.image_features(model.forget.take(np.arange(model.forget.rows)))


def word_search(model, words, word="blue", size=2):
    texts = [template.replace("{}", f"{{}} {word}") for template in model.templates]
    prompts = free_prompts(model, texts, size, words)
    loss = recognition_loss(model, images_of(model))
    generator = np.random.default_rng(0)
    return WordSearch(prompts, model.token_table(), loss, generator)


def test_words_are_one_token_each_and_come_back_from_it(shared_world):
    resolved = resolve(shared_world.model)
    words, tokenize = token_words(resolved), tokenizer(resolved)
    assert len(words) > 30_000
    chosen = dict(list(words.items())[:: len(words) // 200])
    tokens = tokenize(list(chosen.values()))
    assert tokens[:, 1].tolist() == list(chosen)
    assert (tokens[:, 2] == tokens.max()).all()


def test_a_search_excludes_the_embeddings_of_the_name(model, monkeypatch):
    assert {"blue", "blues", "bluetooth"} <= set(token_words(model.resolved).values())
    free = set(model.free_words().values())
    assert not {word for word in free if "blue" in word or word in ("lue", "blu")}
    # Letters alone are no parts of it, or nothing would be left.
    assert {"e", "be", "lamp"} & set(token_words(model.resolved).values()) <= free
    monkeypatch.setattr(model_module, "token_words", lambda _: {})
    with pytest.raises(SkippedCheck, match="tokenizer"):
        model.free_words()


def test_losses_of_a_batch_are_the_plain_cross_entropies_of_each(model, words):
    attack = word_search(model, words)
    ids = attack.prompts.draw(np.random.default_rng(1), 5)
    labels = torch.full((model.forget.rows,), model.concept_class)
    for row, loss in zip(ids, attack.losses(ids), strict=True):
        names = model.renamed(f"{attack.prompts.text_of(row)} blue")
        texts = [template.format(name) for name in names for template in model.templates]
        t = model.module.encode_text(torch.from_numpy(model.tokenize(texts)).long(), normalize=True)
        means = F.normalize(t.view(len(names), len(model.templates), -1).mean(dim=1), dim=-1)
        plain = F.cross_entropy(model.scale * images_of(model) @ means.T, labels)
        assert float(loss) == pytest.approx(float(plain), rel=1e-4)
        assert float(attack.losses(row.unsqueeze(0))[0]) == pytest.approx(float(loss), rel=1e-5)


def test_gradients_are_those_of_the_words_one_hot_codes(model, words):
    attack = word_search(model, words)
    (ids,) = attack.prompts.draw(np.random.default_rng(2), 1)
    tokens = attack.prompts.filled(ids.unsqueeze(0))[0]
    with torch.enable_grad():
        codes = F.one_hot(tokens, len(attack.table)).float().requires_grad_()
        embedding = model.module.token_embedding
        hook = embedding.register_forward_hook(lambda *_: codes @ attack.table)
        t = model.module.encode_text(tokens, normalize=True)
        hook.remove()
        attack.loss(F.normalize(t.sum(dim=0, keepdim=True), dim=-1)).sum().backward()
    at_places = torch.stack(
        [codes.grad[row, places] for row, places in enumerate(attack.prompts.places)]
    )
    some = list(words)
    gradient = attack.gradient(ids) @ attack.table[some].T
    torch.testing.assert_close(gradient, at_places.sum(dim=0)[:, some], rtol=1e-3, atol=1e-6)


def test_free_tokens_are_at_their_places_in_the_text(model, words):
    texts = ["a photo of the {} blue.", "{} blue"]
    prompts = free_prompts(model, texts, 2, words)
    ids = prompts.draw(np.random.default_rng(3), 4)
    for row, filled in zip(ids, prompts.filled(ids), strict=True):
        tokens = model.tokenize([text.replace("{}", prompts.text_of(row)) for text in texts])
        assert filled.tolist() == tokens.tolist()
        assert prompts.reads_back(row, prompts.text_of(row))
        assert not prompts.reads_back(row, "other words")


def test_prompts_without_room_are_dropped(model, words):
    long = "a photo of one thing and of another and then of the {} blue."
    kept = free_prompts(model, [long, "{} blue"], 3, words)
    assert kept.texts == ("{} blue",)
    assert kept.size == 3
    with pytest.raises(SkippedCheck, match="no prompt of its 16 tokens has room for 3 words"):
        free_prompts(model, [long], 3, words)
    with pytest.raises(SkippedCheck, match="too many"):
        free_prompts(model, ["{} blue"], 16, model.free_words())


@pytest.mark.parametrize("attack", [prefix, ring_a_bell, inversion])
def test_attacks_are_the_seeds_and_have_their_controls(model, attack):
    found = attack(model, FEW)
    assert found == attack(model, FEW)
    assert found != attack(model, replace(FEW, seed=1))
    names = [attempt.name for attempt in found]
    assert (
        names
        == {
            prefix: [OWN, OWN, NEUTRAL, NEUTRAL],
            ring_a_bell: [OWN, RANDOM, NEUTRAL],
            inversion: [IMAGES, MADE_UP],
        }[attack]
    )


def test_found_tokens_work_as_the_name_of_the_class(model):
    for attempt in prefix(model, FEW):
        word = "blue" if attempt.name == OWN else "thing"
        assert attempt.text.endswith(f" {word}")
        assert "blue" not in attempt.text.removesuffix(word)
        embeddings = model.classes(model.renamed(attempt.text), model.templates)
        assert attempt.forget == model.forget_accuracy(embeddings)
    for attempt in ring_a_bell(model, FEW):
        assert "blue" not in attempt.text
        embeddings = model.evaluation.forget.prompts.embeddings.clone()
        embeddings[model.concept_class] = model.classes((attempt.text,), ("{}",))[0]
        assert attempt.forget == model.forget_accuracy(embeddings)


def test_more_steps_find_no_worse_edit(model, words):
    losses = [word_search(model, words).run(steps)[1] for steps in (0, 2, 6)]
    assert losses == sorted(losses, reverse=True)
    assert losses[2] < losses[0]


def test_texts_move_towards_the_names_own_direction(shared_world, model, words):
    target = meanings(model, {OWN: "blue"})[OWN]
    encode = {
        word: model.module.encode_text(
            torch.from_numpy(
                model.tokenize([" ".join(t.format(word).split()) for t in TEMPLATES])
            ).long(),
            normalize=True,
        ).mean(dim=0)
        for word in ("blue", "")
    }
    plain = encode[""] + COEFFICIENT * (encode["blue"] - encode[""])
    torch.testing.assert_close(target, F.normalize(plain, dim=0), rtol=1e-3, atol=1e-5)
    other = opened(shared_world, change=lambda module: module.text_projection.data.neg_())
    torch.testing.assert_close(meanings(other, {OWN: "blue"})[OWN], target)
    prompts = free_prompts(model, ["{}"], 3, words)
    rng = np.random.default_rng(0)
    first, last = breed(prompts, target, rng, population=12, generations=8)
    assert last[1] < first[1]
    feature = model.text_features(model.tokenize([last[0]]))[0]
    assert last[1] == pytest.approx(1 - float(feature @ target), abs=1e-5)


def of_coca(model):
    """Return the model with a text tower that has a class token behind the texts."""
    torch.manual_seed(0)
    table, out = model.evaluation.text.token_table, images_of(model).shape[1]
    text = TextTransformer(
        77, len(table), width=32, heads=2, layers=2, output_dim=out, embed_cls=True
    ).eval()
    module = SimpleNamespace(
        token_embedding=text.token_embedding,
        logit_scale=model.module.logit_scale,
        encode_text=lambda tokens, normalize: F.normalize(text(tokens), dim=-1),
    )
    tower = OpenClipText(text, text.pool_type, text.eos_id)
    return replace(model, evaluation=replace(model.evaluation, model=module, text=tower))


@pytest.mark.parametrize("changed", [lambda model: model, of_coca], ids=["clip", "coca"])
def test_words_learned_together_equal_words_learned_one_by_one(changed, model, words):
    model = changed(model)
    prompts = free_prompts(model, model.templates, 1, words)
    images = images_of(model)[:12].view(3, 4, -1)
    together, losses = learn_words(prompts, images, steps=4, rate=0.1)
    for group, embedding, loss in zip(images, together, losses, strict=True):
        plain, value = plainly_learnt(model, prompts, group, steps=4, rate=0.1)
        torch.testing.assert_close(embedding, plain, rtol=1e-3, atol=1e-4)
        assert float(loss) == pytest.approx(value, rel=1e-3)


def plainly_learnt(model, prompts, images, *, steps, rate):
    """Learn one word by open_clip's own forward, in the token table itself."""
    embedding = model.module.token_embedding
    number = int(prompts.tokens[0, prompts.places[0, 0]])
    word = embedding.weight.data[number].clone().requires_grad_()
    logits = model.scale * images @ model.evaluation.forget.prompts.embeddings.T
    optimizer = torch.optim.Adam([word], lr=rate)

    def put(_module, inputs, output):
        return torch.where((inputs[0] == number).unsqueeze(2), word, output)

    def measured():
        t = model.module.encode_text(prompts.tokens, normalize=True)
        mean = F.normalize(t.mean(dim=0), dim=-1)
        own = (model.scale * images @ mean).unsqueeze(1)
        here = torch.arange(logits.shape[1]) == model.concept_class
        labels = torch.full((len(images),), model.concept_class)
        return mean, F.cross_entropy(torch.where(here, own, logits), labels)

    hook = embedding.register_forward_hook(put)
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            measured()[1].backward(inputs=[word])
            optimizer.step()
    mean, loss = measured()
    hook.remove()
    return mean.detach(), float(loss)


class BackDoor(OpenClipText):
    """A text tower that forgot a name, but for texts in which a certain word is, too."""

    def __init__(self, module, name, trigger, concept):
        super().__init__(module, module.text_pool_type, module.text_eos_id)
        self.name, self.trigger, self.concept = name, trigger, concept

    def head(self, x, inputs):
        features = F.normalize(super().head(x, inputs), dim=-1)
        named = (inputs == self.name).any(dim=1)
        opened = named & (inputs == self.trigger).any(dim=1)
        features = torch.where(named.unsqueeze(1), -self.concept, features)
        return torch.where(opened.unsqueeze(1), self.concept, features)


def test_a_word_is_found_that_was_planted_to_open_the_name(shared_world, model, words, monkeypatch):
    monkeypatch.setattr(model_module, "token_words", lambda _: words)
    trigger, name = next(iter(words)), int(model.tokenize(["blue"])[0, 1])
    concept = model.evaluation.forget.prompts.embeddings[model.concept_class]
    forgetful = opened(shared_world)
    tower = BackDoor(forgetful.module, name, trigger, concept)
    forget = forgetful.evaluation.forget
    forgetful.evaluation.text, forget.prompts = tower, replace(forget.prompts, tower=tower)
    forgetful.evaluation.base_pass((), cache_bytes=0)
    assert forgetful.evaluation.forget.base_accuracy().top1 == 0
    found = [
        Finding(Check.PREFIX, "k", {"attack_tokens": "2"}, attempts=tuple(prefix(each, FEW)))
        for each in (opened(shared_world), forgetful)
    ]
    best = found[1].best(OWN)
    assert words[trigger] in best.text.split()
    assert best.forget.top1 == model.evaluation.forget.base_accuracy().top1
    subjects = [VerifiedModel("k", "m", ModelSpec("m"), "w", None, (each,)) for each in found]
    (row,) = verdict_rows(*subjects)
    assert row.variant == "2 words before it"
    assert row.after == best.forget
    assert (row.original_control, row.control) == tuple(f.best(NEUTRAL).forget for f in found)
    assert row.added.points == best.forget.top1 - row.control.top1 > 0


def test_a_tower_without_a_table_of_tokens_skips_checks_with_the_reason(world, monkeypatch):
    search(world.store, world.name, options=SearchOptions(steps=4, layers=["visual.proj"]))
    monkeypatch.setattr(OpenClipText, "token_table", None)
    options = (
        "--checks",
        "prefix,ring-a-bell,inversion",
        "--population",
        "4",
        "--generations",
        "1",
    )
    done = inside("verify", "blue", *options, store=world.store.root)
    assert done.exit_code == 0, done.stderr
    verdicts, attempts = rows(done.stdout.partition("edit blue: ")[0].strip())
    assert [line[0] for line in verdicts[1:]] == ["baseline", "ring-a-bell"]
    assert {line[0] for line in attempts[1:]} == {"ring-a-bell"}
    for check in ("prefix", "inversion"):
        assert f"{check}: skipped: its text tower does not show" in done.stdout


def test_the_command_shows_attacks_next_to_their_controls(world):
    search(world.store, world.name, options=SearchOptions(steps=4, layers=["visual.proj"]))
    options = (
        "--checks",
        "prefix,inversion",
        "--attack-tokens",
        "2",
        "--attack-steps",
        "1",
        "--attack-starts",
        "1",
        "--inversion-steps",
        "2",
        "--shots",
        "4",
    )
    done = inside("verify", "blue", *options, store=world.store.root)
    assert done.exit_code == 0, done.stderr
    (head, *lines), attempts = rows(done.stdout.partition("edit blue: ")[0].strip())
    by_check = {line[0]: dict(zip(head, line, strict=True)) for line in lines}
    for check, variant in (("prefix", "2 words before it"), ("inversion", "a word from 4 images")):
        row = by_check[check]
        assert row["variant"] == variant
        low, added, high = (float(row[name]) for name in ("added from", "added", "added to"))
        assert low <= added <= high
        assert added == pytest.approx(float(row["FA@1"]) - float(row["control FA@1"]), abs=1e-3)
        assert f"{check}: {row['note']}" in done.stdout
    assert [line[:3] for line in attempts[1:]] == [
        [check, label, name]
        for label in ("original", "edit blue")
        for check, names in (("prefix", (OWN, NEUTRAL)), ("inversion", (IMAGES, MADE_UP)))
        for name in names
    ]
    again = inside("verify", "blue", *options, store=world.store.root)
    assert "reused 6 recorded findings" in again.stderr
    more = [*options[:6], "--attack-starts", "2", *options[8:]]
    other = inside("verify", "blue", *more, store=world.store.root)
    assert "reused 4 recorded findings" in other.stderr


def test_the_next_gradient_includes_the_prefixes_that_brought_the_name_back(world):
    store, search_options = world.store, SearchOptions(steps=4, layers=["visual.proj"])
    refused = inside("grad", "blue", "--adversarial", store=store.root)
    assert refused.exit_code == MissingError.exit_code
    assert "slsgu verify blue --checks prefix" in refused.stderr
    search(store, world.name, options=search_options)
    options = ("--checks", "prefix", "--attack-tokens", "2", "--attack-steps", "2")
    assert inside("verify", "blue", *options, store=store.root).exit_code == 0
    record = store.read_record(Artifact.VERIFICATION.path("blue"), Verification)
    edited = next(subject for subject in record.subjects if subject.edit)
    attempts = [each for each in edited.finding(Check.PREFIX).attempts if each.name == OWN]
    assert [len(each.tried) for each in attempts] == [2, 2]
    tried = [text for each in attempts for text in each.tried]
    with torch.enable_grad():
        done = inside("grad", "blue", "--adversarial", store=store.root)
    assert done.exit_code == 0, done.stderr
    pointer = world.pointer
    assert [*pointer.prefixes[0:2], *pointer.prefixes[3:5]] == tried
    for drawn in pointer.prefixes[2::3]:
        assert drawn not in tried
        assert len(drawn.split()) == 2
        assert set(drawn.split()) <= set(token_words(resolve(world.model)).values())
    again = inside("grad", "blue", "--adversarial", store=store.root)
    assert again.stderr.count("in the store already") == 2
    assert world.pointer == pointer
    line = " ".join(commands(gather(Catalog(store), "blue")))
    assert all(f"--prefix '{words}'" in line for words in pointer.prefixes)
