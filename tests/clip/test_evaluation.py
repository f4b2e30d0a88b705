import numpy as np
import pytest
import tiny_clip
import torch
from reference import Reference

from slsgu_cli.clip import loading, models, tokenizers
from slsgu_cli.clip.evaluation import class_losses, prepare
from slsgu_cli.clip.in_place import edited
from slsgu_cli.errors import InputError
from slsgu_cli.records.method import Tower
from slsgu_cli.store.blocks import DataBlock


def evaluation(world):
    resolved = models.resolve(world.model)
    return prepare(
        world.store,
        world.manifest,
        loading.load(resolved),
        tokenize=tokenizers.tokenizer(resolved),
        device="cpu",
    )


def labels_of(group):
    return [group.names[index] for index in group.images.labels.tolist()]


def test_images_of_the_concept_do_not_count_for_utility(shared_world):
    found = evaluation(shared_world)
    assert labels_of(found.forget) == ["blue"] * 8
    assert set(labels_of(found.utility["first"])) == set(tiny_clip.COLOURS) - {"blue"}
    assert len(found.utility["first"].images) == 56
    assert len(found.utility["second"].images) == 40
    assert found.forget.names == found.utility["first"].names == tuple(sorted(tiny_clip.COLOURS))
    block = DataBlock.open(shared_world.store, shared_world.manifest.evals["first"])
    rows = np.concatenate([found.forget.images.rows, found.utility["first"].images.rows])
    assert sorted(rows.tolist()) == list(range(block.rows))


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_the_original_models_accuracies(cache_bytes, shared_world):
    found = evaluation(shared_world)
    layers = ["visual.conv1.weight", "text_projection"]
    found.base_pass(layers, cache_bytes=cache_bytes)
    figures = Reference(shared_world).figures()
    base = found.forget.base_accuracy()
    assert (base.top1, base.top5, base.rows) == (*figures.forget, 8)
    for name, group in found.utility.items():
        own = group.base_accuracy()
        assert (own.top1, own.top5) == pytest.approx(figures.utility[name])


def test_without_its_class_the_concept_is_an_additional_class(world):
    world.build(evals={"second": world.sources["second"]}, templates={})
    found = evaluation(world)
    assert found.forget.names == (*sorted(tiny_clip.SHAPES), "blue")
    assert found.utility["second"].names == tuple(sorted(tiny_clip.SHAPES))
    assert labels_of(found.forget) == ["blue"] * world.manifest.forget.rows
    found.base_pass((), cache_bytes=0)
    assert found.forget.base_accuracy().top1 == pytest.approx(Reference(world).figures().forget[0])


@pytest.mark.parametrize("concept", ["BLUE", "light_blue", " Light  Blue "])
def test_the_concept_is_found_however_it_is_written(concept, world, tmp_path):
    """As the set was built: without regard to case, underscores and spaces."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "labelled.parquet"
    name = "blue" if concept == "BLUE" else "Light_Blue"
    samples = [tiny_clip.row(number) for number in range(16)]
    rows = [
        {"image": s["image"], "label": name if s["colour"] == "blue" else s["colour"]}
        for s in samples
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    world.build(
        concept=concept,
        match=["blue"],
        evals={"first": str(path)},
        templates={"first": world.sources["templates"]},
    )
    assert world.manifest.forget_eval == "first"
    found = evaluation(world)
    assert len(found.forget.images) == 2
    assert len(found.utility["first"].images) == 14


def blue_alone(tmp_path):
    """Return rows that are all blue, and a list of all colours to tell them from."""
    names = tmp_path / "classes.txt"
    names.write_text("\n".join(tiny_clip.COLOURS))
    blue = range(1005, 1064, len(tiny_clip.COLOURS))
    return tiny_clip.write_labelled(tmp_path / "blue.parquet", {"colour": blue}), str(names)


def test_a_set_that_shows_the_concept_alone_has_no_utility(world, tmp_path):
    rows, names = blue_alone(tmp_path)
    world.build(
        evals={"blues": rows, "second": world.sources["second"]},
        classes={"blues": names},
        templates={},
    )
    found = evaluation(world)
    assert set(found.utility) == {"second"}
    assert labels_of(found.forget) == ["blue"] * 8
    assert len(found.forget.names) == len(tiny_clip.COLOURS)
    found.base_pass((), cache_bytes=0)
    assert found.utility["second"].base_accuracy().rows == 40


def test_sets_with_only_the_concept_are_not_enough(world, tmp_path):
    rows, names = blue_alone(tmp_path)
    world.build(evals={"blues": rows}, classes={"blues": names}, templates={})
    with pytest.raises(InputError, match="show nothing but 'blue'") as error:
        evaluation(world)
    assert "--eval" in error.value.hint


def test_a_search_without_evaluation_sets_is_an_error(world):
    world.build(evals={}, templates={})
    with pytest.raises(InputError, match="set blue has nothing to measure on") as error:
        evaluation(world)
    assert "--eval" in error.value.hint


def test_towers_are_recognised_by_name(shared_world):
    found = evaluation(shared_world)
    assert found.tower(Tower.VISION) is found.vision
    assert found.tower(Tower.TEXT) is found.text


def test_accuracy_counts_rows(shared_world):
    group = evaluation(shared_world).forget
    found = group.accuracy_of(torch.tensor([0, 3, 7, 0]))
    assert (found.top1, found.top5, found.rows, found.is_test) == (50, 75, 4, False)


def test_an_edit_lasts_as_long_as_its_block(shared_world):
    model = loading.load(models.resolve(shared_world.model))
    before = model.visual.proj.data.clone()
    with pytest.raises(KeyError), edited(model, {"visual.proj": torch.zeros_like(before)}):
        assert not model.visual.proj.any()
        raise KeyError
    assert torch.equal(model.visual.proj.data, before)


def test_the_loss_of_a_class_is_that_of_its_images(shared_world):
    group = evaluation(shared_world).utility["first"]
    names = labels_of(group)
    before, after = torch.zeros(len(names)), torch.zeros(len(names))
    red = [row for row, name in enumerate(names) if name == "red"]
    green = [row for row, name in enumerate(names) if name == "green"]
    after[red[:6]], after[green[0]], before[red[0]] = 1, 5, 2
    losses = class_losses(group, before == 0, after == 0)
    # The concept has no image here; classes that lost alike stand in the order of their names.
    assert [loss.name for loss in losses] == [
        "red",
        "green",
        *sorted(set(names) - {"red", "green"}),
    ]
    assert losses[0].lost == pytest.approx(100 * 5 / len(red))
    assert (losses[0].rows, losses[0].before) == (len(red), 100 * (1 - 1 / len(red)))
    assert losses[1].after == pytest.approx(100 * (1 - 1 / len(green)))
    assert all(loss.lost == 0 for loss in losses[2:])
