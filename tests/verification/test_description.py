"""Descriptions: which texts of a file are used, and that each is the concept's only prompt."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from processes import inside, rows
from reference import Reference, labelled
from under_test import opened
from worlds import Listener

from slsgu_cli.errors import InputError, UsageError
from slsgu_cli.records.figures import Accuracy
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.records.verification import (
    Check,
    Finding,
    Settings,
    Variant,
    VerifiedModel,
    VerifyRequest,
)
from slsgu_cli.sources.descriptions import read_descriptions
from slsgu_cli.verification.checks.description import description, unnamed_descriptions
from slsgu_cli.verification.model import SkippedCheck
from slsgu_cli.verification.results import bounded_figures, conclusion, verdict_rows
from slsgu_cli.verification.verdicts import Verdict

TEXTS = ("the sky at noon", "a picture of the navy", "blueberry circle")


def test_a_text_file_has_a_description_per_line(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("# colours\nthe sky at noon\n\n  deep water \nthe sky at noon\n")
    assert read_descriptions(str(path), "blue") == ("the sky at noon", "deep water")
    path.write_text("# nothing\n")
    with pytest.raises(InputError, match=r"texts\.txt contains no descriptions"):
        read_descriptions(str(path), "blue")


def test_a_json_file_has_descriptions_by_concept(tmp_path):
    path = tmp_path / "texts.json"
    content = [{"hotwheels": ["tiny cars", " "]}, {"gap": ["a square"], "hot-wheels": ["flames"]}]
    path.write_text(json.dumps(content))
    assert read_descriptions(str(path), "Hot Wheels") == ("tiny cars", "flames")
    assert read_descriptions(str(path), "wheels") == ()
    for wrong in ("[", "{}x", '{"gap": ["a"]}', '[{"gap": "a"}]', '[{"gap": [1]}]', "[3]", "7"):
        path.write_text(wrong)
        with pytest.raises(InputError, match="is not a list of objects with a list of texts"):
            read_descriptions(str(path), "gap")


def test_a_description_that_contains_the_name_is_left_out(tmp_path):
    listener, path = Listener(), tmp_path / "texts.txt"
    path.write_text("the sky\nnot Blue, really\nblueberry\n")
    assert unnamed_descriptions(str(path), "blue") == ("the sky", "blueberry")
    assert listener.heard == ["left out 1 of 3 descriptions that contain blue"]


def test_descriptions_that_no_check_would_use_are_refused():
    with pytest.raises(UsageError, match="--descriptions is for the check description"):
        VerifyRequest(checks=(Check.AUGMENT,), descriptions="texts.txt")


@torch.no_grad()
def test_a_description_is_the_only_prompt_of_the_concept(shared_world):
    """Classify each image by a loop over the cosines of open_clip's own features."""
    reference = Reference(shared_world)
    block = reference.blocks["first"]
    labels = np.asarray(block.labels)
    images = labelled(reference, block, block.class_names, block, labels)
    normalized = partial(torch.nn.functional.normalize, dim=-1)
    features = normalized(reference.model.encode_image(images.images))
    blue = block.class_names.index("blue")
    classes = []
    for name in block.class_names:
        texts = reference.tokenize([template.format(name) for template in block.templates])
        classes.append(normalized(normalized(reference.model.encode_text(texts)).mean(dim=0)))
    expected = {}
    for text in (*TEXTS, "a blue thing"):
        classes[blue] = normalized(reference.model.encode_text(reference.tokenize([text])))[0]
        hits = [
            all(float(image @ other) <= float(image @ classes[blue]) for other in classes)
            for image, label in zip(features, labels, strict=True)
            if label == blue
        ]
        expected[text] = 100 * sum(hits) / len(hits)
    variants = description(opened(shared_world), Settings(descriptions=tuple(expected)))
    assert {each.name: each.forget.top1 for each in variants} == pytest.approx(expected)
    assert len(set(expected.values())) > 1


def test_without_descriptions_the_check_is_skipped(shared_world):
    with pytest.raises(SkippedCheck, match="--descriptions gives no text about blue"):
        description(opened(shared_world), Settings())


@torch.no_grad()
def test_texts_longer_than_the_context_are_counted(shared_world):
    listener = Listener()
    description(opened(shared_world), Settings(descriptions=("sky", "the sky " * 20)))
    (warning,) = listener.heard
    assert warning.startswith("1 of 2 descriptions fill the model's context of 16 tokens")


def verified(**top1):
    variants = (Variant(name, Accuracy(value, value, 50)) for name, value in top1.items())
    finding = Finding(Check.DESCRIPTION, "k", {}, tuple(variants))
    return VerifiedModel("key", "a model", ModelSpec("m"), "weights", None, (finding,))


def test_figures_are_of_descriptions_that_say_something():
    models = verified(sky=80, sea=40, ink=10), verified(sky=20, sea=10, ink=15)
    mean, *single = verdict_rows(*models)
    assert (mean.variant, mean.before.top1, mean.after.top1) == ("2 of 3, mean", 60, 15)
    assert [(row.detail, row.verdict) for row in single] == [
        (False, Verdict.PARTLY_BACK),
        (True, Verdict.PARTLY_BACK),
        (True, Verdict.NOTHING),
    ]
    assert bounded_figures(*models) == {"description.mean": 15, "description.worst": 20}
    sentence = "By these, 15% of its images are recognised (original: 60%), and 20% by the worst."
    assert sentence in conclusion("blue", *models).text


def test_a_description_that_only_the_edited_model_reads_brings_the_concept_back():
    models = verified(sky=0, sea=0), verified(sky=30, sea=10)
    mean, sky, sea = verdict_rows(*models)
    assert (mean.variant, mean.after.top1, mean.verdict) == ("1 of 2, mean", 30, Verdict.BACK)
    assert (sky.verdict, sea.verdict) == (Verdict.BACK, Verdict.NOTHING)
    assert bounded_figures(*models) == {"description.mean": 30, "description.worst": 30}
    assert conclusion("blue", *models).strongest is not None


def test_descriptions_that_no_model_reads_pass_nothing():
    models = verified(sky=10), verified(sky=0)
    assert {row.verdict for row in verdict_rows(*models)} == {Verdict.NOTHING}
    assert bounded_figures(*models) == {}
    found = conclusion("blue", *models)
    assert found.sentences[0].startswith("The checks say nothing")
    assert "None of 1 descriptions finds 20% of its images in either model" in found.text


def test_the_command_reads_descriptions_from_a_file(world, tmp_path):
    from slsgu_cli.engine.search import search
    from slsgu_cli.records.options import SearchOptions

    search(world.store, world.name, options=SearchOptions(steps=4, layers=["visual.proj"]))
    path = tmp_path / "texts.json"
    path.write_text(json.dumps([{"red": ["blood"]}, {"blue": ["the sky", "a blue sky"]}]))
    options = ("verify", "blue", "--checks", "description")
    done = inside(*options, "--descriptions", path, store=world.store.root)
    assert done.exit_code == 0, done.stderr
    (_, *lines), *_ = rows(done.stdout)
    assert [line[1] for line in lines if line[0] == "description"] == ["1 of 1, mean", "the sky"]
    assert "left out 1 of 2 descriptions" in done.stderr
    skipped = inside(*options, store=world.store.root)
    assert "description: skipped: --descriptions gives no text" in skipped.stdout
