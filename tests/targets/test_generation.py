"""Generation and answers on the small trained models, where SLSGU_TEST_MODELS names them."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from worlds import Listener

from slsgu_cli.engine.set_edits import direct_edit
from slsgu_cli.errors import InputError, StaleError, UsageError
from slsgu_cli.records.directions import Direction
from slsgu_cli.records.figures import Effect, Share
from slsgu_cli.records.options import RankOptions
from slsgu_cli.store.artifacts import Artifact, read_manifest
from slsgu_cli.targets.models import explained

TEXT = "transformer.resblocks.6.mlp.c_proj.weight"
VISION = "visual.transformer.resblocks.6.mlp.c_fc.weight"


@pytest.fixture(scope="module")
def pipe(trained_models):
    from slsgu_cli.targets.models import Pipeline

    return Pipeline.load(trained_models / "sd", device="cpu")


@pytest.fixture(scope="module")
def llava(trained_models):
    from slsgu_cli.targets.models import Llava

    return Llava.load(trained_models / "llava", device="cpu")


@pytest.fixture
def loaded(pipe, llava, monkeypatch):
    """Let commands find both models in memory."""
    from slsgu_cli.targets import models

    monkeypatch.setattr(models.Pipeline, "load", lambda *_, **__: pipe)
    monkeypatch.setattr(models.Llava, "load", lambda *_, **__: llava)


@pytest.fixture
def edits(demo_world, tmp_path):
    """A store of its own with an edit of each tower, unsearched."""
    from slsgu_cli.checkpoints.edits import write_edit
    from slsgu_cli.store.store import Store

    store = Store(str(tmp_path / "store"))
    for name, layer, step in (("text", TEXT, 40.0), ("vision", VISION, 40.0)):
        edit = direct_edit(
            demo_world.store,
            "facebook",
            layer=layer,
            step=step,
            options=RankOptions(direction=Direction.GRADIENT),
        )
        write_edit(store, replace(edit, header=replace(edit.header, name=name)))
    return store


def test_a_live_edit_is_the_edit_that_apply_writes(pipe, edits, tmp_path, trained_models):
    from slsgu_cli.checkpoints.apply import apply_edits
    from slsgu_cli.checkpoints.edits import load_edit
    from slsgu_cli.checkpoints.layouts import read_weight_set
    from slsgu_cli.checkpoints.naming_schemes import tensor_places, tower_places
    from slsgu_cli.checkpoints.targets import read_target
    from slsgu_cli.records.options import ApplyOptions
    from slsgu_cli.targets.models import new_values

    edit = load_edit(edits, "text")
    target = read_target(trained_models / "sd")
    apply_edits([edit], target, tmp_path / "sd", options=ApplyOptions())
    state = read_weight_set([tmp_path / "sd/text_encoder/model.safetensors"])
    written, _ = state.layer(tensor_places(TEXT, tower_places(state.owners)[0]))
    (values,) = new_values(pipe.encoders, [edit])
    # The file is rounded once, from fp64; a live layer is fp32 in between.
    np.testing.assert_array_max_ulp(values[TEXT].half().numpy(), written, maxulp=1)


def test_edits_in_memory_end_with_their_block_and_split_fused_layers(pipe):
    live = pipe.encoders[0]
    fused = "transformer.resblocks.0.attn.in_proj_weight"
    before = live.value(fused).clone()
    with live.edited({fused: before + 1}):
        assert torch.equal(live.value(fused), before + 1)
        assert torch.equal(live.parameters(fused)[1], before[128:256] + 1)
    assert torch.equal(live.value(fused), before)
    key = f"{fused}.k"
    with live.edited({key: live.value(key) + 1}):
        expected = torch.cat([before[:128], before[128:256] + 1, before[256:]])
        assert torch.equal(live.value(fused), expected)
    assert torch.equal(live.value(fused), before)


def test_other_weights_and_layers_without_reach_are_refused(pipe, llava, edits):
    from slsgu_cli.checkpoints.edits import load_edit
    from slsgu_cli.targets.models import new_values

    edit, live = load_edit(edits, "text"), pipe.encoders[0]
    with live.edited({TEXT: live.value(TEXT) + 1}), pytest.raises(StaleError, match="is not the"):
        new_values(pipe.encoders, [edit])
    with pytest.raises(InputError, match="vision tower is not part"):
        new_values(pipe.encoders, [load_edit(edits, "vision")])
    with pytest.raises(InputError, match="vision layer -2"):
        llava.encoder.places("visual.transformer.resblocks.7.mlp.c_fc.weight")


def test_an_image_depends_only_on_its_prompt_and_seed(pipe):
    from slsgu_cli.records.targets import DiffusionOptions
    from slsgu_cli.targets.models import ImageJob

    options = DiffusionOptions(steps=2)
    jobs = [ImageJob("a star icon", 3), ImageJob("an icon of facebook", 7)]
    whole = [np.asarray(image) for image in pipe.generate(jobs, options)]
    (alone,) = pipe.generate(jobs[1:], options)
    assert np.abs(whole[1].astype(int) - np.asarray(alone)).max() <= 1
    assert np.abs(whole[0].astype(int) - whole[1]).max() > 50


def test_generate_writes_images_a_sheet_and_a_record(
    loaded, pipe, edits, demo_world, trained_models
):
    from slsgu_cli.records.targets import DiffusionOptions, GenerateRequest
    from slsgu_cli.store.catalog import Standing, entries
    from slsgu_cli.targets.generate import generate
    from slsgu_cli.targets.models import ImageJob

    diffusion = DiffusionOptions(steps=6, guidance=4.0)
    request = GenerateRequest(
        names=["text"],
        target=trained_models / "sd",
        seeds=(5,),
        diffusion=diffusion,
        judges=(demo_world.model,),
        classes=str(demo_names(edits)),
        prompts=["an icon of facebook", "an icon of github"],
    )
    record, output = generate(edits, request)
    (plain,) = pipe.generate([ImageJob("an icon of facebook", 5)], diffusion)
    kept = Image.open(io.BytesIO(edits.read_bytes("generations/text/original/000-seed5.png")))
    # Generated next to another one: equal but for rounding.
    assert np.abs(np.asarray(kept).astype(int) - np.asarray(plain)).max() <= 1
    assert record.before == Effect(Share(1, 1), Share(1, 1))
    assert record.after.concept == Share(0, 1)
    assert edits.read_bytes("generations/text/sheet.png")[:4] == b"\x89PNG"
    (entry,) = [e for e in entries(edits) if e.kind is Artifact.GENERATION]
    assert entry.state is Standing.OK
    edits.write_tensors("edits/text.safetensors", {}, changed_header(edits))
    (entry,) = [e for e in entries(edits) if e.kind is Artifact.GENERATION]
    assert entry.state is Standing.STALE
    assert output.where("sheet.html").endswith("generations/text/sheet.html")


def test_generate_resumes_after_an_interruption(loaded, pipe, edits, trained_models, monkeypatch):
    from slsgu_cli.records.targets import DiffusionOptions, GenerateRequest
    from slsgu_cli.targets import models
    from slsgu_cli.targets.generate import generate

    request = GenerateRequest(
        names=["text"],
        target=trained_models / "sd",
        seeds=(5,),
        diffusion=DiffusionOptions(steps=1, batch=1),
        prompts=["a star icon", "an icon of github"],
    )
    original, generated = models.Pipeline.generate, []

    def stopping(pipeline, jobs, options):
        generated.append(jobs)
        if len(generated) == 4:
            raise KeyboardInterrupt
        return original(pipeline, jobs, options)

    monkeypatch.setattr(models.Pipeline, "generate", stopping)
    with pytest.raises(KeyboardInterrupt):
        generate(edits, request)
    generate(edits, request)
    assert len(generated) == 5
    resumed = {path.name: path.read_bytes() for path in files_of(edits)}
    generate(edits, request)
    # A complete output is generated again.
    assert len(generated) == 9
    assert {path.name: path.read_bytes() for path in files_of(edits)} == resumed


def files_of(store):
    return [path for path in Path(store.where("generations")).rglob("*") if path.is_file()]


def demo_names(store):
    path = Path(store.where("names.txt"))
    path.write_text("facebook\ngithub\nstar\n")
    return path


def changed_header(store):
    from slsgu_cli.checkpoints.edits import load_edit

    return replace(load_edit(store, "text").header, step=1.0)


def test_ask_compares_answers_about_the_sets_own_images(loaded, edits, demo_world, trained_models):
    from slsgu_cli.records.targets import AskRequest
    from slsgu_cli.targets.ask import ask, sample_pictures

    image = Path(edits.where("facebook.png"))
    image.parent.mkdir(exist_ok=True)
    sample_pictures(demo_world.store, "facebook", 1)[0].image.save(image)
    request = AskRequest(
        names=["vision"], target=trained_models / "llava", images=[image], out=image.parent / "out"
    )
    record, output = ask(edits, request)
    (answer,) = record.answers
    assert "facebook" in answer.before and "facebook" not in answer.after
    assert Path(output.where("answers.png")).is_file()
    with pytest.raises(UsageError, match="no set vision"):
        ask(edits, replace(request, images=[]))


def test_the_forget_gradient_of_answers_lowers_the_odds_of_the_name(llava, demo_world):
    from slsgu_cli.targets.answer_gradient import _loss, answer_gradient
    from slsgu_cli.targets.ask import sample_pictures
    from slsgu_cli.targets.models import Question

    picture = sample_pictures(demo_world.store, "facebook", 1)[0]
    pairs = [
        (Question(picture.image, "What is shown in this image?"), "This is the facebook logo.")
    ]
    gradients = answer_gradient(llava, llava.encoder, pairs, "facebook", [VISION])
    live, gradient = llava.encoder, gradients[VISION]
    slope = float(gradient.square().sum())
    size = 1e-3 / slope**0.5
    with torch.no_grad():
        losses = []
        for sign in (-1, 1):
            with live.edited({VISION: live.value(VISION) + sign * size * gradient}):
                losses.append(float(_loss(llava, pairs, "facebook")))
    assert (losses[1] - losses[0]) / (2 * size) == pytest.approx(slope, rel=0.05)


def test_a_search_on_a_target_records_and_reuses_its_trials(
    loaded, pipe, demo_world, tmp_path, trained_models
):
    import shutil

    from slsgu_cli.checkpoints.edits import load_edit
    from slsgu_cli.records.targets import (
        Budget,
        DiffusionOptions,
        HeldOutBudget,
        TargetSearchOptions,
    )
    from slsgu_cli.store.artifacts import target_edit
    from slsgu_cli.store.store import Store
    from slsgu_cli.targets.search import search_target

    shutil.copytree(demo_world.store.root, tmp_path / "store")
    store = Store(str(tmp_path / "store"))
    budget = Budget(concept=2, others=2, diffusion=DiffusionOptions(steps=2, guidance=4.0))
    options = TargetSearchOptions(
        target=trained_models / "sd",
        layers=["transformer.resblocks.6.mlp.c_proj"],
        steps=2,
        budget=budget,
        test=HeldOutBudget(concept=2, others=2),
        goal=50.0,
        device="cpu",
    )
    first = search_target(store, "facebook", options=options)
    again = search_target(store, "facebook", options=options)
    assert (first.reused, again.reused) == (0, len(first.trials.trials))
    assert (again.trials, again.chosen) == (first.trials, first.chosen)
    record = Artifact.TARGET_TRIALS.path(target_edit("facebook", options.target))
    store.write_bytes(record, b"not a record")
    listener = Listener()
    assert search_target(store, "facebook", options=options).reused == 0
    assert any("recorded trials cannot be used" in told for told in listener.heard)
    live = pipe.encoders[0]
    with live.edited({TEXT: 2 * live.value(TEXT)}), pytest.raises(StaleError, match="not built on"):
        search_target(store, "facebook", options=options)
    edit = load_edit(store, "facebook@sd")
    assert edit.header.target == first.figures
    assert edit.header.target.after.concept.total == 2
    assert edit.header.forgotten is first.forgotten


def test_a_generated_forget_set_resumes_after_an_interruption(
    loaded, demo_world, tmp_path, trained_models
):
    from slsgu_cli.records.options import BuildRequest
    from slsgu_cli.records.targets import DiffusionOptions, SourceRequest
    from slsgu_cli.sets.build import build_sets
    from slsgu_cli.store.store import Store
    from slsgu_cli.targets.generated_sets import forgetting_generated

    store = Store(str(tmp_path / "store"))
    prompts = ("an umbrella heart", "an icon of an umbrella heart")
    images = SourceRequest(
        prompts=prompts,
        pipeline=trained_models / "sd",
        count=3,
        diffusion=DiffusionOptions(steps=2, batch=2),
    )
    plain = BuildRequest(
        name="both",
        concept="umbrella heart",
        model=demo_world.model,
        sources=[demo_world.sources["pairs"]],
        retain_samples=10,
    )
    request = forgetting_generated(store, plain, images)
    manifest = build_sets(store, request)
    folder = Path(request.sources[0])
    made = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert manifest.forget.rows == 3 and len(made) == 6
    assert made["000001.txt"].decode() == prompts[1]
    (folder / "000002.txt").unlink()
    listener = Listener()
    assert forgetting_generated(store, plain, images) == request
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == made
    assert listener.heard[0].startswith("2 of 3 images already exist")
    assert read_manifest(store, "both").retain.rows == 10


def test_an_answer_set_has_the_benchmarks_layout_and_figures(
    loaded, edits, demo_world, trained_models, tmp_path
):
    from slsgu_cli.records.targets import CanvasRequest, DiffusionOptions
    from slsgu_cli.targets.unlearn_canvas import answer_set

    for name, lines in {"themes": "Crayon\nPop Art\n", "objects": "facebook\nstar\n"}.items():
        (tmp_path / name).write_text(lines)
    request = CanvasRequest(
        names=["text"],
        target=trained_models / "sd",
        out=tmp_path / "out",
        seeds=(188,),
        themes=str(tmp_path / "themes"),
        objects=str(tmp_path / "objects"),
        judges=(demo_world.model,),
        diffusion=DiffusionOptions(steps=2),
    )
    found = answer_set(edits, request)
    names = sorted(path.name for path in (tmp_path / "out").glob("*.jpg"))
    assert names == [
        f"{theme}_{thing}_seed188.jpg"
        for theme in ("Crayon", "Pop_Art")
        for thing in ("facebook", "star")
    ]
    assert (found.domain, found.ua.total, found.ira.total, found.cra.total) == ("object", 2, 2, 2)
    first = (tmp_path / "out" / names[0]).read_bytes()
    (tmp_path / "out" / names[0]).unlink()
    assert answer_set(edits, request) == found
    assert (tmp_path / "out" / names[0]).read_bytes() == first
    with pytest.raises(UsageError, match="another edit or other options"):
        answer_set(edits, replace(request, diffusion=DiffusionOptions(steps=3)))


@pytest.mark.parametrize("lack", [MemoryError(), torch.OutOfMemoryError("8 GiB are missing")])
def test_a_lack_of_memory_is_not_reported_as_a_damaged_model(lack):
    with pytest.raises(type(lack)), explained(Path("pipeline")):
        raise lack
    told = pytest.raises(InputError, match="cannot load pipeline: no weights")
    with told, explained(Path("pipeline")):
        raise RuntimeError("no weights")
