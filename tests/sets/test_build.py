import json
import struct
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_clip
import torch
from places import DEMO
from safetensors.torch import load_file, save_file
from tiny_images import encoded, sample, shard, write_folder, write_parquet, write_tar
from worlds import Listener

from slsgu_cli.clip import models, tokenizers
from slsgu_cli.clip.decoding import decoder
from slsgu_cli.errors import InputError, MissingError, SlsguError, UsageError
from slsgu_cli.records.options import BuildRequest
from slsgu_cli.records.sets import ModelSpec, Origin, Screening
from slsgu_cli.sets import assembly
from slsgu_cli.sets import pairs as pairs_module
from slsgu_cli.sets.build import build_sets
from slsgu_cli.sets.image_buffer import ImageBuffer
from slsgu_cli.sets.preview import Preview
from slsgu_cli.sources.parquet import ParquetSource
from slsgu_cli.sources.tar import TarSource
from slsgu_cli.store.artifacts import read_manifest
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.store import Store

CLIP = ModelSpec(f"local-dir:{DEMO / 'clip'}")
KINDS = ("dog", "cat", "bird")

pytestmark = pytest.mark.usefixtures("one_tokenizer")


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "store"))


@pytest.fixture
def decoded(monkeypatch):
    """Count the images decoded."""
    count = []

    def counting(spec):
        decode = decoder(spec)
        return lambda data: (count.append(1), decode(data))[1]

    monkeypatch.setattr(assembly, "decoder", counting)
    return count


@pytest.fixture
def pairs(tmp_path):
    """60 rows: 20 each of dogs, cats and birds, in turn."""
    rows = [sample(i, f"a {KINDS[i % 3]} number {i}") for i in range(60)]
    return write_parquet(tmp_path / "pairs.parquet", rows, group=10)


@pytest.fixture
def labelled(tmp_path):
    rows = [
        sample(100 + i, None, label=KINDS[i % 3], kind="animal" if i < 9 else "more")
        for i in range(12)
    ]
    return write_parquet(tmp_path / "labelled.parquet", rows)


def request(source, **options):
    options = {"name": "dog", "concept": "dog", "retain_samples": 30} | options
    sources = [source] if isinstance(source, str) else source
    return BuildRequest(model=CLIP, sources=sources, **options)


def run(store, source, **options):
    return build_sets(store, request(source, **options))


def blocks(store, manifest):
    return DataBlock.open(store, manifest.forget), DataBlock.open(store, manifest.retain)


def test_a_set_contains_the_requested_rows(store, pairs, labelled):
    manifest = run(store, pairs, evals={"animals": f"{labelled}?kind=animal"})
    assert read_manifest(store, "dog") == manifest
    assert manifest.patterns == ("dog",)
    forget, retain = blocks(store, manifest)
    assert sorted(forget.captions) == sorted(f"a dog number {i}" for i in range(0, 60, 3))
    assert forget.captions != sorted(forget.captions, key=lambda c: int(c.split()[-1]))
    assert retain.rows == 30
    assert not any("dog" in caption for caption in retain.captions)
    assert manifest.retain.refused == {"about the concept": 20}
    assert manifest.forget.seen == manifest.retain.seen == 60
    animals = DataBlock.open(store, manifest.evals["animals"])
    assert animals.class_names == ("bird", "cat", "dog")
    assert animals.labels.tolist() == [2, 1, 0] * 3
    assert animals.keys == [f"row{100 + i}" for i in range(9)]
    assert len(animals.templates) == 7
    assert manifest.forget_eval == "animals"


def test_images_and_tokens_are_the_models(store, pairs, monkeypatch):
    monkeypatch.setattr(pairs_module, "CHUNK", 7)
    forget, _ = blocks(store, run(store, pairs))
    resolved = models.resolve(CLIP)
    decode = decoder(tokenizers.input_spec(resolved))
    for row in (0, 7, 19):
        seed = int(forget.keys[row].removeprefix("row"))
        assert np.array_equal(forget.images(row, row + 1)[0], decode(encoded(seed)).pixels)
    assert np.array_equal(forget.tokens, tokenizers.tokenizer(resolved)(forget.captions))


def test_patterns_exclusions_and_limits(store, pairs):
    manifest = run(
        store,
        pairs,
        match=["dog number 3", "CAT"],
        not_match=["number 4", "number 5"],
        max_forget=5,
        retain_exclude=["number 2"],
        name="both",
    )
    forget, retain = blocks(store, manifest)
    assert forget.rows == 5
    assert all("cat" in caption or caption == "a dog number 3" for caption in forget.captions)
    assert "a cat number 4" not in forget.captions
    assert manifest.forget.refused == {"beyond --max-forget": 15, "excluded": 1}
    assert {"a bird number 2", "a bird number 5"}.isdisjoint(retain.captions)
    assert manifest.retain.refused == {"about the concept": 21, "excluded": 2}


def test_seeds_determine_the_sample(tmp_path, pairs):
    def prints(seed, name):
        manifest = run(Store(str(tmp_path / name)), pairs, seed=seed, max_forget=10)
        return manifest.forget.fingerprint, manifest.retain.fingerprint

    assert prints(1, "a") == prints(1, "b")
    assert all(one != two for one, two in zip(prints(1, "c"), prints(2, "d"), strict=True))


def test_a_smaller_draw_is_the_head_of_a_larger_one(store, pairs):
    _, large = blocks(store, run(store, pairs))
    _, small = blocks(store, run(store, pairs, retain_samples=12, name="small"))
    assert small.keys == large.keys[:12]


def test_concepts_share_retain_and_evaluation_rows(store, pairs, labelled, decoded):
    common = {
        "retain_exclude": ["dog", "cat"],
        "retain_samples": 15,
        "evals": {"animals": labelled},
    }
    dog = run(store, pairs, **common)
    assert len(decoded) == 20 + 20 + 12  # forget, all of the few birds as spare, evaluation
    decoded.clear()
    listener = Listener()
    cat = run(store, pairs, name="cat", concept="cat", **common)
    assert len(decoded) == 20
    assert cat.retain.path == dog.retain.path
    assert cat.retain.fingerprint == dog.retain.fingerprint
    assert cat.evals == dog.evals
    assert cat.forget.fingerprint != dog.forget.fingerprint
    assert sum("reusing" in line for line in listener.heard) == 2
    decoded.clear()
    assert run(store, pairs, **common) == dog
    assert not decoded


def test_a_changed_source_or_model_input_is_decoded_again(
    store, pairs, tmp_path, decoded, monkeypatch
):
    first = run(store, pairs)
    write_parquet(Path(pairs), [sample(i + 1000, f"a {KINDS[i % 3]}") for i in range(60)])
    second = run(store, pairs)
    assert second.forget.path != first.forget.path
    assert DataBlock.open(store, first.forget).rows == 20
    real = tokenizers.input_spec
    monkeypatch.setattr(tokenizers, "input_spec", lambda m: replace(real(m), height=32, width=32))
    third = run(store, pairs)
    assert third.forget.path != second.forget.path
    assert DataBlock.open(store, third.forget).images(0, 1).shape == (1, 32, 32, 3)


def test_only_chosen_rows_are_decoded(store, pairs, decoded):
    run(store, pairs, match=["dog number 3"], max_forget=1, retain_samples=2)
    assert len(decoded) == 1 + 2 + 16


def test_broken_and_duplicate_rows_are_replaced_and_counted(store, tmp_path):
    whole = [sample(i, f"a cat {i}") for i in range(40)]
    broken = [{"key": f"b{i}", "image": b"<html>", "caption": "a bird"} for i in range(30)]
    none = [{"key": f"n{i}", "image": None, "caption": "a bird"} for i in range(5)]
    twice = [sample(500, "a dog"), sample(500, "a dog"), sample(500, "another dog")]
    silent = [sample(900, None), sample(901, " ")]
    # A cat's picture that is also a dog's must not be retained.
    shared = [sample(600, "the dog"), sample(600, "a cat after all")]
    source = write_parquet(tmp_path / "a.parquet", whole + broken + none + twice + silent + shared)
    listener = Listener()
    manifest = run(store, source, retain_samples=40)
    forget, retain = blocks(store, manifest)
    assert sorted(forget.captions) == ["a dog", "another dog", "the dog"]
    assert manifest.forget.refused == {"duplicate": 1, "no caption": 2}
    assert sorted(retain.keys) == sorted(row["key"] for row in whole)
    refused = manifest.retain.refused
    assert refused["not an image"] <= 30
    assert refused["no image"] <= 5
    assert refused["same image as a forget row"] <= 1
    assert any("1 duplicate" in line and "2 no caption" in line for line in listener.heard)
    everything = run(store, source, retain_samples=500, name="all")
    assert everything.retain.rows == 40
    assert everything.retain.refused == {
        "about the concept": 4,
        "no caption": 2,
        "no image": 5,
        "not an image": 30,
        "same image as a forget row": 1,
    }
    assert any("460 fewer than requested" in line for line in listener.heard)
    # And the same again, from the blocks that stand.
    assert run(store, source, retain_samples=500, name="all") == everything


@pytest.mark.parametrize("window", [1, 7, 256])
@pytest.mark.parametrize("screening", [Screening(), Screening(near_duplicates=0)])
def test_reading_rows_in_windows_gives_the_same_set(tmp_path, monkeypatch, window, screening):
    def tar(first):
        members = []
        for i in range(first, first + 40):
            kind = "dog" if i % 4 == 0 else "cat"
            # Pairs met twice, broken images, a dog's image among the cats, and one of many pairs.
            seed = {1: 0, 3: 1}.get(i % 10, i % 60)
            image = b"no image" if i % 11 == 0 else encoded(seed)
            members += [(f"{i:04}.png", image), (f"{i:04}.txt", f"a {kind} {i % 60}".encode())]
        return write_tar(tmp_path / "shards" / f"{first}.tar", members)

    (tmp_path / "shards").mkdir()
    sources = [tar(first) for first in (0, 40, 80)]
    options = {"screening": screening, "retain_samples": 30}
    held, most = [], []
    put, clear = ImageBuffer.put, ImageBuffer.clear
    monkeypatch.setattr(ImageBuffer, "put", lambda s, image: (held.append(1), put(s, image))[1])
    monkeypatch.setattr(
        ImageBuffer, "clear", lambda s: (most.append(len(held)), held.clear(), clear(s))
    )
    monkeypatch.setattr(pairs_module, "WINDOW", window)
    read = run(Store(str(tmp_path / "windows")), sources, **options)
    assert max(most) <= window
    # A shard that streams tells no place of its images, so that all of them are held.
    monkeypatch.setattr(TarSource, "_streams", lambda source: True)
    whole = run(Store(str(tmp_path / "whole")), sources, **options)
    assert replace(read, request={}, command=()) == replace(whole, request={}, command=())
    refused = {"not an image", "duplicate", "same image as a forget row"}
    assert refused <= set(read.retain.refused) and read.retain.rows == 30
    assert (screening.near_duplicates == 0) == ("near-duplicate" in read.retain.refused)


def test_every_kind_of_bad_row_is_counted_or_used(store, tmp_path):
    whole = encoded(1, kind="JPEG")
    bomb = bytearray(encoded(2))
    bomb[16:24] = struct.pack(">II", 60_000, 60_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    mess = {
        "dog\nin two\nlines": whole,
        "dog with a \0 NUL": encoded(3),
        "dog \ud83d halved": encoded(4),
        "cmyk dog": encoded(5, mode="CMYK", kind="JPEG"),
        "dog in alpha": encoded(6, mode="RGBA"),
        "dog of zero bytes": b"",
        "dog that is HTML": b"<!doctype html><title>404</title>",
        "dog cut short": whole[: len(whole) // 2],
        "dog bomb": bytes(bomb),
        "\0": encoded(7),
        "a cat": encoded(8),
    }
    members = []
    for number, (caption, image) in enumerate(mess.items()):
        key = f"{number:05}" if number > 1 else "twice"
        fields = json.dumps({"caption": caption, "url": f"http://web/{number}"}).encode()
        members += [(f"{key}.jpg", image), (f"{key}.json", fields)]
    shard = write_tar(tmp_path / "web.tar", members)
    manifest = run(store, shard, retain_samples=1)
    forget = DataBlock.open(store, manifest.forget)
    assert set(forget.captions) == {
        "dog\nin two\nlines",
        "dog with a   NUL",
        "dog   halved",
        "cmyk dog",
        "dog in alpha",
    }
    assert manifest.forget.refused == {
        "no caption": 1,
        "empty file": 1,
        "not an image": 1,
        "broken image": 1,
        "decompression bomb": 1,
    }
    assert manifest.forget.noted == {
        "CMYK converted": 1,
        "alpha dropped": 1,
        "control characters in the caption": 2,
        "key of another row too": 2,
    }
    places = {origin.row: origin for origin in forget.origins}
    assert places[1] == Origin(shard, 1, "http://web/1")
    assert forget.captions[forget.origins.index(places[3])] == "cmyk dog"


def test_a_retain_set_that_avoids_an_image_is_not_taken_for_one_that_does_not(store, tmp_path):
    rows = [sample(i, f"a bird {i}") for i in range(10)]
    rows += [sample(600, "a dog"), sample(601, "a cat"), sample(600, "a shape")]
    source = write_parquet(tmp_path / "a.parquet", rows)
    common = {"retain_exclude": ["dog", "cat"], "retain_samples": 20}
    cat = run(store, source, name="cat", concept="cat", **common)
    dog = run(store, source, **common)
    assert (cat.retain.rows, dog.retain.rows) == (11, 10)
    assert run(store, source, name="cat", concept="cat", **common) == cat
    assert run(store, source, **common) == dog


def test_tar_folder_and_glob_sources_together(store, tmp_path):
    shard(tmp_path / "00000.tar", ["a dog in a tar", "a cat"])
    shard(tmp_path / "00001.tar", ["a bird", "dogs"], first=2)
    folder = write_folder(
        tmp_path / "folder",
        {"1.png": encoded(50), "1.txt": "dog!", "2.png": encoded(51), "2.txt": "fish"},
    )
    classes = write_folder(
        tmp_path / "classes", {"guide_dog/1.png": encoded(60), "horse/1.png": encoded(61)}
    )
    manifest = run(store, [f"{tmp_path}/*.tar", folder, classes])
    forget, retain = blocks(store, manifest)
    assert sorted(forget.captions) == ["a dog in a tar", "dog!", "guide dog"]
    assert sorted(retain.captions) == ["a bird", "a cat", "dogs", "fish", "horse"]


def test_retain_rows_may_come_from_another_source(store, pairs, tmp_path):
    other = write_parquet(
        tmp_path / "other.parquet", [sample(i + 200, f"a fish {i}") for i in range(9)]
    )
    manifest = run(store, pairs, retain_sources=[other], retain_samples=9)
    _, retain = blocks(store, manifest)
    assert all("fish" in caption for caption in retain.captions)
    assert manifest.retain.sources == (other,)
    assert manifest.retain.seen == 9


def test_an_error_for_an_empty_forget_set_counts_the_rows(store, pairs):
    with pytest.raises(InputError) as caught:
        run(store, pairs, match=["doggy"])
    assert "nothing matches 'doggy' among 60 captions in 60 rows" in caught.value.message
    assert "'a dog number 0'" in caught.value.hint
    assert not store.exists("sets/dog.json")


def test_a_forget_set_of_broken_images_counts_as_empty(store, tmp_path):
    rows = [{"key": "x", "image": b"junk", "caption": "a dog"}, sample(1, "a cat")]
    source = write_parquet(tmp_path / "a.parquet", rows)
    with pytest.raises(InputError, match="the forget set has no usable rows: 1 not an image"):
        run(store, source)


def test_nothing_to_retain_is_an_error(store, tmp_path):
    source = write_parquet(tmp_path / "a.parquet", [sample(1, "a dog")])
    with pytest.raises(InputError, match="retain set") as caught:
        run(store, source)
    assert "--retain-source" in caught.value.hint


def test_evaluation_rows_without_a_class_are_dropped(store, pairs, tmp_path):
    rows = [sample(1, None, label="dog"), sample(2, None, label="Cat")]
    rows += [sample(3, None, label="horse"), sample(4, None, label=None)]
    rows += [{"key": "x", "image": b"junk", "caption": None, "label": "dog"}]
    source = write_parquet(tmp_path / "e.parquet", rows)
    classes = tmp_path / "classes.txt"
    classes.write_text("cat\ndog\n")
    templates = tmp_path / "templates.txt"
    templates.write_text("see {}\n")
    manifest = run(
        store,
        pairs,
        evals={"pets": source},
        classes={"pets": str(classes)},
        templates={"pets": str(templates)},
    )
    pets = DataBlock.open(store, manifest.evals["pets"])
    assert pets.labels.tolist() == [1, 0]
    assert pets.class_names == ("cat", "dog")
    assert pets.templates == ("see {}",)
    assert manifest.evals["pets"].refused == {
        "no label": 1,
        "not an image": 1,
        "unknown label": 1,
    }
    assert manifest.evals["pets"].seen == 5


def test_other_templates_make_another_evaluation_set(store, pairs, labelled):
    one = run(store, pairs, evals={"a": labelled}, templates={"a": "celeba"})
    two = run(store, pairs, evals={"a": labelled}, templates={"a": "imagenet"})
    assert one.evals["a"].fingerprint != two.evals["a"].fingerprint


def test_the_forget_evaluation_is_the_first_set_with_the_concept(store, pairs, labelled, tmp_path):
    folder = write_folder(tmp_path / "f", {"horse/1.png": encoded(1), "Dog/1.png": encoded(2)})
    evals = {"z": f"{labelled}?label=cat", "y": folder, "a": labelled}
    manifest = run(store, pairs, evals=evals)
    assert list(manifest.evals) == ["z", "y", "a"]
    assert manifest.forget_eval == "y"
    assert run(store, pairs, evals=evals, forget_eval="a").forget_eval == "a"
    assert run(store, pairs).forget_eval is None
    listener = Listener()
    none = run(store, pairs, evals={"z": evals["z"]})
    assert none.forget_eval is None
    assert any("no evaluation set has a class 'dog'" in line for line in listener.heard)


def test_a_forget_evaluation_without_the_concept_is_refused(store, pairs, labelled):
    evals = {"animals": labelled}
    with pytest.raises(InputError, match=r"no class 'brid'; near: bird"):
        run(store, pairs, concept="brid", match=["bird"], evals=evals, forget_eval="animals")
    with pytest.raises(InputError, match="no rows of the class 'goldfish'"):
        run(
            store,
            pairs,
            concept="goldfish",
            match=["dog"],
            evals={"i": f"{_imagenet(labelled)}"},
            classes={"i": "imagenet"},
            forget_eval="i",
        )


def test_numbers_are_not_class_names(store, pairs, tmp_path):
    rows = [sample(200 + i, None, label=i % 3) for i in range(6)]
    numbered = write_parquet(tmp_path / "numbered.parquet", rows)
    with pytest.raises(InputError, match=r"evaluation set n are numbers \(0, 1, 2\)") as caught:
        run(store, pairs, evals={"n": numbered})
    assert "--classes n=FILE" in caught.value.hint
    names = {"n": write_folder(tmp_path, {"names.txt": "cat\ndog\nbird\n"}) + "/names.txt"}
    for classes, expected in ((names, ("cat", "dog", "bird")), ({"n": "labels"}, ("0", "1", "2"))):
        ref = run(store, pairs, evals={"n": numbered}, classes=classes).evals["n"]
        assert DataBlock.open(store, ref).class_names == expected


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        # All names are in the list: it may have another order.
        ("dog\nwolf\ncat\n", {"dog": 3, "cat": 3}),
        # Few are: it has other names for the same numbers.
        ("dog, tame\ncat\nsmall cat\n", {"dog, tame": 3, "cat": 3}),
    ],
)
def test_a_list_of_classes_takes_names_or_numbers(store, pairs, tmp_path, listed, expected):
    """Hugging Face's files have both, and their names of ImageNet are not open_clip's."""
    rows = [{"image": encoded(300 + i), "label": i % 2} for i in range(6)]
    features = {"label": {"names": ["dog", "cat, small"], "_type": "ClassLabel"}}
    if "wolf" in listed:
        features["label"]["names"] = ["dog", "cat"]
    said = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.Table.from_pylist(rows).replace_schema_metadata(said)
    pq.write_table(table, tmp_path / "hf.parquet")
    write_folder(tmp_path, {"names.txt": listed})
    manifest = run(
        store,
        pairs,
        evals={"n": f"{tmp_path}/hf.parquet"},
        classes={"n": f"{tmp_path}/names.txt"},
    )
    block = DataBlock.open(store, manifest.evals["n"])
    assert Counter(block.class_names[label] for label in block.labels) == expected


def _imagenet(beside):
    rows = [sample(i, None, label=i * 10) for i in range(3)]
    return write_parquet(Path(beside).with_name("imagenet.parquet"), rows)


def test_named_classes_and_templates(store, pairs, labelled):
    manifest = run(
        store,
        pairs,
        evals={"i": _imagenet(labelled)},
        classes={"i": "imagenet"},
        templates={"i": "imagenet"},
    )
    block = DataBlock.open(store, manifest.evals["i"])
    assert len(block.class_names) == 1000
    assert len(block.templates) == 80
    assert block.labels.tolist() == [0, 10, 20]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "../x"}, "cannot name a set"),
        ({"concept": " "}, "blank"),
        ({"retain_samples": 0}, "--retain-samples is 0"),
        ({"max_forget": 0}, "--max-forget is 0"),
        ({"match": ["("], "regex": True}, "not a regular expression"),
        ({"classes": {"x": "imagenet"}}, "--classes names an evaluation set x"),
        ({"templates": {"x": "imagenet"}}, "--templates names an"),
        ({"forget_eval": "x"}, "--forget-eval names an"),
    ],
)
def test_contradictions_are_usage_errors(store, pairs, options, message):
    with pytest.raises(UsageError, match=message):
        run(store, pairs, **options)
    with pytest.raises(UsageError, match="no source"):
        run(store, [])


def test_missing_files_are_errors_before_anything_is_decoded(store, pairs, labelled, decoded):
    cases = [
        ({"retain_sources": ["gone.parquet"]}, "gone.parquet"),
        ({"evals": {"a": "gone*.tar"}}, r"gone\*"),
        ({"evals": {"a": labelled}, "classes": {"a": "gone.txt"}}, r"no gone\.txt"),
        ({"evals": {"a": labelled}, "templates": {"a": "gone.txt"}}, r"no gone\.txt"),
    ]
    for options, message in cases:
        with pytest.raises(MissingError, match=message):
            run(store, pairs, **options)
    with pytest.raises(InputError, match="can be used for evaluation"):
        run(store, pairs, evals={"a": f"{labelled}?kind=nothing"})
    with pytest.raises(InputError, match="no label column"):
        run(store, pairs, evals={"a": pairs})
    with pytest.raises(InputError, match="no column alt"):
        run(store, pairs, caption_column="alt")
    assert not decoded
    assert store.names("sets") == []


def test_weights_that_grad_would_refuse_are_refused_before_anything_is_decoded(
    store, pairs, decoded, tmp_path
):
    folder = tiny_clip.write_folder(tmp_path / "other")
    weights = load_file(folder / "open_clip_model.safetensors")
    del weights["visual.proj"]
    save_file(weights, folder / "open_clip_model.safetensors")
    with pytest.raises(InputError, match="cannot load"):
        build_sets(store, replace(request(pairs), model=ModelSpec(str(folder))))
    torch.save({}, folder / "old.pt", _use_new_zipfile_serialization=False)
    (folder / "arch.json").write_text(json.dumps(tiny_clip.CONFIG))
    old = ModelSpec(str(folder / "arch.json"), str(folder / "old.pt"))
    with pytest.raises(InputError, match=r"archive of torch 1\.6 or later"):
        build_sets(store, replace(request(pairs), model=old))
    assert not decoded
    assert store.names("sets") == []


@pytest.mark.parametrize("failing_image", [0, 25, 55])
def test_a_killed_build_leaves_no_manifest_and_can_be_repeated(
    store, pairs, labelled, monkeypatch, failing_image
):
    class Killed(BaseException):
        pass

    count = []

    def failing(spec):
        decode = decoder(spec)

        def run_out(data):
            count.append(1)
            if len(count) > failing_image:
                raise Killed
            return decode(data)

        return run_out

    evals = {"animals": labelled}
    with monkeypatch.context() as patch:
        patch.setattr(assembly, "decoder", failing)
        with pytest.raises(Killed):
            run(store, pairs, evals=evals)
    assert store.names("sets") == []
    assert store.unfinished("data") == []
    assert run(store, pairs, evals=evals).forget.rows == 20


def test_a_damaged_block_is_built_again(store, pairs):
    first = run(store, pairs)
    chunk = next(Path(store.where(first.retain.path), "images").rglob("0/0/0/0"))
    chunk.unlink()
    listener = Listener()
    assert run(store, pairs) == first
    assert any("damaged" in line and "built again" in line for line in listener.heard)
    assert DataBlock.open(store, first.retain).images(0, 30).any()


def test_remote_stores(pairs, labelled, store):
    remote = Store("memory://build-test/store")
    try:
        manifest = run(remote, pairs, evals={"animals": labelled})
        local = run(store, pairs, evals={"animals": labelled})
        assert manifest == local
        assert DataBlock.open(remote, manifest.retain).rows == 30
    finally:
        fsspec.filesystem("memory").rm("/build-test", recursive=True)


def test_truncated_shards_are_counted_and_the_rest_is_used(store, tmp_path):
    whole = Path(shard(tmp_path / "0.tar", [f"a dog {i}" for i in range(10)]))
    whole.write_bytes(whole.read_bytes()[:9000])
    shard(tmp_path / "1.tar", [f"a cat {i}" for i in range(10)], first=10)
    manifest = run(store, f"{tmp_path}/*.tar")
    assert 0 < manifest.forget.rows < 10
    assert manifest.forget.refused["truncated shard"] == 1
    assert manifest.retain.rows == 10


def test_block_attributes_have_the_recipe(store, pairs, labelled):
    manifest = run(store, pairs, evals={"animals": labelled})
    for ref, role in ((manifest.forget, "forget"), (manifest.evals["animals"], "eval")):
        attributes = json.loads(Path(store.where(ref.path), "zarr.json").read_text())["attributes"]
        assert attributes["role"] == role
        assert attributes["complete"] is True
        assert attributes["fingerprint"] == ref.fingerprint
        assert attributes["sources"] == list(ref.sources)
        assert attributes["input"]["height"] == manifest.input.height


def test_a_preview_of_many_sets_finds_the_errors_of_building_each(store, pairs, labelled, tmp_path):
    """Rows of several sources, filters, patterns and evaluation sets, some of which lack."""
    listed = "file,caption\na.png,a dog\nb.png,a cat\nno.png,a lost dog\n"
    files = {"a.png": encoded(1), "b.png": encoded(2), "table.csv": listed}
    table = write_folder(tmp_path / "images", files) + "/table.csv"
    odd = [sample(i, text) for i, text in enumerate(["a dog", "", "a\x00 cat", "a dog on a bed"])]
    odd_source = write_parquet(tmp_path / "odd.parquet", odd)
    evals = {"animals": labelled}
    shards = [shard(tmp_path / f"{n}.tar", [f"a {n} dog", f"a {n} cat"]) for n in range(2)]
    dogs = f"{pairs}?caption=a dog number 3"
    requests = [
        request(pairs, name="dog", evals=evals),
        request(pairs, name="cat", concept="cat", not_match=["number 1"], evals=evals),
        request(pairs, name="fish", concept="fish", evals=evals),
        request(pairs, name="no-1", concept="dog", not_match=["number"], evals=evals),
        request(pairs, name="no-2", concept="dog", retain_exclude=["cat", "bird"]),
        request(dogs, name="own", retain_sources=[pairs], evals=evals),
        request(dogs, name="all", evals=evals),
        request(f"{pairs}?caption=a dog number 4", name="none", retain_sources=[pairs]),
        request(f"{pairs}?kind=x", name="column", retain_sources=[pairs]),
        request(table, name="table", evals={"animals": f"{labelled}?kind=none"}),
        request(f"{table}?caption=a lost dog", name="lost", retain_sources=[pairs]),
        request(f"{table}?caption=a dog", name="found", retain_sources=[pairs]),
        request(odd_source, name="odd"),
        request(odd_source, name="odd-fish", concept="fish"),
        request([*shards, pairs], name="tars"),
        request([pairs, *shards], name="tars-fish", concept="fish"),
        request(f"{tmp_path}/nowhere", name="nowhere"),
        request(pairs, name="blank", concept=" "),
        request(pairs, name="eval", evals={"animals": f"{labelled}?label=fish"}),
        request(pairs, name="class", evals=evals, forget_eval="animals", concept="number"),
    ]
    told = {name: error.message for name, error in Preview(store, requests).errors().items()}
    alone, ends = {}, {}
    for each in requests:
        alone |= {n: e.message for n, e in Preview(store, [each]).errors().items()}
        try:
            build_sets(store, each)
        except SlsguError as error:
            ends[each.name] = error.message
    assert told == alone == ends
    names = {each.name for each in requests}
    assert names - told.keys() == {"dog", "cat", "own", "found", "odd", "tars"}


def test_a_preview_reads_a_file_once_for_all_sets(store, pairs, labelled, monkeypatch):
    read = Counter()
    records = ParquetSource.records

    def counted(self, columns, trouble):
        read[self.path] += 1
        return records(self, columns, trouble)

    monkeypatch.setattr(ParquetSource, "records", counted)
    requests = [
        request(
            f"{pairs}?key=row0&key=row1&key=row2",
            name=f"{n}",
            retain_sources=[pairs],
            evals={"a": labelled},
            concept=KINDS[n % 3],
        )
        for n in range(12)
    ]
    assert Preview(store, requests).errors() == {}
    # Once for the rows to forget, once for those to retain, and once for labels.
    assert read == {pairs: 2, labelled: 1}
