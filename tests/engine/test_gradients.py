"""Gradients are addressed by what they were computed from, and computed once."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_clip
import torch
from safetensors.numpy import load_file, save_file

from slsgu_cli.clip.batches import pixel_normalizer
from slsgu_cli.clip.loading import load
from slsgu_cli.clip.models import fingerprint, resolve
from slsgu_cli.clip.tokenizers import tokenizer
from slsgu_cli.clip.towers import SplitTower
from slsgu_cli.engine import covariance, gradient_pass, resumable
from slsgu_cli.engine.gradient_pass import GradientPass
from slsgu_cli.engine.gradients import compute_gradients
from slsgu_cli.engine.ranking import rank
from slsgu_cli.engine.stored_covariances import find_covariances
from slsgu_cli.errors import InputError, MissingError, StaleError
from slsgu_cli.records.directions import Direction, Statistic
from slsgu_cli.records.method import GradientHeader, Precision, SquaresHeader, SumsHeader
from slsgu_cli.records.options import PassOptions, RankOptions
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.blocks import DataBlock, RepeatedBlock
from slsgu_cli.store.catalog import entries
from slsgu_cli.store.check import check


def compute(world, *, model=None, squares=False, **options):
    return compute_gradients(
        world.store, world.name, model=model, options=PassOptions(**options), squares=squares
    )


@pytest.fixture
def own_model(world, tmp_path):
    """The world's model in a folder of this test's own."""
    return ModelSpec(f"local-dir:{shutil.copytree(world.folder, tmp_path / 'clip')}")


def folder_of(model):
    return Path(model.name.removeprefix("local-dir:"))


def weights_file(model):
    return folder_of(model) / "open_clip_model.safetensors"


def reconfigured(folder, section, **changes):
    """Change a section of a model folder's configuration."""
    path = folder / "open_clip_config.json"
    content = json.loads(path.read_text())
    content[section] |= changes
    path.write_text(json.dumps(content))


def test_headers_name_the_loss_rows_and_model_of_gradients(world):
    manifest, pointer = world.manifest, world.pointer
    weights = load_file(weights_file(world.model))
    for role, loss, batches in (("forget", "cosine", 2), ("retain", "contrastive", 4)):
        path = Artifact.GRADIENT.path(getattr(pointer, role))
        header = world.store.read_header(path, GradientHeader)
        data = getattr(manifest, role)
        assert (header.loss, header.sign, header.batch_size) == (loss, "+grad", 16)
        assert (header.rows, header.batches, header.data) == (data.rows, batches, data.fingerprint)
        assert header.model == pointer.model_fingerprint
        assert header.mean_loss > 0
        arrays = world.store.read_tensors(path)
        assert set(arrays) == set(header.weights)
        for name, weight in header.weights.items():
            assert weight.shape == arrays[name].shape == weights[name].shape
            assert weight.norm == pytest.approx(np.linalg.norm(weights[name].astype(float)))
            assert arrays[name].dtype == np.float32


def test_a_second_call_computes_nothing(world, listener):
    again = compute(world)
    assert again.computed == ()
    assert again.pointer == world.pointer
    assert sum("in the store already" in text for text in listener.heard) == 2


def test_a_cache_hit_imports_no_torch(world):
    program = """
import sys
from slsgu_cli.engine.gradients import compute_gradients
from slsgu_cli.records.options import PassOptions
from slsgu_cli.store.store import Store
found = compute_gradients(
    Store(sys.argv[1]), "blue", model=None, options=PassOptions()
)
heavy = {"torch", "open_clip", "torchvision", "zarr", "pyarrow"} & set(sys.modules)
print(found.computed, sorted(heavy))
"""
    command = [sys.executable, "-c", program, world.store.root]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "() []"


def test_concepts_with_one_retain_set_share_its_gradient(world):
    neutral = [f"{world.sources['pairs']}?colour=white&colour=cyan"]
    for name in ("blue", "red"):
        replace(world, name=name).build(retain_sources=neutral, retain_samples=30)
    first, second = (compute(replace(world, name=name)) for name in ("blue", "red"))
    assert first.computed == ("retain",)  # its forget rows are what they were
    assert second.computed == ("forget",)
    assert first.pointer.retain == second.pointer.retain
    assert first.pointer.forget != second.pointer.forget


@pytest.mark.parametrize("change", [{"batch_size": 8}, {"precision": Precision.BF16}])
def test_options_that_change_the_numbers_change_the_address(change, world):
    before = world.pointer
    result = compute(world, **change)
    assert result.computed == ("forget", "retain")
    after = result.pointer
    assert not {after.forget, after.retain} & {before.forget, before.retain}
    assert world.pointer == after
    assert world.store.exists(Artifact.GRADIENT.path(before.forget))


@pytest.mark.parametrize("change", [{"memory_budget": 1}, {"device": "auto"}])
def test_options_that_only_change_the_speed_keep_the_address(change, world):
    assert compute(world, **change).computed == ()


def test_other_weights_change_the_address(world, own_model):
    assert compute(world, model=own_model).computed == ()
    weights = load_file(weights_file(own_model))
    weights["visual.ln_post.bias"][0] += 1e-3
    save_file(weights, weights_file(own_model))
    result = compute(world, model=own_model)
    assert result.computed == ("forget", "retain")
    assert result.pointer.model == own_model
    assert result.pointer.model_fingerprint != fingerprint(resolve(world.model))


def test_an_architecture_with_other_arithmetic_changes_the_address(world, tmp_path):
    folder = shutil.copytree(world.folder, tmp_path / "quick")
    reconfigured(folder, "model_cfg", quick_gelu=True)
    result = compute(world, model=ModelSpec(f"local-dir:{folder}"))
    assert result.computed == ("forget", "retain")


def test_other_rows_change_the_address_of_their_role(world):
    world.build(retain_samples=40)
    assert compute(world).computed == ("retain",)
    world.build(retain_samples=40, max_forget=10)
    assert compute(world).computed == ("forget",)


def test_ranking_a_rebuilt_set_is_refused(world):
    for changes, role in (({"retain_samples": 40}, "retain"), ({"max_forget": 10}, "forget")):
        world.build(**changes)
        with pytest.raises(StaleError, match=f"before its {role} set was rebuilt"):
            rank(world.store, "blue", options=RankOptions())
    compute(world)
    assert rank(world.store, "blue", options=RankOptions()).scores


def test_a_model_with_other_inputs_is_refused(world, tmp_path):
    vision = tiny_clip.CONFIG["vision_cfg"] | {"image_size": 24}
    folder = tiny_clip.write_folder(tmp_path / "small", vision_cfg=vision)
    before = world.pointer
    with pytest.raises(StaleError, match="takes other inputs: height 24, the set has 32") as error:
        compute(world, model=ModelSpec(f"local-dir:{folder}"))
    assert "slsgu build-sets blue" in error.value.hint
    assert world.pointer == before


def test_another_normalisation_of_pixels_changes_the_address(world, own_model):
    """The rows stay the same bytes, yet the model sees other numbers."""
    own = replace(world, model=own_model)
    reconfigured(own.folder, "preprocess_cfg", mean=[0.5, 0.5, 0.5])
    own.build()
    assert own.manifest.forget.fingerprint == world.manifest.forget.fingerprint
    result = compute(own)
    assert result.computed == ("forget", "retain")
    fresh = replace(own, store=type(own.store)(own.store.root + "-fresh"))
    fresh.build()
    compute(fresh)
    for role in ("forget", "retain"):
        found, expected = (
            w.store.read_tensors(Artifact.GRADIENT.path(getattr(w.pointer, role)))
            for w in (own, fresh)
        )
        np.testing.assert_array_equal(found["visual.proj"], expected["visual.proj"])


def test_models_with_a_logit_bias_retain_by_the_sigmoid_loss(world, tmp_path):
    folder = tiny_clip.write_folder(tmp_path / "siglip", custom_text=True, init_logit_bias=-2.0)
    result = compute(world, model=ModelSpec(f"local-dir:{folder}"), batch_size=32)
    assert result.headers["retain"].loss == "sigmoid"
    assert result.headers["forget"].loss == "cosine"


def test_a_set_smaller_than_a_mini_batch_is_one_mini_batch(world):
    result = compute(world, batch_size=500)
    header = result.headers["retain"]
    assert (header.batches, header.batch_size, header.rows) == (1, 500, 60)


def test_a_gradient_that_is_not_finite_leaves_nothing(world, own_model):
    weights = load_file(weights_file(own_model))
    weights["visual.proj"][0, 0] = np.nan
    save_file(weights, weights_file(own_model))
    files = world.store.names("gradients")
    before = world.store.read_bytes(Artifact.POINTER.path("blue"))
    with pytest.raises(InputError, match="not finite in mini-batch 0"):
        compute(world, model=own_model)
    assert world.store.names("gradients") == files
    assert world.store.unfinished("gradients") == []
    assert world.store.read_bytes(Artifact.POINTER.path("blue")) == before


def test_a_missing_set_is_reported(world):
    with pytest.raises(MissingError, match="set nobody"):
        compute(replace(world, name="nobody"))


def test_squares_are_stored_next_to_their_gradient_and_computed_once(world):
    before = {d: world.store.read_bytes(Artifact.GRADIENT.path(d)) for d in digests(world)}
    assert compute(world).squared is None
    first = compute(world, squares=True)
    assert (first.computed, first.squared) == ((), ("forget", "retain"))
    assert set(first.seconds) == {"forget", "retain"}
    for digest, role in zip(digests(world), ("forget", "retain"), strict=True):
        about = world.store.read_header(Artifact.SQUARES.path(digest), SquaresHeader)
        assert (about.gradient, about.rows) == (digest, getattr(world.manifest, role).rows)
        squares = world.store.read_tensors(Artifact.SQUARES.path(digest))
        gradient = world.store.read_tensors(Artifact.GRADIENT.path(digest))
        assert {n: v.shape for n, v in squares.items()} == {n: v.shape for n, v in gradient.items()}
        assert all((value >= 0).all() for value in squares.values())
        assert world.store.read_bytes(Artifact.GRADIENT.path(digest)) == before[digest]
    again = compute(world, squares=True)
    assert (again.computed, again.squared, again.seconds) == ((), (), {})
    world.store.write_bytes(Artifact.SQUARES.path(digests(world)[0]), b"cut short")
    assert compute(world, squares=True).squared == ("forget",)


def test_one_pass_computes_gradients_and_squares(world):
    for digest in digests(world):
        world.store.remove(Artifact.GRADIENT.path(digest))
    found = compute(world, squares=True)
    assert found.computed == found.squared == ("forget", "retain")
    assert rank(world.store, world.name, options=RankOptions()).scores


@pytest.fixture
def saving(monkeypatch):
    """Let passes save their sums after every mini-batch."""
    monkeypatch.setattr(gradient_pass, "CHUNK", 1)
    monkeypatch.setattr(resumable, "KEEP_SECONDS", 0.0)
    monkeypatch.setattr(resumable, "KEEP_SHARE", 0.0)


def stopped(world, monkeypatch, mini_batch, **options):
    """Compute the gradients until the pass is stopped; return the file of its sums."""
    for digest in digests(world):
        world.store.remove(Artifact.GRADIENT.path(digest))
    group, calls = GradientPass._group, []

    def guarded(self, images, ids):
        calls.append(1)
        if len(calls) > mini_batch:
            raise KeyboardInterrupt
        return group(self, images, ids)

    with monkeypatch.context() as patch:
        patch.setattr(GradientPass, "_group", guarded)
        with pytest.raises(KeyboardInterrupt):
            compute(world, **options)
    (name,) = Artifact.SUMS.names(world.store)
    return Artifact.SUMS.path(name)


def test_a_stopped_pass_resumes_from_its_saved_sums(world, saving, monkeypatch, listener):
    before = {d: world.store.read_bytes(Artifact.GRADIENT.path(d)) for d in digests(world)}
    # Both mini-batches of the forget set, and three of the retain set's four.
    retain = world.pointer.retain
    stopped(world, monkeypatch, 5)
    shown = [e for e in entries(world.store) if e.kind is Artifact.UNFINISHED]
    assert [entry.name for entry in shown] == [retain]
    assert shown[0].summary() == f"done 3, batches 4, gradient {retain}"
    assert compute(world).computed == ("retain",)
    assert any("resumes after 3 of its 4 mini-batches" in text for text in listener.heard)
    assert Artifact.SUMS.names(world.store) == []
    for digest, content in before.items():
        assert world.store.read_bytes(Artifact.GRADIENT.path(digest)) == content


@pytest.mark.parametrize("parts", [1, 4, 6])
def test_stopped_covariances_resume_from_their_saved_sums(
    parts, world, saving, monkeypatch, listener, tmp_path
):
    monkeypatch.setitem(covariance.ROWS_PER_FORWARD, "cpu", 16)
    through = world.copied(tmp_path / "through")
    options = RankOptions(direction=Direction.WHITENED)
    rank(through.store, world.name, options=options)
    features, calls = SplitTower.features, []

    def guarded(self, *arguments):
        calls.append(1)
        if len(calls) > parts:
            raise KeyboardInterrupt
        return features(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(SplitTower, "features", guarded)
        with pytest.raises(KeyboardInterrupt):
            rank(world.store, world.name, options=options)
    assert len(Artifact.SUMS.names(world.store)) == 1
    rank(world.store, world.name, options=options)
    assert f"the covariances resume after {parts} of their 8 parts" in listener.heard
    assert Artifact.SUMS.names(world.store) == []
    for name in Artifact.COVARIANCE.names(world.store):
        path = Artifact.COVARIANCE.path(name)
        assert world.store.read_bytes(path) == through.store.read_bytes(path)


@pytest.mark.parametrize("flaw", ["damaged", "foreign", "without squares", "of another device"])
def test_unusable_sums_are_removed(flaw, world, saving, monkeypatch, listener):
    before = {d: world.store.read_bytes(Artifact.GRADIENT.path(d)) for d in digests(world)}
    path = stopped(world, monkeypatch, 1)
    header, arrays = world.store.read_header(path, SumsHeader), world.store.read_tensors(path)
    if flaw == "damaged":
        content = bytearray(world.store.read_bytes(path))
        content[-5] ^= 1
        world.store.write_bytes(path, bytes(content))
    elif flaw == "foreign":
        other = next(digest for digest in before if digest != header.gradient)
        world.store.write_tensors(path, arrays, replace(header, gradient=other))
    elif flaw == "of another device":
        world.store.write_tensors(path, arrays, replace(header, device="cuda"))
    compute(world, squares=flaw == "without squares")
    assert any("saved sums of a pass cannot be used" in text for text in listener.heard)
    assert Artifact.SUMS.names(world.store) == []
    for digest, content in before.items():
        assert world.store.read_bytes(Artifact.GRADIENT.path(digest)) == content


def test_sums_of_squares_stay_after_their_gradient_is_complete(
    world, saving, monkeypatch, listener
):
    before = {d: world.store.read_bytes(Artifact.GRADIENT.path(d)) for d in digests(world)}
    path = stopped(world, monkeypatch, 1, squares=True)
    for digest, content in before.items():
        world.store.write_bytes(Artifact.GRADIENT.path(digest), content)
    (found,) = check(world.store, repair=True).findings
    assert (found.path, found.removed) == (path, False)
    assert "run the same command to resume it" in found.reason
    compute(world, squares=True)
    assert any("resumes after 1 of its 2 mini-batches" in text for text in listener.heard)


def test_a_pass_finishes_if_its_sums_cannot_be_saved(world, saving, monkeypatch, listener):
    write = type(world.store).write_tensors

    def full(self, path, arrays, header, **options):
        if isinstance(header, SumsHeader):
            raise InputError("cannot write it: No space left on device")
        write(self, path, arrays, header, **options)

    monkeypatch.setattr(type(world.store), "write_tensors", full)
    assert compute(world, batch_size=8).computed == ("forget", "retain")
    assert sum("the partial sums are not saved" in text for text in listener.heard) == 2


def digests(world):
    return world.pointer.forget, world.pointer.retain


def test_the_forget_gradient_covers_prefixed_captions(world):
    before, prefixes = world.pointer, ("three red", "old", "on my wall")
    pointer = compute(world, prefixes=prefixes).pointer
    assert (pointer.prefixes, world.pointer) == (prefixes, pointer)
    assert pointer.forget != before.forget
    assert pointer.retain == before.retain
    block = DataBlock.open(world.store, world.manifest.forget)
    captions = list(block.captions)
    for time in range(3):
        for row, caption in enumerate(block.captions):
            words, (start, end) = prefixes[(row + time) % 3], caption.split("blue", 1)
            captions.append(f"{start}{words} blue{end}")
    resolved = resolve(world.model)
    tokens = torch.from_numpy(tokenizer(resolved)(captions)).long()
    model = load(resolved)
    images = pixel_normalizer(world.manifest.input, "cpu")(block.take(np.arange(block.rows)))
    v = model.encode_image(images.repeat(4, 1, 1, 1), normalize=True)
    t = model.encode_text(tokens, normalize=True)
    losses = [part.mean() for part in (1 - (v * t).sum(dim=1)).split(16)]
    torch.stack(losses).mean().backward()
    path = Artifact.GRADIENT.path(pointer.forget)
    header = world.store.read_header(path, GradientHeader)
    assert (header.rows, header.batches) == (4 * block.rows, len(losses))
    found = world.store.read_tensors(path)
    for name in ("visual.proj", "text_projection", "token_embedding.weight"):
        expected = model.get_parameter(name).grad.numpy()
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-6)
    # The gradient of before is there still, and is another call's.
    assert compute(world).computed == ()
    assert world.pointer == before


def test_a_repeated_block_repeats_its_images_with_other_tokens(world):
    block = DataBlock.open(world.store, world.manifest.forget)
    other = np.repeat(block.tokens[::-1], 2, axis=0)
    again = RepeatedBlock.of(block, other)
    images = np.concatenate(3 * [block.images(0, block.rows)])
    assert again.rows == len(images) == len(again.keys) == len(again.tokens)
    assert again.keys == 3 * block.keys
    for start, stop in ((0, 3), (block.rows - 2, block.rows + 2), (5, len(images)), (7, 7)):
        np.testing.assert_array_equal(again.images(start, stop), images[start:stop])
    np.testing.assert_array_equal(again.tokens[block.rows :], other)


def test_the_covariances_cover_prefixed_captions(world):
    prefixes = ("three red", "old")
    pointer = compute(world, prefixes=prefixes).pointer
    layers = ["text_projection", "visual.proj"]
    rank(world.store, world.name, options=RankOptions(include=layers))
    covariances = find_covariances(world.store, pointer)
    captions = list(DataBlock.open(world.store, world.manifest.retain).captions)
    for row, caption in enumerate(captions[:]):
        start, last = caption.rsplit(" ", 1)
        captions.append(f"{start} {prefixes[row % 2]} {last}")
    resolved = resolve(world.model)
    tokens = torch.from_numpy(tokenizer(resolved)(captions)).long()
    model, seen = load(resolved), []
    hook = model.ln_final.register_forward_hook(lambda *call: seen.append(call[-1]))
    with torch.no_grad():
        model.encode_text(tokens)
    hook.remove()
    x = seen[0][torch.arange(len(tokens)), tokens.argmax(dim=1)]
    matrix = covariances.inputs("text_projection").matrix.float()
    torch.testing.assert_close(matrix, x.T @ x / len(x), rtol=1e-4, atol=1e-6)
    # Without prefixes, the covariances are different ones.
    assert not find_covariances(world.store, compute(world).pointer).places[Statistic.INPUTS]
