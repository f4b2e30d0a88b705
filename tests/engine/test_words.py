"""Sets from words, from the gradient to the edit, against plain computations."""

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from places import DEMO

from slsgu_cli.checkpoints.edits import load_edit
from slsgu_cli.clip.metrics import as_one_class, ranks_of_truth
from slsgu_cli.engine.evaluate import evaluate
from slsgu_cli.engine.gradients import compute_gradients
from slsgu_cli.engine.ranking import rank
from slsgu_cli.engine.search import search
from slsgu_cli.errors import StaleError, UsageError
from slsgu_cli.method.stand_ins import stand_ins
from slsgu_cli.records.directions import Direction
from slsgu_cli.records.method import Criterion, Tower
from slsgu_cli.records.options import BuildRequest, PassOptions, RankOptions, SearchOptions
from slsgu_cli.records.sets import PROMPTS, ModelSpec
from slsgu_cli.sets.build import build_sets
from slsgu_cli.sources.matching import in_place_of_names
from slsgu_cli.store.artifacts import Artifact, read_manifest
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.store import Store
from slsgu_cli.verification.verify import verify

CLIP = ModelSpec(f"local-dir:{DEMO / 'clip'}")
CLASSES = ("dog", "cat", "castle", "rainbow", "git", "github", "heart", "umbrella", "apple", "car")
TEMPLATES = ("an icon of {}", "a {} icon", "{}", "a picture of {}")
LAST = "transformer.resblocks.7.mlp.c_proj.weight"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Sets of one word and of two, graded; the first is ranked."""
    folder = tmp_path_factory.mktemp("words")
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    (folder / "templates.txt").write_text("\n".join(TEMPLATES))
    made = Store(str(folder / "store"))
    for name, words in {"castle": ("castle",), "pets": ("dog", "cat")}.items():
        request = BuildRequest(
            name=name,
            model=CLIP,
            words=words,
            classes={PROMPTS: str(folder / "classes.txt")},
            templates={PROMPTS: str(folder / "templates.txt")},
        )
        build_sets(made, request)
        compute_gradients(made, name)
        rank(made, name)
    return made


@pytest.fixture(scope="module")
def model():
    return open_clip.create_model(CLIP.name).eval()


def texts_of(model, captions):
    tokenize = open_clip.get_tokenizer(CLIP.name)
    return F.normalize(model.encode_text(tokenize(list(captions))), dim=-1)


def gradient(model, loss, name):
    (found,) = torch.autograd.grad(loss, [model.get_parameter(name)])
    return found.numpy()


def stored(store, digest, name):
    return store.read_tensors(Artifact.GRADIENT.path(digest), [name])[name]


def test_the_gradient_moves_words_away_from_their_stand_ins(store, model):
    result = compute_gradients(store, "castle")
    manifest = read_manifest(store, "castle")
    forget, retain = (DataBlock.open(store, ref) for ref in (manifest.forget, manifest.retain))
    with torch.no_grad():
        kept = texts_of(model, retain.captions)
        images = stand_ins(texts_of(model, forget.captions), kept)
    loss = (1 - (images * texts_of(model, forget.captions)).sum(dim=-1)).mean()
    found = stored(store, result.pointer.forget, LAST)
    np.testing.assert_allclose(found, gradient(model, loss, LAST), atol=1e-6, rtol=1e-4)
    weights = result.headers["forget"].weights
    assert LAST in weights and not any(name.startswith("visual.") for name in weights)


@pytest.mark.parametrize("anchor", ["a building", ""])
def test_an_anchor_draws_the_name_to_other_words(anchor, store, model, tmp_path):
    result = compute_gradients(store, "castle", options=PassOptions(anchor=anchor))
    assert (result.pointer.anchor, result.headers["forget"].loss) == (anchor, "anchor")
    captions = [template.replace("{}", "castle") for template in TEMPLATES]
    wanted = [t.replace("{}", anchor) if anchor else "" for t in TEMPLATES]
    with torch.no_grad():
        anchors = texts_of(model, wanted)
    loss = (texts_of(model, captions) * anchors).sum(dim=-1).mean() / 2
    found = stored(store, result.pointer.forget, LAST)
    np.testing.assert_allclose(found, gradient(model, loss, LAST), atol=1e-6, rtol=1e-4)
    compute_gradients(store, "castle")


def test_an_attribute_moves_along_the_difference_of_two_groups_of_prompts(store, model, tmp_path):
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    (tmp_path / "templates.txt").write_text("\n".join(TEMPLATES))
    request = BuildRequest(
        name="red-car",
        model=CLIP,
        words=("red {}",),
        thing="car",
        classes={PROMPTS: str(tmp_path / "classes.txt")},
        templates={PROMPTS: str(tmp_path / "templates.txt")},
    )
    build_sets(store, request)
    result = compute_gradients(store, "red-car")
    assert result.pointer.anchor == "car"
    with_it, without = (
        texts_of(model, [template.replace("{}", name) for template in TEMPLATES])
        for name in ("red car", "car")
    )
    # A unit feature's cosine with itself has no gradient, so the anchor alone counts.
    difference = (with_it - without).detach()
    loss = -(with_it * difference).sum(dim=-1).mean() / 2
    found = stored(store, result.pointer.forget, LAST)
    np.testing.assert_allclose(found, gradient(model, loss, LAST), atol=1e-6, rtol=1e-4)
    other = compute_gradients(store, "red-car", options=PassOptions(anchor="a bus"))
    assert other.pointer.anchor == "a bus"


def test_a_search_for_an_attribute_warns_of_what_fa5_costs(store, listener):
    warning = "--criterion fa5 costs more of the thing than --criterion fa1"
    rank(store, "red-car")
    search(store, "red-car", options=SearchOptions(layers=[LAST], criterion=Criterion.FA1))
    assert not any(warning in text for text in listener.heard)
    assert search(store, "red-car", options=SearchOptions(layers=[LAST])).forgotten
    assert any(warning in text for text in listener.heard)


@pytest.mark.parametrize("anchor", ["castle", "an old Castle"])
def test_the_name_cannot_become_itself(anchor, store):
    with pytest.raises(UsageError, match="contains the name to forget"):
        compute_gradients(store, "castle", options=PassOptions(anchor=anchor))


def test_other_weights_need_words_of_their_own(store, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(DEMO / "clip", other)
    weights = load_file(other / "open_clip_model.safetensors")
    weights[LAST] = weights[LAST] * 1.1
    save_file(weights, other / "open_clip_model.safetensors")
    with pytest.raises(StaleError, match="have features of other weights"):
        compute_gradients(store, "castle", model=ModelSpec(f"local-dir:{other}"))


def test_words_are_ranked_along_kfac_in_the_text_tower(store):
    ranking = rank(store, "castle")
    assert {score.tower for score in ranking.scores} == {Tower.TEXT}
    assert [each.kind for each in ranking.directions] == [Direction.KFAC]
    both = rank(store, "castle", options=RankOptions(direction=Direction.BOTH))
    assert len(both.directions) == 2
    rank(store, "castle")


def test_a_search_on_prompts_goes_further_than_the_fifth_name(store, model):
    result = search(store, "castle", options=SearchOptions(layers=[LAST]))
    assert result.forgotten and result.report.after.forget.of_prompts
    assert result.report.after.forget.top5 == 0
    assert result.report.after.utility[PROMPTS].top1 == 100
    shortest = result.chosen.step / 2.0
    assert any(trial.step == pytest.approx(shortest) for trial in result.trials.trials)
    # The edit itself, by open_clip alone.
    edit = load_edit(store, "castle")
    block = DataBlock.open(store, read_manifest(store, "castle").evals[PROMPTS])
    weight = model.get_parameter(LAST)
    before = weight.data.clone()
    try:
        weight.data += edit.factor * torch.from_numpy(edit.delta())
        with torch.no_grad():
            prompts = [t.replace("{}", name) for name in CLASSES for t in TEMPLATES]
            texts = texts_of(model, prompts).view(len(CLASSES), len(TEMPLATES), -1)
            names = F.normalize(texts.mean(dim=1), dim=-1)
    finally:
        weight.data = before
    rows = torch.from_numpy(block.content_of(0, block.rows))
    ranks = ranks_of_truth(rows @ names.T, torch.from_numpy(block.labels).long())
    of_castle = torch.from_numpy(block.labels == CLASSES.index("castle"))
    assert (ranks[of_castle] >= 5).all() and (ranks[~of_castle] == 0).all()


def test_a_concept_of_several_words_is_measured_as_one(store):
    result = search(store, "pets", options=SearchOptions(layers=[LAST]))
    assert result.forgotten and result.report.after.forget.top5 == 0
    assert result.report.before.forget.rows == 2 * len(TEMPLATES) // 2
    words = [(word.name, word.rows, word.before, word.after) for word in result.report.words]
    assert words == [("cat", 2, 100, 0), ("dog", 2, 100, 0)]
    assert load_edit(store, "pets").header.words == result.report.words
    measured = evaluate(store, ["pets"])
    assert measured.models[-1].forget["pets"].top1 == 0
    assert measured.models[0].forget["pets"].top1 == 100


def test_several_classes_count_as_one():
    cosines = torch.tensor([[0.5, 0.9, 0.1, 0.7], [0.2, 0.3, 0.8, 0.1]])
    labels, classes = torch.tensor([0, 0]), torch.tensor([0, 1])
    joined = as_one_class(cosines, labels, classes)
    assert ranks_of_truth(joined, labels).tolist() == [0, 1]
    assert joined[:, 2:].equal(cosines[:, 2:])


def test_checks_that_need_images_are_skipped(store):
    search(store, "castle", options=SearchOptions(layers=[LAST]))
    from slsgu_cli.records.verification import Check, VerifyRequest

    request = VerifyRequest(checks=(Check.NEAREST, Check.AUGMENT))
    verified = verify(store, "castle", request)
    findings = {finding.check: finding for finding in verified.models[-1].findings}
    assert "made from words" in (findings[Check.AUGMENT].skipped or "")


@pytest.mark.parametrize(
    ("caption", "other", "expected"),
    [
        ("a photo of a Castle.", "house", "a photo of a house."),
        ("castle and castle", "hut", "hut and hut"),
        ("a sandcastle", "hut", "hut"),
        ("an old castle", "", ""),
    ],
)
def test_a_name_is_replaced_in_captions(caption, other, expected):
    assert in_place_of_names([caption], ["castle"], other) == [expected]
