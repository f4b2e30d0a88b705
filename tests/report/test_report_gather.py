import json
import re
import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import tiny_clip
from checkpoints import DTYPES, save, state
from edit_headers import edit
from reports import NAME, fill, fill_comparison, fill_verification, sections

from slsgu_cli.checkpoints.apply import apply_edits
from slsgu_cli.checkpoints.clip_weights import ClipWeights
from slsgu_cli.checkpoints.edits import load_edit, write_edit
from slsgu_cli.checkpoints.number_formats import PRECISION, layer_digest
from slsgu_cli.checkpoints.targets import read_target
from slsgu_cli.clip.models import fingerprint, resolve
from slsgu_cli.errors import MissingError
from slsgu_cli.records.figures import Effect, JudgeFigures, Share, TargetFigures
from slsgu_cli.records.method import GradientPointer, Ranking
from slsgu_cli.records.options import ApplyOptions
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.report.gather import edit_facts, gather
from slsgu_cli.report.page import written_fingerprint
from slsgu_cli.store.catalog import Catalog, Standing
from slsgu_cli.store.store import Store


@pytest.fixture
def store(tmp_path):
    store = Store(str(tmp_path / "store"))
    fill(store)
    return store


def gathered(store):
    return gather(Catalog(store), NAME)


def test_every_record_is_gathered_with_its_hash(store):
    fill_verification(store)
    fill_comparison(store)
    records = gathered(store)
    for stored in records.all():
        assert stored.state is Standing.OK
        assert stored.trouble is None
        assert stored.sha256 == sha256(Path(store.where(stored.path)).read_bytes()).hexdigest()
    assert records.gradients["forget"].loss == "cosine"
    assert records.gradients["retain"].loss == "contrastive"


def test_a_stale_record_is_named_and_withheld(store):
    path = f"rankings/{NAME}.json"
    ranking = store.read_record(path, Ranking)
    store.write_record(path, replace(ranking, forget="another"))
    ranking = gathered(store).ranking
    assert ranking.record is None
    assert ranking.state is Standing.STALE
    assert ranking.trouble == "The ranking is stale: the gradients have been recomputed since."
    assert ranking.run == f"slsgu rank {NAME}"


def test_an_edit_of_an_unknown_layer_is_withheld(store):
    pointer = store.read_record(f"gradients/{NAME}.json", GradientPointer)
    edit = load_edit(store, NAME)
    header = replace(edit.header, layer="no.such.layer.weight", gradient=pointer.forget)
    write_edit(store, replace(edit, header=header))
    edit = gathered(store).edit
    assert edit.record is None
    assert edit.state is Standing.DAMAGED
    assert "it names no.such.layer.weight" in edit.trouble


def test_records_of_earlier_gradients_are_stale(store):
    path = f"gradients/{NAME}.json"
    pointer = store.read_record(path, GradientPointer)
    store.write_record(path, replace(pointer, forget=pointer.retain))
    records = gathered(store)
    assert records.pointer.state is Standing.OK
    assert {records.ranking.state, records.trials.state, records.edit.state} == {Standing.STALE}
    assert records.facts is None


def test_a_damaged_record_and_a_missing_one(store):
    store.write_bytes(f"trials/{NAME}.json", b"{")
    store.remove(f"edits/{NAME}.safetensors")
    records = gathered(store)
    assert records.trials.state is Standing.DAMAGED
    assert "is not JSON" in records.trials.trouble
    assert records.edit.state is None
    assert records.edit.trouble == "There is no edit yet."


def test_an_unknown_set_is_an_error(store):
    with pytest.raises(MissingError, match="it has mouse"):
        gather(Catalog(store), "other")


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_digests_of_a_layer_equal_those_of_the_files_that_apply_reads_and_writes(dtype, tmp_path):
    precision = PRECISION[dtype]
    layer = "visual.proj"
    original = ClipWeights.of_file(save(state(), tmp_path / "original.safetensors")).layer(layer)
    delta = 0.1 * np.random.default_rng(0).standard_normal(original.shape)
    change = edit(layer, delta.astype(np.float32), original)
    path = save(state(DTYPES[dtype]), tmp_path / "model.safetensors")
    out = tmp_path / "edited.safetensors"
    apply_edits([change], read_target(path), out, options=ApplyOptions())
    facts = edit_facts(change)
    assert facts.before[precision] == layer_digest(ClipWeights.of_file(path).layer(layer), "fp32")
    assert facts.after[precision] == layer_digest(ClipWeights.of_file(out).layer(layer), "fp32")
    assert facts.changed == facts.values == original.size


def test_an_edit_searched_on_a_target_has_its_figures_by_each_judge(store):
    before, after = (
        Effect(Share(18, 20), Share(57, 60)),
        Effect(Share(1, 20), Share(54, 60)),
    )
    kind = TargetFigures(
        target="models/sd",
        fingerprint="",
        before=before,
        after=after,
        judge="one",
        is_test=True,
        further=(JudgeFigures("another", before, after),),
    )
    own = load_edit(store, NAME)
    header = replace(own.header, name=f"{NAME}@sd", target=kind, forgotten=False)
    write_edit(store, replace(own, header=header))
    records, shown = sections(store)
    assert list(records.on_targets) == [f"{NAME}@sd"]
    (one,) = [section for section in shown if section.title == "On sd"]
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", str(one.content), re.DOTALL)
    told = [re.sub(r"<[^>]+>", " ", row).split() for row in rows]
    assert told[1][:6] == ["one", "UA", "10.00%", "95.00%", "+85.00", "20"]
    assert told[2][:6] == ["one", "IRA", "95.00%", "90.00%", "−5.00", "60"]
    assert [row[0] for row in told[3:]] == ["another", "another"]
    assert "test prompts or images" in str(one.content)
    assert "did not reach its goal" in str(one.content)


def test_a_written_copy_has_a_fingerprint_as_a_folder_and_as_a_file(tmp_path):
    folder = tiny_clip.write_folder(tmp_path / "clip")
    weights = folder / "open_clip_model.safetensors"
    (tmp_path / "arch.json").write_text(json.dumps(tiny_clip.CONFIG))
    copy = shutil.copy(weights, tmp_path / "copy.safetensors")
    original = ModelSpec(str(tmp_path / "arch.json"), str(weights))
    print_of_folder = fingerprint(resolve(ModelSpec(str(folder))))
    assert written_fingerprint(ModelSpec(str(folder)), folder) == print_of_folder
    assert written_fingerprint(original, copy) == fingerprint(resolve(original))
    assert written_fingerprint(original, tmp_path / "gone") is None
