"""What a verification finds on a tiny model; no edit is ever shown with another's figures.

`verified` runs every check once, of the original and of its edit, for all tests here.
"""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tiny_clip
import torch
from matplotlib.figure import Figure
from PIL import Image
from processes import inside
from reference import Reference

from slsgu_cli.checkpoints.edits import load_edit, write_edit
from slsgu_cli.cli import verify as cli_verify
from slsgu_cli.cli.console import Console
from slsgu_cli.engine.evaluate import evaluate
from slsgu_cli.engine.search import search
from slsgu_cli.errors import MissingError, StaleError, UsageError
from slsgu_cli.records.option_fields import choices
from slsgu_cli.records.options import SearchOptions
from slsgu_cli.records.verification import (
    CHECKS,
    NEW,
    OWN,
    Check,
    Settings,
    Verification,
    VerifyRequest,
)
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.catalog import Standing, entries
from slsgu_cli.store.store import Store
from slsgu_cli.verification import verify as verify_module
from slsgu_cli.verification.checks import augment
from slsgu_cli.verification.checks.paraphrase import TEMPLATES, TOGETHER, unused_templates
from slsgu_cli.verification.checks.probe import CLASSIFIERS
from slsgu_cli.verification.verify import verify

SETTINGS = Settings(
    templates=("this is {}", "a photo of the {}!"),
    steps=3,
    shots=4,
    learning_rate=1e-3,
    batch_size=8,
    rows=30,
    descriptions=("the sky at noon", "a square in the colour of the sea"),
    attack_tokens=2,
    attack_steps=2,
    attack_starts=1,
    population=8,
    generations=2,
    inversion_steps=3,
)
LAYER = "visual.proj"


def find(world, layer=LAYER):
    options = SearchOptions(steps=6, layers=[layer])
    return search(world.store, world.name, options=options)


def run(world, *, checks=(), edits=(), model=None, **changes):
    settings = replace(SETTINGS, **changes)
    request = VerifyRequest(
        checks=checks, settings=settings, model=model, edits=edits, device="cpu"
    )
    return verify(world.store, world.name, request)


def finding(result, check, place=1):
    return result.models[place].finding(check)


def variants(result, check, place=1):
    return {variant.name: variant for variant in finding(result, check, place).variants}


@pytest.fixture(scope="module")
def edited(shared_world, tmp_path_factory):
    """A world with an edit, to be copied or read."""
    folder = tmp_path_factory.mktemp("verified") / "store"
    shutil.copytree(shared_world.store.root, folder)
    world = replace(shared_world, store=Store(str(folder)))
    find(world)
    return world


@pytest.fixture(scope="module")
def verified(edited, undrawn):
    """The world's edit after every check, with its plot."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", undrawn)
        return run(edited, checks=list(Check))


@pytest.fixture
def world(edited, verified, tmp_path):
    """A copy of the world that was verified."""
    folder = tmp_path / "store"
    shutil.copytree(edited.store.root, folder)
    return replace(edited, store=Store(str(folder)))


def test_the_baseline_is_what_eval_measures(edited, verified):
    found = evaluate(edited.store, ["blue"], model=None, device="cpu")
    for place, model in enumerate(found.models):
        (variant,) = finding(verified, Check.BASELINE, place).variants
        assert {"blue": variant.forget} == model.forget
    assert verified.models[0].label == "original"
    # 30 of the 56 other colours, and all shapes there are of 40 in it.
    assert {name: a.rows for name, a in variant.utility.items()} == {"first": 30, "second": 30}


def test_all_rows_are_measured_where_there_are_no_more(world):
    found = evaluate(world.store, ["blue"], model=None, device="cpu")
    result = run(world, rows=1000)
    for place, model in enumerate(found.models):
        assert finding(result, Check.BASELINE, place).variants[0].utility == model.utility


def test_other_templates_give_the_figures_of_a_set_with_them(edited, verified):
    reference = Reference(edited)
    block = reference.blocks["first"]
    expected = {}
    for names in (SETTINGS.templates, *((t,) for t in SETTINGS.templates)):
        block.attributes["templates"] = list(names)
        expected[names] = reference.figures().forget
    found = variants(verified, Check.PARAPHRASE, place=0)
    together = found[TOGETHER].forget
    assert (together.top1, together.top5) == pytest.approx(expected[SETTINGS.templates])
    for template in SETTINGS.templates:
        alone = found[f"template: {template}"].forget
        assert (alone.top1, alone.top5) == pytest.approx(expected[(template,)])


def test_unused_templates_are_those_the_set_does_not_have(edited, tmp_path):
    assert unused_templates(edited.store, edited.manifest, None) == TEMPLATES
    own = tmp_path / "own.txt"
    own.write_text("a photo of the {}.\nsomething {}\n{}\nsomething {}\n")
    assert unused_templates(edited.store, edited.manifest, str(own)) == ("something {}",)
    own.write_text("a photo of the {}.\n")
    with pytest.raises(UsageError, match="every template"):
        unused_templates(edited.store, edited.manifest, str(own))


def test_every_kind_of_check_found_something(verified):
    for subject in verified.models:
        assert [found.check for found in subject.findings] == list(Check)
    names = ["flip", "crop", "colour", "rotation", "blur", "jpeg"]
    assert list(variants(verified, Check.AUGMENT)) == names
    coarse = variants(verified, Check.QUANTISE)
    assert list(coarse) == [
        "int8",
        "fp8",
        "int4, groups of 64",
        "int4 asymmetric, groups of 64",
        "int4, groups of 128",
        "int4 asymmetric, groups of 128",
        "nf4",
        "fp16",
        "bf16",
    ]
    measured = [name for name, variant in coarse.items() if variant.utility is not None]
    assert measured == ["int8", "int4, groups of 128", "nf4"]
    assert len(finding(verified, Check.MEMBERSHIP).membership) == 4
    for check in (Check.PREFIX, Check.RING_A_BELL, Check.INVERSION):
        assert finding(verified, check).attempts
        assert not finding(verified, check).skipped


def test_a_class_is_measured_on_all_its_images(edited, verified):
    found = evaluate(edited.store, ["blue"], model=None, device="cpu")
    for place, model in enumerate(found.models):
        classes = finding(verified, Check.NEAREST, place).classes
        assert {each.name for each in classes["first"]} == set(tiny_clip.COLOURS) - {"blue"}
        for name, known in classes.items():
            rows = sum(each.rows for each in known)
            assert rows == model.utility[name].rows
            right = sum(each.top1 * each.rows for each in known)
            assert right / rows == pytest.approx(model.utility[name].top1)
            assert [e.cosine for e in known] == sorted((e.cosine for e in known), reverse=True)
    near = finding(verified, Check.NEIGHBOURS, 0).neighbourhood.nearest
    classes = finding(verified, Check.NEAREST, 0).classes["first"]
    assert [each.name for each in classes[: len(near)]] == [each.name for each in near]


def test_an_edit_of_the_text_tower_changes_no_bit_of_image_features(world, tmp_path):
    find(world, "transformer.resblocks.1.ln_1.weight")
    result = run(world, checks=[Check.PROBE, Check.RETRIEVAL])
    original, text = (finding(result, Check.RETRIEVAL, place).retrieval for place in range(2))
    # 104 images in both sets: 8 show the concept.
    assert [(side.rows, side.identical) for side in text.shifts] == [(8, 8), (96, 96)]
    by_image, by_name, *old = text.queries
    assert by_image == original.queries[0]
    assert by_name.precision != original.queries[1].precision
    assert [found.precision for found in old] == [by_image.precision, by_name.precision]
    assert finding(result, Check.PROBE).classifiers == finding(result, Check.PROBE, 0).classifiers


def test_an_edit_of_the_image_tower_changes_an_index_that_the_name_still_searches(verified):
    original, vision = (finding(verified, Check.RETRIEVAL, p).retrieval for p in range(2))
    assert [side.identical for side in original.shifts] == [8, 96]
    assert [side.identical for side in vision.shifts] == [0, 0]
    assert vision.shifts[0].mean > vision.shifts[1].mean > 0
    assert vision.queries[1].precision != original.queries[1].precision
    # The name's embedding is as it was, and so is the old index.
    assert vision.queries[3].precision == original.queries[1].precision
    assert [(q.queries, q.gallery) for q in vision.queries] == [(8, 104), (3, 104)] * 2


def test_the_originals_features_are_the_same_whether_it_was_verified_in_this_run(world):
    both = run(world, checks=[Check.RETRIEVAL])
    assert both.reused == len(both.models) * 2
    record = world.store.read_record(Artifact.VERIFICATION.path("blue"), Verification)
    kept = tuple(replace(model, findings=()) if model.edit else model for model in record.subjects)
    world.store.write_record(Artifact.VERIFICATION.path("blue"), replace(record, subjects=kept))
    again = run(world, checks=[Check.RETRIEVAL])
    assert again.reused == 2
    assert finding(again, Check.RETRIEVAL) == finding(both, Check.RETRIEVAL)


def test_classifiers_look_for_the_concept_and_for_other_classes_as_a_control(verified):
    scores = finding(verified, Check.PROBE, place=0).classifiers
    assert [(t.classifier, t.subject) for t in scores] == [
        (classifier, subject)
        for classifier in ("linear probe", "nearest neighbours")
        for subject in ("the concept", "the concept, from as few", "other classes")
    ]
    concept, few, others = scores[:3]
    assert (concept.rows, concept.others, others.rows) == (8, 96, 5 * 4)
    assert few.images == others.images == 4 < concept.images
    # The second set has shapes in blue, so few of the concept's images stand out from all.
    assert min(concept.accuracy, others.accuracy) > 75


def test_classifiers_train_and_test_on_other_images_if_no_class_is_the_concepts(world):
    world.build(evals={"second": world.sources["second"]}, templates={})
    world.grade()
    find(world)
    result = run(world, checks=[Check.PROBE, Check.RETRIEVAL, Check.NEAREST])
    concept = finding(result, Check.PROBE).classifiers[0]
    assert concept.images + concept.rows == world.manifest.forget.rows
    assert len(finding(result, Check.NEAREST).classes) == 1


def test_rounding_that_changes_no_weight_changes_no_figure(world, verified, monkeypatch):
    monkeypatch.setattr(
        "slsgu_cli.verification.checks.quantise.to_int8", lambda values, _axis: values
    )
    with torch.no_grad():
        result = run(world, checks=[Check.QUANTISE], seed=1)
    for place in range(2):
        exact = variants(result, Check.QUANTISE, place)["int8"]
        assert exact.forget == finding(verified, Check.BASELINE, place).variants[0].forget


def test_training_starts_from_the_model_as_it_is_and_leaves_it_so(verified):
    for place in range(2):
        first = finding(verified, Check.BASELINE, place).variants[0].forget
        for check in (Check.FINETUNE, Check.RELEARN):
            curve = finding(verified, check, place).curves[0]
            assert curve.points[0].forget == first
            assert [point.step for point in curve.points] == [0, 1, 2, 3]
    # Membership comes after the training, and neighbours do: both see the model as it is.
    again = finding(verified, Check.NEIGHBOURS).neighbourhood
    assert sum(taken.rows for taken in again.guesses) <= again.rows


def test_the_original_also_learns_a_new_name(verified):
    own, new = finding(verified, Check.RELEARN, place=0).curves
    assert (own.name, new.name) == (OWN, NEW)
    assert own.target == "blue"
    assert new.target != "blue"
    assert new.points[0].forget.top1 < own.points[0].forget.top1
    assert [c.name for c in finding(verified, Check.RELEARN).curves] == [OWN]


def test_images_of_the_concept_bring_it_back(world):
    result = run(world, checks=[Check.RELEARN], steps=12, batch_size=16)

    def best(curve):
        return max(point.forget.top1 for point in curve.points)

    own, new = finding(result, Check.RELEARN, place=0).curves
    assert best(own) >= own.points[0].forget.top1
    assert best(new) >= new.points[0].forget.top1 + 30
    relearnt = finding(result, Check.RELEARN).curves[0]
    assert relearnt.points[0].forget.top1 == 0
    assert best(relearnt) >= 60


def test_neighbours_are_the_nearest_names_and_the_commonest_guesses(edited, verified):
    reference = Reference(edited)
    block = reference.blocks["first"]
    with torch.no_grad():
        texts = [t.format(n) for n in block.class_names for t in block.templates]
        t = reference.model.encode_text(reference.tokenize(texts), normalize=True)
    means = torch.nn.functional.normalize(t.reshape(8, 3, -1).mean(1), dim=-1)
    cosines = (means @ means[block.class_names.index("blue")]).numpy()
    order = [i for i in np.argsort(-cosines) if block.class_names[i] != "blue"]
    became = finding(verified, Check.NEIGHBOURS, place=0).neighbourhood
    assert [near.name for near in became.nearest] == [block.class_names[i] for i in order[:5]]
    assert became.nearest[0].cosine == pytest.approx(float(cosines[order[0]]), abs=1e-5)
    assert became.guesses[0].name == "blue"
    assert "blue" not in {t.name for t in finding(verified, Check.NEIGHBOURS).neighbourhood.guesses}


def test_membership_is_of_the_forget_set_and_the_held_out_rows(edited, verified):
    for attack in finding(verified, Check.MEMBERSHIP).membership:
        assert attack.members == edited.manifest.forget.rows
        assert attack.others == (8 if attack.against == "held out" else 30)
        assert 0 <= attack.mean <= 100
    named = {(a.figure, a.against) for a in finding(verified, Check.MEMBERSHIP).membership}
    assert len(named) == 4


def test_a_second_run_finds_everything_recorded(world, monkeypatch, verified):
    monkeypatch.setattr(verify_module, "load_source", lambda *_, **__: pytest.fail("loaded"))
    again = run(world, checks=list(Check))
    assert again.reused == 2 * len(Check)
    assert again.models == verified.models


def test_an_interrupted_run_resumes(world, monkeypatch, verified):
    world.store.remove(Artifact.VERIFICATION.path("blue"))
    right = augment.SPEC

    def stop(_bench, _settings):
        raise KeyboardInterrupt

    checks = [Check.PARAPHRASE, Check.AUGMENT]
    monkeypatch.setattr(augment, "SPEC", replace(right, run=stop))
    with pytest.raises(KeyboardInterrupt):
        run(world, checks=checks)
    monkeypatch.setattr(augment, "SPEC", right)
    result = run(world, checks=checks)
    assert result.reused == 2
    for check in checks:
        assert finding(result, check) == finding(verified, check)


def test_other_settings_are_measured_again_only_if_they_matter(world):
    result = run(world, checks=[Check.AUGMENT, Check.TYPOS], aliases=("navy",))
    assert result.reused == 4
    assert "alias: navy" in variants(result, Check.TYPOS)


def test_another_edit_of_the_set_has_figures_of_its_own(world, verified):
    find(world, "transformer.resblocks.1.ln_1.weight")
    result = run(world, checks=[Check.AUGMENT])
    # The original's two are known; the new edit's are not.
    assert result.reused == 2
    assert result.models[1].edit.layer == "transformer.resblocks.1.ln_1.weight"
    assert result.models[1].key != verified.models[1].key
    assert len(result.record.subjects) == 3


def test_edits_with_equal_headers_and_different_changes_differ(world, verified):
    edit = load_edit(world.store, "blue")
    other = replace(edit, load=lambda name: edit.load(name) * (0 if name == "delta" else 1))
    write_edit(world.store, other)
    result = run(world)
    assert result.models[1].key != verified.models[1].key
    assert finding(result, Check.BASELINE) != finding(verified, Check.BASELINE)
    assert finding(result, Check.BASELINE).variants == finding(result, Check.BASELINE, 0).variants


def test_several_edits_are_shown_side_by_side(world, tmp_path):
    copy = tmp_path / "first.safetensors"
    shutil.copy(world.store.where(Artifact.EDIT.path("blue")), copy)
    find(world, "transformer.resblocks.1.ln_1.weight")
    result = run(world, checks=[Check.AUGMENT], edits=["blue", str(copy)])
    assert [s.label for s in result.models] == ["original", "edit blue", "edit first"]
    assert result.reused == 4


def test_files_with_equal_stems_are_distinguished_by_their_paths(world, tmp_path):
    paths = [tmp_path / folder / "first.safetensors" for folder in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        shutil.copy(world.store.where(Artifact.EDIT.path("blue")), path)
    result = run(world, checks=[Check.AUGMENT], edits=[str(path) for path in paths])
    assert [s.label for s in result.models[1:]] == [f"edit {path}" for path in paths]


def test_a_checkpoint_is_verified_as_eval_does(world, tmp_path):
    from slsgu_cli.engine.apply import apply
    from slsgu_cli.records.options import ApplyRequest
    from slsgu_cli.records.sets import ModelSpec

    request = ApplyRequest(names=["blue"], out=tmp_path / "out")
    spec = ModelSpec(apply(world.store, request).model)
    result = run(world, model=spec)
    assert result.models[1].label == str(spec)
    own = finding(run(world), Check.BASELINE)
    assert finding(result, Check.BASELINE).variants == own.variants


def test_an_edit_of_other_weights_is_refused(world):
    edit = load_edit(world.store, "blue")
    header = replace(edit.header, digests={"fp32": "0", "fp16": "1", "bf16": "2"})
    write_edit(world.store, replace(edit, header=header))
    with pytest.raises(StaleError, match="made for another visual"):
        run(world)


def test_a_set_without_an_edit_says_what_to_run(world):
    world.store.remove(Artifact.EDIT.path("blue"))
    with pytest.raises(MissingError, match="no edit blue") as error:
        run(world)
    assert "slsgu search blue" in error.value.hint


def test_the_list_marks_verifications_of_other_inputs_as_stale(world):
    def state():
        found = {entry.kind: entry for entry in entries(world.store)}[Artifact.VERIFICATION]
        return found.state, found.reason

    assert state() == (Standing.OK, None)
    find(world, "transformer.resblocks.1.ln_1.weight")
    assert state() == (Standing.STALE, "the edit has been remade since")
    run(world)
    assert state()[0] is Standing.OK
    world.build(retain_samples=50)
    assert state() == (Standing.STALE, "its retain rows have been rebuilt since")


def test_a_concept_outside_the_classes_is_verified_too(world):
    world.build(evals={"second": world.sources["second"]}, templates={})
    world.grade()
    find(world)
    result = run(world, checks=[Check.MEMBERSHIP, Check.NEIGHBOURS, Check.RELEARN], steps=1)
    assert {a.against for a in finding(result, Check.MEMBERSHIP).membership} == {
        "other classes",
        "retain set",
    }
    assert result.models[1].finding(Check.RELEARN).curves[0].target == "blue"


def test_the_plot_is_drawn(verified):
    with Image.open(verified.files[1]) as picture:
        assert picture.format == "PNG"
        assert picture.width > picture.height > 100


def test_the_command_prints_verdicts_and_writes_the_record(world):
    options = ("--checks", "augment,neighbours", "--rows", "30")
    piped = inside("verify", "blue", *options, store=world.store.root)
    assert piped.exit_code == 0, piped.stderr
    verdicts, became = (part.splitlines() for part in piped.stdout.split("\n\n"))
    head, *lines = (line.split("\t") for line in verdicts)
    assert head[:4] == ["check", "variant", "model", "original FA@1"]
    assert [line[0] for line in lines] == ["baseline", *["augment"] * 6]
    assert all(line[head.index("verdict")] for line in lines)
    assert became[0].split("\t") == ["what", "original", "edit blue"]
    assert became[-2].startswith("edit blue: stays forgotten")
    assert "of 6 attempts" in became[-1].lower()
    assert "reused 6 recorded findings" in piped.stderr
    record = world.store.read_record(Artifact.VERIFICATION.path("blue"), Verification)
    assert {subject.label for subject in record.subjects} == {"original", "edit blue"}


def test_in_json_every_table_is_there(verified, capsys):
    console = Console(as_json=True)
    cli_verify.show_verified(console, verified)
    console.flush()
    document = json.loads(capsys.readouterr().out)
    rows = document["verification"]
    assert {row["check"] for row in rows} == {
        Check.BASELINE,
        Check.PARAPHRASE,
        Check.AUGMENT,
        Check.QUANTISE,
        Check.FINETUNE,
        Check.RELEARN,
        Check.TYPOS,
        Check.DESCRIPTION,
        Check.PREFIX,
        Check.RING_A_BELL,
        Check.INVERSION,
    }
    assert {row["check"] for row in document["attempts"]} == {
        Check.PREFIX,
        Check.RING_A_BELL,
        Check.INVERSION,
    }
    assert rows[0]["original FA@1"] > rows[0]["FA@1"] == 0
    assert len(document["membership"]) == 4
    assert {row["trained name"] for row in document["curves"]} >= {"blue"}
    assert {row["what"] for row in document["classes"]} >= {"nearest name"}
    assert [row["classes"] for row in document["look-alikes"]] == ["look-alikes", "random classes"]
    (neutral,) = document["neutral-prompts"]
    assert (neutral["after"], neutral["spread"], neutral["overlap"]) == ("the edit", 100, 100)
    assert [row["classifier"] for row in document["classifiers"]][::3] == list(CLASSIFIERS)
    assert [row["identical"] for row in document["index"]] == [0, 0]
    assert len(document["retrieval"]) == 4
    (found,) = document["conclusions"]
    assert found["sentences"][-1].startswith("The edit changed one layer of the image tower")
    assert document["files"] == list(verified.files)


def test_a_terminal_sees_the_worst_template_alone(verified, monkeypatch, capsys):
    monkeypatch.setattr(Console, "on_terminal", property(lambda _: True))
    cli_verify.show_verified(Console(), verified)
    seen = capsys.readouterr().out
    assert seen.count("template:") == 1
    assert "relearn: back " in seen
    assert "trained name" not in seen
    assert "The edit changed one layer of the image tower" in " ".join(seen.split())
    assert max(map(len, seen.splitlines())) <= 80


def test_checks_are_named_one_by_one():
    checks = choices(CHECKS)
    assert checks("--checks", "augment, relearn") == (Check.AUGMENT, Check.RELEARN)
    assert Check.BASELINE not in VerifyRequest().checks
    for wrong in ("augment,nothing", "baseline", ","):
        with pytest.raises(UsageError, match=r"(not one|names none) of paraphrase"):
            checks("--checks", wrong)
