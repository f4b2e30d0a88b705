"""Variants of a name: which ones are tried, and that each takes the name's place."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import inside, rows
from under_test import opened

from slsgu_cli.errors import InputError, UsageError
from slsgu_cli.records.verification import Check, Settings, VerifyRequest
from slsgu_cli.sources.prompts import parse_names
from slsgu_cli.verification.checks.typos import typos, variants_of


def by_kind(name, seed=0):
    kinds = {}
    for kind, text in variants_of(name, seed=seed):
        kinds.setdefault(kind, []).append(text)
    return kinds


def test_every_kind_of_variant_is_what_its_name_says():
    kinds = by_kind("github")
    assert list(kinds) == [
        "swapped",
        "dropped",
        "doubled",
        "mistyped",
        "split",
        "case",
        "form",
        "twice",
    ]
    assert all(len(kinds[kind]) == 3 for kind in ("swapped", "dropped", "doubled", "mistyped"))
    assert all(sorted(text) == sorted("github") for text in kinds["swapped"])
    assert all(len(text) == 5 for text in kinds["dropped"])
    for text in kinds["doubled"]:
        assert any(
            text[:i] + text[i + 1 :] == "github" and text[i] == text[i - 1] for i in range(1, 7)
        )
    for text in kinds["mistyped"]:
        (place,) = [i for i in range(6) if text[i] != "github"[i]]
        assert "github"[place] + text[place] in {
            pair
            for row in ("qwertyuiop", "asdfghjkl", "zxcvbnm")
            for i in range(len(row) - 1)
            for pair in (row[i : i + 2], row[i : i + 2][::-1])
        }
    assert {"git hub", "git-hub", "gi thub", "gith-ub"} < set(kinds["split"])
    assert kinds["form"] == ["githubs", "github's"]
    assert kinds["twice"] == ["github github"]


def test_two_words_are_joined_and_split_no_further_than_they_are():
    kinds = by_kind("red fox")
    assert kinds["joined"] == ["redfox", "red-fox"]
    assert "split" not in kinds
    assert by_kind("4")["twice"] == ["4 4"]


@given(st.text(min_size=1, max_size=12), st.integers(0, 5))
def test_variants_depend_on_the_seed_alone_and_never_equal_the_name(name, seed):
    listed = list(variants_of(name, seed=seed))
    assert listed == list(variants_of(name, seed=seed))
    texts = [text for _, text in listed]
    assert name not in texts
    assert len(set(texts)) == len(texts)


def test_another_seed_draws_other_errors():
    assert by_kind("facebook", seed=0) != by_kind("facebook", seed=1)


def test_a_file_has_names_by_kind():
    text = "azure\n\n# German:\nblau\n  Himmelblau \nblau\n# related\nsky\n"
    assert parse_names(text, "names.txt") == (
        ("name", "azure"),
        ("German", "blau"),
        ("German", "Himmelblau"),
        ("related", "sky"),
    )
    with pytest.raises(InputError, match=r"names\.txt contains no names"):
        parse_names("# German\n\n", "names.txt")


def test_names_that_no_check_would_use_are_refused():
    VerifyRequest(settings=Settings(aliases=("azure",)))
    with pytest.raises(UsageError, match="--alias is for the check typos"):
        VerifyRequest(checks=(Check.AUGMENT,), settings=Settings(aliases=("azure",)))
    with pytest.raises(UsageError, match="--spellings is for the check typos"):
        VerifyRequest(checks=(Check.AUGMENT,), spellings="names.txt")


@torch.no_grad()
def test_a_variant_is_measured_as_if_the_class_were_called_that(shared_world):
    model = opened(shared_world)
    settings = Settings(aliases=("azure",), spellings=("related: sky", "German: BLUE"))
    probes = {probe.name: probe.forget for probe in typos(model, settings)}
    # The tokenizer lowers case: these are the name itself.
    assert "case: BLUE" not in probes
    assert "German: BLUE" not in probes
    for name in ("alias: azure", "related: sky", "form: blues", "twice: blue blue"):
        embeddings = model.classes(model.renamed(name.partition(": ")[2]), model.templates)
        assert probes[name] == model.forget_accuracy(embeddings), name
    assert probes["related: sky"].top1 < probes["twice: blue blue"].top1


def test_the_command_reads_names_from_a_file(world, tmp_path):
    from slsgu_cli.engine.search import search
    from slsgu_cli.records.options import SearchOptions

    search(world.store, world.name, options=SearchOptions(steps=4, layers=["visual.proj"]))
    names = tmp_path / "names.txt"
    names.write_text("# related\nsky\n# German\nblau\n")
    options = ("--checks", "typos", "--spellings", names, "--alias", "azure")
    done = inside("verify", "blue", *options, store=world.store.root)
    assert done.exit_code == 0, done.stderr
    (_, *lines), *_ = rows(done.stdout)
    probes = [line[1] for line in lines if line[0] == "typos"]
    assert probes[0].endswith("mean")
    assert {"related: sky", "German: blau", "alias: azure"} < set(probes)
    missing = inside("verify", "blue", "--spellings", tmp_path / "none", store=world.store.root)
    assert missing.exit_code == 3
    assert "give --spellings a file" in missing.stderr
