"""What a search on the small trained targets must come to, on the embedded model's facebook."""

import pytest
from places import DEMO
from worlds import World

from slsgu_cli.records.targets import DiffusionOptions
from slsgu_cli.store.store import Store

pytestmark = pytest.mark.slow
PROMPTS = ("the facebook logo", "facebook", "a github logo", "a drawing of a castle")
FEW = 8
FAST = DiffusionOptions(steps=6, guidance=4.0)


@pytest.fixture(scope="module")
def facebook(demo_model, tmp_path_factory):
    """The embedded facebook, with few retain rows."""
    folder = tmp_path_factory.mktemp("facebook")
    heldout = f"{DEMO}/heldout.parquet"
    sources = {
        "pairs": f"{DEMO}/train.parquet",
        "first": f"{heldout}?kind=brand",
        "second": f"{heldout}?kind=object",
        "templates": f"{DEMO}/templates.txt",
    }
    world = World(Store(str(folder / "store")), "facebook", demo_model, sources)
    world.build(retain_samples=64, label_column=None, test_fraction=0.5)
    world.grade()
    return world


def test_the_small_llava_forgets_facebook_and_keeps_the_rest(facebook, trained_models, monkeypatch):
    from slsgu_cli.records.targets import AskRequest, Budget, HeldOutBudget, TargetSearchOptions
    from slsgu_cli.targets import subjects
    from slsgu_cli.targets.ask import ask
    from slsgu_cli.targets.search import search_target

    # What a few images are read as ranks the layers as more of them do.
    monkeypatch.setattr(subjects, "ROWS", FEW)
    options = TargetSearchOptions(
        target=trained_models / "llava",
        budget=Budget(others=80),
        test=HeldOutBudget(others=80),
        top=1,
        device="cpu",
    )
    found = search_target(facebook.store, "facebook", options=options)
    assert found.figures.is_test and found.figures.after.concept.total == 17
    assert found.figures.after.ua >= 90
    assert found.figures.after.ira >= found.figures.before.ira - 5
    # Late layers change least of what the language model reads of other images.
    assert next(iter(found.trials.importance)) == found.chosen.layer
    assert found.chosen.layer == "visual.transformer.resblocks.6.mlp.c_proj.weight"
    request = AskRequest(names=["facebook@llava"], target=trained_models / "llava")
    answers = ask(facebook.store, request)[0].answers
    forgotten, others = answers[:3], answers[3:]
    assert all("facebook" in a.before and "facebook" not in a.after for a in forgotten)
    assert sum(a.before == a.after for a in others) >= len(others) - 1


def test_the_small_stable_diffusion_forgets_facebook_and_keeps_the_rest(facebook, trained_models):
    from slsgu_cli.records.targets import (
        Budget,
        GenerateRequest,
        HeldOutBudget,
        TargetSearchOptions,
    )
    from slsgu_cli.targets.generate import generate
    from slsgu_cli.targets.search import search_target

    options = TargetSearchOptions(
        target=trained_models / "sd",
        budget=Budget(concept=5, others=6, diffusion=FAST),
        test=HeldOutBudget(concept=5, others=6),
        top=1,
        steps=4,
        device="cpu",
    )
    found = search_target(facebook.store, "facebook", options=options)
    assert found.figures.is_test
    assert found.figures.after.ua >= 85
    assert found.figures.after.others.count >= found.figures.before.others.count - 1
    # And on prompts and seeds that neither the search nor the report had.
    request = GenerateRequest(
        names=["facebook@sd"],
        target=trained_models / "sd",
        prompts=PROMPTS,
        seeds=range(100, 102),
        diffusion=FAST,
        judges=(facebook.model,),
    )
    record, _ = generate(facebook.store, request)
    assert record.after.ua >= 90
    assert record.after.ira >= record.before.ira - 5
