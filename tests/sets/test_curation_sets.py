import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from processes import inside

from slsgu_cli.errors import InputError, MissingError, StaleError, UsageError
from slsgu_cli.figures.sheets import contact_sheet
from slsgu_cli.records.codec import decode
from slsgu_cli.records.options import BuildRequest
from slsgu_cli.records.sets import Origin
from slsgu_cli.sets.build import replay
from slsgu_cli.sets.dropped_rows import drop, drop_from_set, hashes, read_keys
from slsgu_cli.sets.inspection import inspect_set, top_words
from slsgu_cli.store.artifacts import Artifact, read_pointer
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.catalog import Standing, entries


def open_block(world, part="forget"):
    manifest = world.manifest
    ref = {"forget": manifest.forget, "retain": manifest.retain, **manifest.evals}[part]
    return DataBlock.open(world.store, ref)


def test_an_inspection_lists_the_rows_of_a_set(world):
    seen = inspect_set(world.store, world.name, images=5)
    block = open_block(world)
    assert [row.key for row in seen.rows] == block.keys
    assert [row.hash for row in seen.rows] == hashes(block)
    assert seen.rows[0].origin == Origin(world.sources["pairs"], seen.rows[0].origin.row)
    assert seen.sources == [(world.sources["pairs"], block.rows)]
    assert ("blue", block.rows) in seen.words
    sheet = Image.open(io.BytesIO(world.store.read_bytes(seen.sheet)))
    assert sheet.format == "PNG"
    assert seen.sheet == "plots/blue-forget-sheet.png"


def test_every_part_can_be_looked_at(world):
    for part in ("retain", "first", "second"):
        assert inspect_set(world.store, "blue", part=part, images=1).part == part
    with pytest.raises(UsageError, match="no part third"):
        inspect_set(world.store, "blue", part="third")


def test_a_sheet_shows_each_image_once():
    shades = [np.full((20, 20, 3), shade, np.uint8) for shade in (40, 90, 140, 190)]
    labels = [(f"key{n}", "特斯拉 $x$\n\0") for n in range(4)]
    page = np.asarray(Image.open(io.BytesIO(contact_sheet(np.stack(shades), labels, title="t"))))
    for shade in (40, 90, 140, 190):
        assert (page[..., :3] == shade).all(-1).sum() > 20_000


def test_words_are_counted_by_caption():
    assert top_words(["The Dog's dog and dog", "a DOG's life", "life of 特斯拉"]) == [
        ("dog's", 2),
        ("life", 2),
        ("dog", 1),
        ("特斯拉", 1),
    ]


def test_dropped_rows_are_gone_and_artifacts_of_them_are_stale(world):
    before = open_block(world)
    keys = [before.keys[3], hashes(before)[0][:10]]
    drop_from_set(world.store, world.name, keys, part="forget")
    after = open_block(world)
    kept = [n for n in range(before.rows) if n not in (0, 3)]
    assert after.keys == [before.keys[n] for n in kept]
    assert after.captions == [before.captions[n] for n in kept]
    assert after.origins == [before.origins[n] for n in kept]
    assert np.array_equal(after.tokens, before.tokens[kept])
    assert np.array_equal(after.images(0, after.rows), before.images(0, before.rows)[kept])
    assert world.manifest.forget.refused["dropped by hand"] == 2
    with pytest.raises(StaleError, match="before its forget set was rebuilt"):
        read_pointer(world.store, world.manifest)
    stale = {entry.kind for entry in entries(world.store) if entry.state is Standing.STALE}
    assert {"pointer", "ranking"} <= stale


def test_an_evaluation_set_keeps_its_labels_and_classes(world):
    before = open_block(world, "first")
    drop_from_set(world.store, world.name, [before.keys[5]], part="first")
    after = open_block(world, "first")
    assert after.labels.tolist() == [n for i, n in enumerate(before.labels.tolist()) if i != 5]
    assert after.class_names == before.class_names
    assert after.templates == before.templates


def test_rows_dropped_in_steps_are_as_if_dropped_at_once(world):
    block = open_block(world)
    once = drop(world.store, world.manifest.forget, block.keys[:2])
    first = drop(world.store, world.manifest.forget, block.keys[:1])
    assert drop(world.store, first, block.keys[1:2]).fingerprint == once.fingerprint
    assert drop(world.store, once, ()) == once
    assert drop(world.store, once, [*block.keys[:2], "nothing"], strict=False) == once


def test_dropping_no_row_or_all_rows_is_an_error(world, tmp_path):
    block = open_block(world)
    with pytest.raises(MissingError, match="no row with the key or hash nothing"):
        drop(world.store, world.manifest.forget, ["nothing"])
    with pytest.raises(InputError, match=r"all \d+ rows would be dropped"):
        drop(world.store, world.manifest.forget, block.keys)
    with pytest.raises(InputError, match="cannot read the keys"):
        read_keys(str(tmp_path / "none"))
    (tmp_path / "keys").write_text("a b\n\nc\n")
    assert read_keys(str(tmp_path / "keys")) == ["a b", "c"]


def test_a_rebuilt_set_drops_the_same_rows(world):
    assert all(replay(world.store, world.name).same.values())
    drop_from_set(world.store, world.name, open_block(world).keys[:3], part="forget")
    before = world.manifest
    result = replay(world.store, world.name)
    assert result.same == dict.fromkeys(("forget", "retain", "first", "second"), True)
    assert result.manifest.forget.fingerprint == before.forget.fingerprint
    assert result.manifest.request == before.request


def test_a_manifest_contains_its_request(shared_world):
    request = decode(BuildRequest, shared_world.manifest.request)
    assert request.sources == (shared_world.sources["pairs"],)
    assert request.model == shared_world.model
    assert request.collect is None


def test_a_manifest_without_its_request_is_stale(world):
    world.store.write_record(Artifact.SET.path(world.name), replace(world.manifest, request={}))
    with pytest.raises(StaleError, match="does not contain its request"):
        replay(world.store, world.name)


def test_show_and_replay_from_the_command_line(world):
    root = world.store.root
    key = open_block(world).keys[0]
    shown = inside("show", "blue", "--json", "--drop", key, store=root)
    assert shown.exit_code == 0, shown.stderr
    told = json.loads(shown.stdout)
    assert {"name": "dropped by hand", "value": 1} in told["set"]["left out"]
    assert key not in [row["key"] for row in told["rows"]]
    assert "stale" in shown.stderr
    again = inside("build-sets", "blue", "--replay", store=root)
    assert again.exit_code == 0, again.stderr
    replayed = inside("build-sets", "blue", "--replay", "--json", store=root)
    assert json.loads(replayed.stdout)["replayed"][0] == {"part": "forget", "rows": "same rows"}
    assert again.stdout.splitlines()[1] == "forget\tsame rows"
    both = inside("build-sets", "blue", "--replay", "--match", "x", store=root)
    assert both.exit_code == 2
    assert "takes no other options" in both.stderr
