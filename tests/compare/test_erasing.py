"""ESD-x and SalUn on a tiny UNet, and a comparison on the small trained pipeline."""

import copy
import json
import shutil
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from slsgu_cli.clip.metrics import frechet_distance
from slsgu_cli.compare.baselines.hirm import UPDATES
from slsgu_cli.compare.unet import Denoiser
from slsgu_cli.errors import InputError, MissingError, StaleError, UsageError
from slsgu_cli.records.comparison import Method, PipelinePlan
from slsgu_cli.store.store import Store

WIDTH, TOKENS = 16, 3
PROMPTS = ("", "a star", "an icon of a castle", "blue")


@dataclass
class TinyPipeline:
    """What a pipeline gives to what trains its UNet; every prompt has states of its own."""

    unet: nn.Module
    scheduler: object
    pooled: bool = False
    vae_scale_factor: int = 8

    def encode_prompt(self, *, prompt, device, num_images_per_prompt, do_classifier_free_guidance):
        states = torch.stack([states_of(text) for text in prompt])
        empty = states_of("").expand_as(states)
        return (states, empty, states[:, 0], empty[:, 0]) if self.pooled else (states, empty)

    def prepare_extra_step_kwargs(self, generator, eta):
        return {"generator": generator, "eta": eta}


def states_of(text: str) -> Tensor:
    generator = torch.Generator().manual_seed(PROMPTS.index(text))
    return torch.randn((TOKENS, WIDTH), generator=generator)


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers")


@pytest.fixture
def denoiser(diffusers):
    return tiny_denoiser(diffusers)


def tiny_denoiser(diffusers, *, kind="v_prediction", pooled=False):
    torch.manual_seed(0)
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 2,
        "projection_class_embeddings_input_dim": WIDTH + 6 * 2,
    }
    unet = diffusers.UNet2DConditionModel(
        sample_size=4,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        norm_num_groups=4,
        block_out_channels=(8, 16),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **(added if pooled else {}),
    ).eval()
    scheduler = diffusers.DDIMScheduler(prediction_type=kind, clip_sample=False)
    return Denoiser(TinyPipeline(unet, scheduler, pooled), "cpu")


def weights(denoiser):
    return {name: value.clone() for name, value in denoiser.unet.state_dict().items()}


def changed(denoiser, before):
    """Return the names of the parameters that are not what they were."""
    now = denoiser.unet.state_dict()
    return {name for name, value in before.items() if not torch.equal(value, now[name])}


def test_esd_changes_all_cross_attention_and_nothing_else(denoiser):
    from slsgu_cli.compare.baselines.esd import erase

    before = weights(denoiser)
    erase(denoiser, PROMPTS[1:2], PipelinePlan(iterations=3, rate=1e-3, steps=4))
    names = {name for name in before if ".attn2." in name}
    assert changed(denoiser, before) == names
    assert len(names) < len(before) / 2
    assert all(parameter.requires_grad for parameter in denoiser.unet.parameters())


def test_esd_leads_the_concepts_prompt_to_the_negated_guidance(denoiser):
    from slsgu_cli.compare.baselines.esd import erase, negated

    original = copy.deepcopy(denoiser.unet)
    generator = torch.Generator().manual_seed(5)
    (condition, empty), (other, _) = (denoiser.conditions([text]) for text in PROMPTS[1:3])
    noisy, time = denoiser.noise(1, generator), torch.tensor(500)

    def predicts(unet, prompt):
        with torch.no_grad():
            return denoiser.predict(noisy, time, prompt, unet)

    goal = negated(denoiser, original, noisy, time, condition, empty)
    asked, plain = predicts(original, condition), predicts(original, empty)
    torch.testing.assert_close(goal, 2 * plain - asked)
    erase(denoiser, PROMPTS[1:2], PipelinePlan(iterations=60, rate=3e-3, steps=4))
    after = predicts(None, condition)
    assert (after - goal).norm() < 0.6 * (asked - goal).norm()
    # What the prompt adds now points away from what it added.
    assert float(((after - plain) * (asked - plain)).sum()) < 0
    # Another prompt keeps more of what it adds.
    kept = predicts(None, other) - predicts(original, other)
    assert kept.norm() < (after - asked).norm()


def test_esd_without_cross_attention_is_refused():
    from slsgu_cli.compare.cross_attention import cross_attention

    with pytest.raises(InputError, match="no cross-attention"):
        cross_attention(nn.Sequential(nn.Linear(2, 2)))


@pytest.fixture
def lessons():
    from slsgu_cli.compare.baselines.salun import SalunData

    generator = torch.Generator().manual_seed(1)
    return SalunData(
        forget=torch.randn((10, 2, 4, 4), generator=generator) + 1,
        retain=torch.randn((6, 2, 4, 4), generator=generator) - 1,
        captions=["an icon of a castle"] * 6,
        concept="star",
        others=["blue"],
        prompt=lambda name, number: "a star" if name == "star" else name,
    )


def test_salun_changes_the_masked_half_of_the_weights_and_nothing_else(denoiser, lessons):
    from slsgu_cli.compare.baselines.salun import forget_mask, unlearn

    plan = PipelinePlan(iterations=3, rate=1e-3, seed=7)
    mask = forget_mask(denoiser, lessons, torch.Generator().manual_seed(plan.seed))
    total = sum(value.numel() for value in mask.values())
    assert sum(int(value.sum()) for value in mask.values()) == total // 2
    before = weights(denoiser)
    unlearn(denoiser, lessons, plan)
    now = denoiser.unet.state_dict()
    moved = {name: before[name] != now[name] for name in before}
    assert not any((moved[name] & ~mask[name]).any() for name in mask)
    assert sum(int(value.sum()) for value in moved.values()) > 0.9 * (total // 2)


def test_salun_trains_the_concept_towards_another_class(denoiser, lessons, monkeypatch):
    from slsgu_cli.compare.baselines import salun

    monkeypatch.setattr(salun, "RETAIN_WEIGHT", 0.0)

    (star, _), (blue, _) = (denoiser.conditions(8 * [text]) for text in ("a star", "blue"))

    def apart():
        generator = torch.Generator().manual_seed(3)
        times = denoiser.drawn_times(8, generator)
        noisy = denoiser.noised(lessons.forget[:8], denoiser.noise(8, generator), times)
        with torch.no_grad():
            said = [denoiser.predict(noisy, times, each) for each in (star, blue)]
        return float((said[0] - said[1]).norm())

    before = apart()
    salun.unlearn(denoiser, lessons, PipelinePlan(iterations=20, rate=3e-4))
    assert apart() < 0.7 * before


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_target_of_a_unet_follows_the_schedulers_prediction_type(diffusers, kind):
    denoiser = tiny_denoiser(diffusers, kind=kind)
    generator = torch.Generator().manual_seed(2)
    latents, noise = denoiser.noise(2, generator), denoiser.noise(2, generator)
    time = 400
    times = torch.tensor([time, time])
    noisy, scheduler = denoiser.noised(latents, noise, times), denoiser.pipeline.scheduler
    torch.testing.assert_close(noisy, scheduler.add_noise(latents, noise, times))
    scheduler.set_timesteps(10)
    said = denoiser.target(latents, noise, times)
    found = scheduler.step(said, time, noisy).pred_original_sample
    torch.testing.assert_close(found, latents, rtol=1e-4, atol=1e-4)


def test_a_unet_that_predicts_something_else_is_refused(diffusers):
    denoiser = tiny_denoiser(diffusers, kind="sample")
    latents = torch.zeros((1, 2, 4, 4))
    with pytest.raises(InputError, match="predicts 'sample'"):
        denoiser.target(latents, latents, torch.tensor([3]))


def test_a_latent_is_denoised_with_the_prompt_up_to_a_step(denoiser):
    condition, empty = denoiser.conditions(["a star"])

    def denoised(until, guidance):
        generator = torch.Generator().manual_seed(4)
        return denoiser.partly_denoised(
            condition, empty, steps=4, until=until, guidance=guidance, generator=generator
        )

    fresh, first = denoised(0, 3.0)
    assert torch.equal(fresh, denoiser.noise(1, torch.Generator().manual_seed(4)))
    later, time = denoised(2, 3.0)
    assert int(time) < int(first)
    assert not torch.equal(later, denoised(2, 1.0)[0])
    scheduler = denoiser.pipeline.scheduler
    assert [int(first), int(time)] == [int(scheduler.timesteps[n]) for n in (0, 2)]


def test_a_unet_of_two_encoders_reads_pooled_states_and_sizes(diffusers):
    from slsgu_cli.compare.baselines.esd import erase

    denoiser = tiny_denoiser(diffusers, pooled=True)
    condition, _ = denoiser.conditions(["a star", "blue"])
    assert condition.added["time_ids"].tolist() == 2 * [[32, 32, 0, 0, 32, 32]]
    assert torch.equal(condition.added["text_embeds"], condition.states[:, 0])
    before = weights(denoiser)
    erase(denoiser, PROMPTS[1:2], PipelinePlan(iterations=1, rate=1e-3, steps=2))
    assert changed(denoiser, before)


def test_the_distance_is_frechets():
    generator = np.random.default_rng(0)
    first = generator.normal(size=(60, 4)) @ generator.normal(size=(4, 4))
    second = generator.normal(size=(50, 4)) + 1
    covariances = [np.cov(rows, rowvar=False) for rows in (first, second)]
    roots = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).astype(complex)).real
    apart = np.square(first.mean(axis=0) - second.mean(axis=0)).sum()
    wanted = apart + sum(map(np.trace, covariances)) - 2 * roots.sum()
    found = frechet_distance(torch.from_numpy(first), torch.from_numpy(second))
    assert found == pytest.approx(wanted)
    assert frechet_distance(torch.from_numpy(first), torch.from_numpy(first)) < 1e-9


@pytest.fixture(scope="module")
def searched(demo_world, trained_models, tmp_path_factory):
    """A store with an edit that was searched on the small trained pipeline; do not write to it."""
    from slsgu_cli.records.targets import (
        Budget,
        DiffusionOptions,
        HeldOutBudget,
        TargetSearchOptions,
    )
    from slsgu_cli.targets.search import search_target

    folder = tmp_path_factory.mktemp("searched") / "store"
    shutil.copytree(demo_world.store.root, folder)
    store = Store(str(folder))
    budget = Budget(concept=1, others=2, diffusion=DiffusionOptions(steps=2, guidance=4.0))
    options = TargetSearchOptions(
        target=trained_models / "sd",
        layers=["transformer.resblocks.6.mlp.c_proj"],
        steps=1,
        budget=budget,
        test=HeldOutBudget(concept=1, others=1),
        device="cpu",
    )
    search_target(store, "facebook", options=options)
    return store


@pytest.fixture
def searched_store(searched, tmp_path):
    """The same in a store of its own."""
    shutil.copytree(searched.root, tmp_path / "store")
    return Store(str(tmp_path / "store"))


def test_methods_are_compared_on_a_pipeline_that_stays_as_it_was(
    searched_store, trained_models, monkeypatch
):
    from slsgu_cli.compare import on_pipeline
    from slsgu_cli.records.targets import Budget, DiffusionOptions
    from slsgu_cli.store.artifacts import Artifact
    from slsgu_cli.store.catalog import Standing, entries
    from slsgu_cli.targets.models import Pipeline

    pipe = Pipeline.load(trained_models / "sd", device="cpu")
    monkeypatch.setattr(on_pipeline.Pipeline, "load", lambda *_, **__: pipe)
    modules = (pipe.pipeline.unet, pipe.pipeline.text_encoder)
    before = [{n: value.clone() for n, value in each.state_dict().items()} for each in modules]
    options = on_pipeline.PipelineCompareOptions(
        target=trained_models / "sd",
        methods=(Method.ESD, Method.SALUN, Method.OCE, Method.HIRM_S, Method.OURS),
        rates=(1e-2,),
        iterations=1,
        device="cpu",
        budget=Budget(
            concept=1, others=3, seed=9, diffusion=DiffusionOptions(steps=2, guidance=4.0)
        ),
    )
    found = on_pipeline.compare_on_pipeline(searched_store, "facebook", options=options)
    labels = ["esd 0.01", "salun 0.01", "oce 1", "oce 3", "oce 10", "hirm-s 0.01", "ours"]
    assert [row.label for row in found.outcomes] == ["original", *labels]
    original, *others = found.outcomes
    assert original.distance < 1e-6 < min(row.distance for row in others)
    assert [row.setting for row in others] == [None, None, 1.0, 3.0, 10.0, None, None]
    assert [row.plan and row.plan.iterations for row in others[-2:]] == [UPDATES, None]
    assert all(row.effect.concept.total == 1 for row in found.outcomes)
    assert all(row.effect.others.total == 3 and row.seconds > 0 for row in found.outcomes[1:])
    for module, values in zip(modules, before, strict=True):
        now = module.state_dict()
        assert all(torch.equal(value, now[name]) for name, value in values.items())
    pictures = "target-comparisons/facebook@sd"
    for folder in ("original", *(label.replace(" ", "-") for label in labels)):
        assert len(searched_store.names(f"{pictures}/{folder}", ".png")) == 4
    assert searched_store.read_bytes(f"{pictures}/sheet.png")[:4] == b"\x89PNG"
    (entry,) = [e for e in entries(searched_store) if e.kind is Artifact.TARGET_COMPARISON]
    assert entry.state is Standing.OK
    assert "target " in entry.summary()
    # What is recorded for the same plan is not run again; of another plan it is.
    monkeypatch.setattr(on_pipeline.Pipeline, "load", lambda *_, **__: pytest.fail("painted again"))
    assert on_pipeline.compare_on_pipeline(searched_store, "facebook", options=options) == found
    with pytest.raises(pytest.fail.Exception, match="painted again"):
        more = replace(options, iterations=2)
        on_pipeline.compare_on_pipeline(searched_store, "facebook", options=more)


def test_a_pipeline_without_a_unet_is_not_trained(searched_store, tiny_pipeline):
    from slsgu_cli.compare import on_pipeline

    options = on_pipeline.PipelineCompareOptions(target=tiny_pipeline("sd3"), rates=(1e-2,))
    with pytest.raises(UsageError, match="transformer: esd, salun, uce, speed and oce edit") as met:
        on_pipeline.compare_on_pipeline(searched_store, "facebook", options=options)
    assert met.value.hint == "--methods diffquickfix,hirm-s,hirm-r,ours"


def test_without_an_edit_of_the_pipeline_the_search_is_named(searched_store, trained_models):
    from slsgu_cli.compare.on_pipeline import our_edit
    from slsgu_cli.store.artifacts import read_manifest, read_pointer

    pointer = read_pointer(searched_store, read_manifest(searched_store, "facebook"))
    edit, seconds = our_edit(searched_store, pointer, trained_models / "sd")
    assert edit.header.name == "facebook@sd"
    assert seconds > 0
    path = "target-trials/facebook@sd.json"
    record = json.loads(searched_store.read_bytes(path))
    searched_store.write_record(path, {**record, "trials": []})
    with pytest.raises(StaleError, match="not among the recorded trials"):
        our_edit(searched_store, pointer, trained_models / "sd")
    searched_store.remove("edits/facebook@sd.safetensors")
    with pytest.raises(MissingError, match="no edit facebook@sd") as met:
        our_edit(searched_store, pointer, trained_models / "sd")
    assert "--target" in met.value.hint


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target", "sd", "--epochs", "3"], "--epochs is for comparing without --target"),
        (["--iterations", "3"], "--iterations is for a diffusion pipeline"),
        (["red", "--target", "sd"], "one set at a time"),
        (["--target", "sd", "--lr", "auto"], "--lr auto is for comparing without --target"),
        (["--target", "sd", "--methods", "ssd"], "--methods ssd is not one of"),
    ],
)
def test_options_of_the_other_comparison_are_refused(words, message, tmp_path):
    from typer.testing import CliRunner

    from slsgu_cli.cli.app import app

    words = ["compare", "blue", *words]
    met = CliRunner().invoke(app, words, env={"SLSGU_STORE": str(tmp_path)})
    assert met.exit_code == 2
    assert message in met.stderr


def test_the_comparison_is_printed_as_rows_for_a_pipe(searched_store, trained_models):
    from typer.testing import CliRunner

    from slsgu_cli.cli.app import app

    words = ["compare", "facebook", "--target", str(trained_models / "sd"), "--methods", "ours"]
    words += ["--images", "1", "--others", "2", "--denoise", "2", "--device", "cpu"]
    told = CliRunner().invoke(app, words, env={"SLSGU_STORE": searched_store.root})
    rows = [line.split("\t") for line in told.stdout.splitlines()]
    assert rows[0] == [
        *("method", "setting", "lr", "value", "iterations"),
        *("UA", "IRA", "distance", "seconds"),
    ]
    assert [row[0] for row in rows[1:]] == ["original", "ours"]
    assert rows[1][7] == "0"
    assert "sheet.png" in told.stderr
