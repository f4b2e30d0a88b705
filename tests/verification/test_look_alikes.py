"""Look-alikes: which classes are measured, and their losses next to those of random classes."""

import numpy as np
import pytest
import torch
from reference import Reference, labelled
from under_test import opened

from slsgu_cli.errors import InputError, UsageError
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.records.verification import (
    Check,
    Finding,
    KnownClass,
    Settings,
    VerifiedModel,
    VerifyRequest,
)
from slsgu_cli.verification.bootstrap import DRAWS, percentile_interval, resampled_means
from slsgu_cli.verification.checks.look_alikes import (
    LOOK_ALIKES,
    RANDOM,
    group_losses,
    look_alikes,
)
from slsgu_cli.verification.model import SkippedCheck
from slsgu_cli.verification.results import bounded_figures, conclusion


def turn(module):
    """Change the model enough to lose some classes and to move all names."""
    generator = torch.Generator().manual_seed(3)
    for name in ("visual.proj", "text_projection"):
        values = module.get_parameter(name).data
        values += 0.4 * values.std() * torch.randn(values.shape, generator=generator)


@pytest.fixture(scope="module")
def models(shared_world):
    with torch.no_grad():
        return opened(shared_world), opened(shared_world, change=turn)


def names(found):
    return {key: [each.name for each in known] for key, known in found.items()}


@torch.no_grad()
def test_look_alikes_have_the_nearest_names_of_the_original(shared_world, models):
    """Rank the classes and count the hits by plain loops over open_clip's own features."""
    original, changed = models
    settings = Settings(look_alike_count=3)
    found = look_alikes(changed, settings)
    assert names(found) == names(look_alikes(original, settings))
    before, after = Reference(shared_world), Reference(shared_world, changed.module)
    cosines, accuracy = {}, {}
    for of_set, block in before.blocks.items():
        for name in block.class_names:
            of_name = []
            for each in ("blue", name):
                templates = before.blocks["first" if each == "blue" else of_set].templates
                tokens = before.tokenize([template.format(each) for template in templates])
                texts = before.model.encode_text(tokens, normalize=True)
                of_name.append(torch.nn.functional.normalize(texts.mean(dim=0), dim=0))
            cosines[of_set, name] = float(of_name[0] @ of_name[1])
        labels = np.asarray(block.labels)
        shown = labels >= 0
        images = labelled(after, block, block.class_names, block, np.maximum(labels, 0))
        guesses = images.cosines(changed.module).argmax(dim=1).numpy()
        for place, name in enumerate(block.class_names):
            of_class = shown & (labels == place)
            if of_class.any():
                accuracy[of_set, name] = 100 * np.mean(guesses[of_class] == place)
    others = sorted((key for key in accuracy if key[1] != "blue"), key=lambda key: -cosines[key])
    measured = {
        (key.split(": ")[1], each.name): each.top1
        for key, known in found.items()
        if key.startswith(LOOK_ALIKES)
        for each in known
    }
    assert measured == pytest.approx({key: accuracy[key] for key in others[:3]})
    assert len(set(accuracy.values())) > 2


@torch.no_grad()
def test_the_control_has_as_many_others_of_the_same_sets(models):
    original, _ = models
    named = ("red", "cyan", "pole")
    found = look_alikes(original, Settings(look_alikes=named))
    assert len(found) == 4
    for key, known in found.items():
        group, of_set = key.split(": ")
        if group == LOOK_ALIKES:
            control = found[f"{RANDOM}: {of_set}"]
            assert len(control) == len(known)
            assert not {each.name for each in control} & {"blue", *(each.name for each in known)}
    draws = {
        str(names(look_alikes(original, Settings(look_alikes=named, seed=seed))))
        for seed in range(6)
    }
    assert len(draws) > 1


@torch.no_grad()
def test_classes_are_named(models):
    original, _ = models
    found = look_alikes(original, Settings(look_alikes=("Red", "cyan")))
    assert sorted(names(found)[f"{LOOK_ALIKES}: first"]) == ["cyan", "red"]
    for name in ("pink", "blue"):
        with pytest.raises(InputError, match=f"{name}, of --look-alikes, is no other class"):
            look_alikes(original, Settings(look_alikes=("red", name)))
    groups = original.groups().values()
    every = {group.names[label] for group in groups for label in group.images.labels.tolist()}
    with pytest.raises(SkippedCheck, match="no other class"):
        look_alikes(original, Settings(look_alikes=tuple(every - {"blue"})))


def test_options_that_would_be_ignored_are_refused():
    with pytest.raises(UsageError, match="--look-alikes is for the check look-alikes"):
        VerifyRequest(checks=(Check.AUGMENT,), look_alikes="names.txt")
    with pytest.raises(UsageError, match="--look-alike-count is for the check look-alikes"):
        VerifyRequest(checks=(Check.AUGMENT,), settings=Settings(look_alike_count=5))
    with pytest.raises(UsageError, match="--look-alike-count has no use"):
        VerifyRequest(look_alikes="names.txt", settings=Settings(look_alike_count=5))


def verified(look_alikes, control):
    groups = {LOOK_ALIKES: look_alikes, RANDOM: control}
    classes = {
        f"{group}: set": tuple(
            KnownClass(f"{group} {place}", rows, top1, 0.5)
            for place, (rows, top1) in enumerate(values)
        )
        for group, values in groups.items()
    }
    finding = Finding(Check.LOOK_ALIKES, "k", {}, classes=classes)
    return VerifiedModel("key", "a model", ModelSpec("m"), "weights", None, (finding,))


def test_losses_are_means_over_classes_with_bootstrap_intervals():
    before = verified([(10, 90), (4, 100), (20, 80)], [(10, 100), (10, 50), (10, 60)])
    after = verified([(10, 60), (4, 50), (20, 84)], [(10, 90), (10, 60), (10, 60)])
    like, control = group_losses(before, after)
    assert (like.classes, like.rows) == (3, 34)
    assert like.lost == pytest.approx((30 + 50 - 4) / 3)
    assert like.before - like.after == pytest.approx(like.lost)
    # The class of four images is too small to be the worst.
    assert (like.worst.name, like.worst.lost) == ("look-alikes 0", 30)
    assert (control.lost, control.beyond) == (0, None)
    # Means of three classes drawn with replacement, in a plain loop.
    generator = np.random.default_rng(9)
    means = [[], []]
    for _ in range(DRAWS):
        for side, lost in enumerate(([30, 50, -4], [10, -10, 0])):
            means[side].append(np.mean([lost[generator.integers(3)] for _ in range(3)]))
    ends = [np.percentile(side, [2.5, 97.5]) for side in means]
    assert (like.low, like.high) == pytest.approx(ends[0], abs=1e-6)
    assert (control.low, control.high) == pytest.approx(ends[1], abs=1e-6)
    assert like.beyond.points == pytest.approx(like.lost)
    between = np.percentile(np.subtract(*means), [2.5, 97.5])
    assert (like.beyond.low, like.beyond.high) == pytest.approx(between, abs=1.5)
    assert bounded_figures(before, after) == {
        "look-alikes.mean": pytest.approx(like.lost),
        "look-alikes.worst": 30,
    }
    sentence = "3 look-alikes lost 25.3 points of TA@1 on average (95% interval -4.0 to 50.0)"
    assert sentence in conclusion("blue", before, after).text


def test_a_bootstrap_of_equal_values_has_no_width():
    assert percentile_interval(resampled_means([2.0] * 5)) == (2.0, 2.0)
