from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file
from worlds import lose_covariance

from slsgu_cli.checkpoints.layers import Layer
from slsgu_cli.engine.directions import forget_direction
from slsgu_cli.engine.ranking import rank
from slsgu_cli.engine.stored_covariances import find_covariances
from slsgu_cli.errors import InputError, MissingError
from slsgu_cli.method.layers import is_candidate
from slsgu_cli.records.directions import FALLBACK, Direction, DirectionSpec
from slsgu_cli.records.method import Alignment, GradientHeader, ParameterNorm, Tower
from slsgu_cli.records.options import RankOptions
from slsgu_cli.store.artifacts import Artifact, read_ranking


def ranked(world, direction=Direction.GRADIENT, **options):
    return rank(world.store, world.name, options=RankOptions(direction=direction, **options))


def gradients(world):
    pointer = world.pointer
    return [
        world.store.read_tensors(Artifact.GRADIENT.path(d))
        for d in (pointer.forget, pointer.retain)
    ]


def rewrite(world, change):
    """Write the forget gradient again after `change(arrays, header)`; it returns the header."""
    path = Artifact.GRADIENT.path(world.pointer.forget)
    arrays, header = world.store.read_tensors(path), world.store.read_header(path, GradientHeader)
    world.store.write_tensors(path, arrays, change(arrays, header) or header)


def test_scores_follow_the_paper(world):
    weights = load_file(world.folder / "open_clip_model.safetensors")
    forget, retain = gradients(world)
    ranking = ranked(world)
    assert {s.layer for s in ranking.scores} == {name for name in weights if is_candidate(name)}
    for score in ranking.scores:
        w, f, r = (a[score.layer].astype(float).ravel() for a in (weights, forget, retain))
        assert score.importance == pytest.approx(np.linalg.norm(f) / np.linalg.norm(w), rel=1e-6)
        cosine = abs(f @ r) / np.linalg.norm(f) / np.linalg.norm(r)
        assert score.alignment == pytest.approx(cosine, rel=1e-6, abs=1e-12)
        assert score.weight_norm == pytest.approx(np.linalg.norm(w), rel=1e-6)
        assert score.shape == weights[score.layer].shape
        assert score.tower is Layer.parse(score.layer).tower


@pytest.mark.parametrize("kind", list(Alignment))
def test_each_tower_has_its_own_front(kind, world):
    scores = ranked(world, alignment=kind).scores
    for score in scores:
        dominated = any(
            other.tower is score.tower
            and other.importance > score.importance
            and other.alignment < score.alignment
            for other in scores
        )
        assert score.front == (not dominated), score.layer
    for tower in Tower:
        assert any(score.front for score in scores if score.tower is tower)


def test_signed_alignment_keeps_the_sign(world):
    signed = {s.layer: s.alignment for s in ranked(world, alignment=Alignment.SIGNED).scores}
    magnitude = {s.layer: s.alignment for s in ranked(world).scores}
    assert magnitude == {layer: abs(value) for layer, value in signed.items()}
    assert min(signed.values()) < 0 < max(signed.values())


def test_rows_are_sorted_by_tower_then_front_then_importance(world):
    scores = ranked(world).scores
    keys = [(s.tower is Tower.TEXT, not s.front, -s.importance, s.layer) for s in scores]
    assert keys == sorted(keys)


def test_the_ranking_is_stored(world):
    ranking = ranked(world, exclude=["mlp"])
    assert read_ranking(world.store, world.pointer) == ranking
    assert (ranking.forget, ranking.retain) == (world.pointer.forget, world.pointer.retain)


@pytest.mark.parametrize(
    ("options", "fits"),
    [
        ({"tower": Tower.TEXT}, lambda name: not name.startswith("visual")),
        ({"tower": Tower.VISION}, lambda name: name.startswith("visual")),
        ({"include": ["mlp"]}, lambda name: "mlp" in name),
        (
            {"include": ["visual.*", "text_projection"]},
            lambda name: name.startswith("visual.") or name == "text_projection",
        ),
        ({"exclude": ["*.ln_?.weight"]}, lambda name: "ln_1" not in name and "ln_2" not in name),
        ({"include": ["attn"], "exclude": ["in_proj"]}, lambda name: "attn.out_proj" in name),
    ],
)
def test_include_exclude_and_tower_select_layers(options, fits, world):
    every = {score.layer for score in world.ranking.scores}
    expected = {name for name in every if fits(name)}
    assert expected
    assert {score.layer for score in ranked(world, **options).scores} == expected


def test_the_kfac_direction_ranks_what_does_not_widen_on_one_scale(world, listener):
    kfac = DirectionSpec.of(Direction.KFAC)
    ranking = ranked(world, Direction.KFAC)
    forget, _ = gradients(world)
    covariances = find_covariances(world.store, world.pointer)
    wide = {name for name in forget if name.endswith(("c_fc.weight", "in_proj_weight"))}
    assert {s.layer for s in ranking.scores} == set(filter(is_candidate, forget)) - wide
    assert any(n.startswith(f"{len(wide)} layers have no kfac direction") for n in listener.heard)
    for score in ranking.scores:
        assert score.direction == kfac
        along = forget_direction(
            world.store,
            world.pointer,
            score.layer,
            kfac,
            covariances.statistics(score.layer, kfac),
        )
        gain = float((along.astype(float) * forget[score.layer]).sum()) ** 0.5
        assert score.importance == pytest.approx(gain, rel=1e-4)
    for tower in Tower:
        scores = [score for score in ranking.scores if score.tower is tower]
        assert [score.front for score in scores] == [True] * 6 + [False] * (len(scores) - 6)
        assert scores == sorted(scores, key=lambda score: -score.importance)


def test_a_ranking_without_layers_is_refused(world):
    before = world.ranking
    with pytest.raises(InputError, match="no layer of blue is left to rank") as error:
        ranked(world, include=["nothing"])
    assert "--include" in error.value.hint
    assert world.ranking == before


def test_a_gradient_that_is_not_finite_is_refused(world):
    def spoil(arrays, header):
        arrays["visual.proj"][0, 0] = np.inf

    rewrite(world, spoil)
    with pytest.raises(InputError, match=r"stored gradient of visual\.proj holds values") as error:
        ranked(world)
    assert "slsgu grad" in error.value.hint


def test_missing_gradients_are_reported(world):
    world.store.remove(Artifact.POINTER.path("blue"))
    with pytest.raises(MissingError, match="gradients of blue") as error:
        ranked(world)
    assert "slsgu grad blue" in error.value.hint


def test_layers_that_an_earlier_revision_could_not_capture_are_tried_again(world):
    expected = ranked(world, Direction.WHITENED)
    lose_covariance(world, "visual.conv1.weight", revision=1)
    assert ranked(world, Direction.WHITENED) == expected


def test_a_layer_without_inputs_is_ranked_along_its_gradient(world, listener):
    layer = "visual.conv1.weight"
    along_gradient = {score.layer: score for score in ranked(world).scores}
    before = ranked(world, Direction.WHITENED).scores
    (whitened,) = ranked(world, Direction.WHITENED).directions
    assert all(score.direction == whitened for score in before)
    lose_covariance(world, layer)
    listener.heard.clear()
    ranking = ranked(world, Direction.WHITENED)
    others = [score for score in ranking.scores if score.layer != layer]
    by_layer = {score.layer: replace(score, front=False) for score in before}
    assert {score.layer: replace(score, front=False) for score in others} == {
        name: score for name, score in by_layer.items() if name != layer
    }
    # It is alone along its gradient, so no other is before it.
    alone = replace(along_gradient[layer], front=True, direction=FALLBACK)
    assert [score for score in ranking.scores if score.layer == layer] == [alone]
    assert ranking.by_direction() == {whitened: others, FALLBACK: [alone]}
    (told,) = listener.heard
    assert told.startswith(
        f"1 of {len(before)} layers are ranked along their gradient, because their"
    )
    assert "inputs cannot be captured; --exclude leaves them out: visual.conv1.weight" in told


def test_a_layer_without_inputs_has_one_of_two_directions(world, listener):
    layer = "visual.conv1.weight"
    before = ranked(world, Direction.BOTH).by_direction()
    lose_covariance(world, layer)
    listener.heard.clear()
    after = ranked(world, Direction.BOTH).by_direction()
    gradient, whitened = before
    assert after[gradient] == before[gradient]
    assert {score.layer for score in after[whitened]} == {
        score.layer for score in before[whitened]
    } - {layer}
    assert any("1 of " in told and layer in told for told in listener.heard)


def test_layers_of_zeros_or_without_a_gradient_are_left_out(world, listener):
    def clear(arrays, header):
        arrays["visual.proj"][...] = 0
        shape = header.weights["ln_final.weight"].shape
        return replace(
            header, weights=header.weights | {"ln_final.weight": ParameterNorm(shape, 0.0)}
        )

    rewrite(world, clear)
    scored = {score.layer for score in ranked(world).scores}
    assert not scored & {"visual.proj", "ln_final.weight"}
    (note,) = listener.heard
    assert note.startswith("2 layers are left out") and "ln_final.weight, visual.proj" in note
