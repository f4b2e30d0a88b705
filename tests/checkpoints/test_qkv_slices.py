"""Query, key and value as layers of their own: rows of the fused layer, and nothing else."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import Reference
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from slsgu_cli.checkpoints.apply import apply_edits
from slsgu_cli.checkpoints.edits import load_edit
from slsgu_cli.checkpoints.layers import Layer, in_whole_and_in_part, layers_of
from slsgu_cli.checkpoints.targets import read_target
from slsgu_cli.cli.app import app
from slsgu_cli.clip.in_place import changed_values, edited
from slsgu_cli.clip.loading import load
from slsgu_cli.clip.models import resolve
from slsgu_cli.engine.ranking import rank
from slsgu_cli.engine.search import search
from slsgu_cli.engine.set_edits import direct_edit, ensure_edit
from slsgu_cli.errors import StaleError, UsageError
from slsgu_cli.records.directions import Direction
from slsgu_cli.records.method import Qkv
from slsgu_cli.records.options import ApplyOptions, RankOptions, SearchOptions
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.store.artifacts import Artifact

FUSED = "transformer.resblocks.1.attn.in_proj_weight"
VISION = f"visual.{FUSED}"


def ranked(world, **options):
    chosen = {"direction": Direction.GRADIENT, "qkv": Qkv.SPLIT} | options
    return rank(world.store, world.name, options=RankOptions(**chosen))


def rows(values, letter):
    return np.split(values, 3)["qkv".index(letter)]


@pytest.mark.parametrize(
    ("layer", "parameter", "third"),
    [
        (f"{VISION}.k", VISION, 1),
        (VISION, VISION, None),
        ("visual.trunk.blocks.3.attn.qkv.weight.v", "visual.trunk.blocks.3.attn.qkv.weight", 2),
        (f"{VISION}.o", f"{VISION}.o", None),
        ("visual.attnpool.q_proj.weight", "visual.attnpool.q_proj.weight", None),
    ],
)
def test_the_name_of_a_qkv_slice_is_parsed(layer, parameter, third):
    parsed = Layer.parse(layer)
    assert (parsed.parameter, parsed.part) == (parameter, third)


def test_split_layers_replace_fused_ones():
    names = [VISION, f"{VISION[:-6]}bias", "ln_final.weight", "logit_scale"]
    assert layers_of(names, Qkv.FUSED) == ["ln_final.weight", VISION]
    assert layers_of(names, Qkv.SPLIT) == ["ln_final.weight", *(f"{VISION}.{x}" for x in "qkv")]
    assert in_whole_and_in_part([f"{VISION}.q", f"{VISION}.k", FUSED]) is None
    assert in_whole_and_in_part([f"{VISION}.q", VISION]) == VISION


def test_qkv_slices_are_scored_by_their_rows(world):
    weights = load_file(world.folder / "open_clip_model.safetensors")
    pointer = world.pointer
    forget, retain = (
        world.store.read_tensors(Artifact.GRADIENT.path(one))
        for one in (pointer.forget, pointer.retain)
    )
    scores = {score.layer: score for score in ranked(world).scores}
    assert set(scores) == set(layers_of(weights, Qkv.SPLIT))
    for letter in "qkv":
        w, f, r = (rows(each[VISION], letter).astype(float) for each in (weights, forget, retain))
        score = scores[f"{VISION}.{letter}"]
        assert score.shape == w.shape
        assert score.importance == pytest.approx(np.linalg.norm(f) / np.linalg.norm(w), rel=1e-6)
        cosine = abs((f * r).sum()) / np.linalg.norm(f) / np.linalg.norm(r)
        assert score.alignment == pytest.approx(cosine, rel=1e-6)
    whole = {score.layer: score for score in ranked(world, qkv=Qkv.FUSED).scores}[VISION]
    parts = [scores[f"{VISION}.{letter}"].forget_norm for letter in "qkv"]
    assert whole.forget_norm == pytest.approx(np.linalg.norm(parts), rel=1e-6)


def test_whitened_qkv_slices_add_up_to_the_whole_layer(world):
    """Importance is sqrt(<G, D>) / ||W||_P; both are sums over the rows."""
    split = {s.layer: s for s in ranked(world, direction=Direction.WHITENED).scores}
    fused = {s.layer: s for s in ranked(world, direction=Direction.WHITENED, qkv=Qkv.FUSED).scores}
    ahead = [split[f"{VISION}.{letter}"].importance for letter in "qkv"]
    assert min(ahead) < fused[VISION].importance < max(ahead)
    whole = direct_edit(world.store, world.name, layer=VISION, step=1.0)
    for letter in "qkv":
        third = direct_edit(world.store, world.name, layer=f"{VISION}.{letter}", step=1.0)
        assert np.array_equal(third.delta(), rows(whole.delta(), letter))
        assert np.array_equal(third.before(), rows(whole.before(), letter))


@pytest.mark.parametrize("layers", [(f"{VISION}.v", f"{VISION}.q"), (f"{FUSED}.v", f"{FUSED}.k")])
def test_a_search_of_qkv_slices_is_the_plain_search(world, layers):
    ranked(world)
    result = search(
        world.store,
        world.name,
        options=SearchOptions(layers=layers, steps=8, full=True, qkv=Qkv.SPLIT),
    )
    reference = Reference(world)
    trials = {(t.layer, t.step): t for t in result.trials.trials}
    assert len({trial.forget.top1 for trial in trials.values()}) > 1
    assert {layer for layer, _ in trials} == set(layers)
    for (layer, step), trial in trials.items():
        parameter = reference.model.get_parameter(layer[:-2])
        original = parameter.data.clone()
        place = "qkv".index(layer[-1])
        change = torch.from_numpy(reference.gradient[layer[:-2]]).chunk(3)[place]
        parameter.data.chunk(3)[place].add_(change, alpha=step)
        figures = reference.figures()
        parameter.data.copy_(original)
        assert figures.forget == pytest.approx((trial.forget.top1, trial.forget.top5))
        for name, found in trial.utility.items():
            assert figures.utility[name] == pytest.approx((found.top1, found.top5))
    edit = load_edit(world.store, world.name)
    assert edit.header.layer == result.chosen.layer
    whole = reference.gradient[Layer.parse(edit.header.layer).parameter]
    gradient = rows(whole, edit.header.layer[-1])
    np.testing.assert_allclose(edit.delta(), result.chosen.step * gradient, rtol=1e-6)


def test_a_layer_is_not_edited_whole_and_in_part(world, tmp_path):
    edits = [
        direct_edit(world.store, world.name, layer=layer, step=0.1)
        for layer in (VISION, f"{VISION}.k")
    ]
    with pytest.raises(UsageError, match="as a whole and its q, k or v slice"):
        apply_edits(edits, read_target(world.folder), tmp_path / "out", options=ApplyOptions())
    assert not (tmp_path / "out").exists()


def test_moves_of_a_whole_layer_and_its_slice_are_summed(world):
    model = load(resolve(world.model))
    original = model.get_parameter(VISION).data.clone()
    change = torch.ones_like(original)
    changes = [(VISION, change, 2.0), (f"{VISION}.k", change[: len(change) // 3], 0.5)]
    with edited(model, changed_values(model, changes)):
        q, k, v = (model.get_parameter(VISION).data - original).chunk(3)
        assert [float(part.mean()) for part in (q, k, v)] == pytest.approx([2.0, 2.5, 2.0])
    assert torch.equal(model.get_parameter(VISION).data, original)


def test_a_ranking_of_other_layers_is_refused(world):
    ranked(world)
    options = SearchOptions(qkv=Qkv.FUSED)
    with pytest.raises(StaleError, match="query, key and value split, not fused"):
        search(world.store, world.name, options=options)
    chosen = SearchOptions(layers=[f"{VISION}.v"], steps=1)
    search(world.store, world.name, options=chosen)
    assert world.store.exists(Artifact.EDIT.path(world.name))
    with pytest.raises(StaleError, match="does not match --qkv fused"):
        ensure_edit(world.store, world.name, options=options)
    assert (
        ensure_edit(world.store, world.name, options=SearchOptions(qkv=Qkv.SPLIT)).header.layer
        == f"{VISION}.v"
    )


def test_ranking_refuses_a_changed_model(world, tmp_path):
    folder = shutil.copytree(world.folder, tmp_path / "clip")
    pointer = replace(world.pointer, model=ModelSpec(f"local-dir:{folder}"))
    world.store.write_record(Artifact.POINTER.path(world.name), pointer)
    assert len(ranked(world).scores) > 10
    weights = load_file(folder / "open_clip_model.safetensors")
    weights[VISION] = weights[VISION] * 2
    save_file(weights, folder / "open_clip_model.safetensors")
    with pytest.raises(StaleError, match="other weights than when its gradients"):
        ranked(world)


def test_commands_take_the_option_qkv(world, tmp_path):
    def slsgu(*words):
        done = CliRunner().invoke(app, [*words, "--store", world.store.root, "-q"])
        assert done.exit_code == 0, done.output
        return done.output

    rows = slsgu("rank", world.name, "--qkv", "split", "--direction", "gradient").splitlines()
    assert f"{VISION}.k" in [row.split("\t")[0] for row in rows]
    slsgu("search", world.name, "--qkv", "split", "--layer", f"{VISION}.v", "--steps", "7")
    told = slsgu("apply", world.name, "--qkv", "split", "--out", str(tmp_path / "out"))
    assert f"{VISION}.v" in told
    other = CliRunner().invoke(
        app,
        [
            "apply",
            world.name,
            "--qkv",
            "fused",
            "-o",
            f"{tmp_path}/no",
            "--store",
            world.store.root,
        ],
    )
    assert other.exit_code == 4
