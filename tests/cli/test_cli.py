"""The commands as a shell meets them: what comes out where, exit codes, and what is left behind."""

import ctypes
import json
import os
import resource
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny_clip
from processes import inside, on_terminal, rows, slsgu
from safetensors.numpy import load_file, save_file

from slsgu_cli.checkpoints.layers import known_as
from slsgu_cli.records.codec import sealed
from slsgu_cli.records.method import EditHeader, Ranking
from slsgu_cli.store.store import Store

COMMANDS = (
    "build-sets",
    "show",
    "grad",
    "rank",
    "search",
    "apply",
    "eval",
    "compare",
    "trajectory",
    "sweep",
    "report",
    "ls",
    "check",
    "gc",
    "demo",
)
COMMANDS += ("generate", "ask", "verify")
PLAIN_RANK = ["rank", "blue", "--direction", "gradient"]
PLAIN_REPORT = ["report", "blue", "--no-examples"]
HEAVY = ("torch", "open_clip", "torchvision", "timm", "zarr")


def imported(*arguments, cwd=None):
    """Return which heavy modules a command imports."""
    code = (
        "import sys\n"
        "from slsgu_cli.__main__ import main\n"
        "sys.argv = ['slsgu', *sys.argv[1:]]\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        f"sys.stderr.write('IMPORTED ' + ' '.join(m for m in {HEAVY} if m in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        cwd=cwd,
    )
    return done.stderr.rpartition("IMPORTED ")[2].split()


@pytest.fixture(scope="session")
def chain(shared_world, tmp_path_factory):
    """Every command after another, in a folder with an odd name, on a store given by env.

    `ran` maps each command to how it ended. The one that does most is a process as a shell
    starts it; in this one a warning is an error.
    """
    folder = tmp_path_factory.mktemp("chain") / "häus & höf"
    folder.mkdir()
    first, second, templates = (shared_world.sources[k] for k in ("first", "second", "templates"))
    build = [
        "build-sets",
        "blue",
        "--model",
        shared_world.model.name,
        "--retain-samples",
        "64",
        "--source",
        shared_world.sources["pairs"],
        "--label-column",
        "label",
        "--eval",
        f"first={first}",
        "--eval",
        f"second={second}",
        "--templates",
        f"first={templates}",
        "--templates",
        f"second={templates}",
    ]
    commands = {
        "build-sets": build,
        "grad": ["grad", "blue", "--json"],
        "apply": ["apply", "blue", "--out", "nëw clip"],
        "eval": ["eval", "blue", "--model", "local-dir:nëw clip"],
        "rank": ["rank", "blue"],
    }
    environment = {"SLSGU_STORE": "a störe"}
    ran = {}
    for key, words in commands.items():
        if key == "apply":
            ran[key] = slsgu(*words, cwd=folder, env=environment)
            continue
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            patch.chdir(folder)
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", DeprecationWarning)
            ran[key] = inside(*words, env=environment)
            ran[key].returncode = ran[key].exit_code
    return folder, folder / "a störe", ran


@pytest.fixture
def store(chain, tmp_path):
    """A store of this test alone with everything in it."""
    shutil.copytree(chain[1], tmp_path / "store")
    return tmp_path / "store"


def test_the_whole_chain_succeeds(chain):
    folder, store, ran = chain
    assert {key: done.returncode for key, done in ran.items()} == dict.fromkeys(ran, 0)
    for done in ran.values():
        assert "Traceback" not in done.stderr
        assert "Warning" not in done.stderr
    assert {path.name for path in folder.iterdir()} == {"a störe", "nëw clip"}
    assert not list(store.rglob(".partial*"))


def test_apply_says_that_it_ranks_and_searches(chain):
    told = chain[2]["apply"].stderr
    assert "blue has no ranking yet: ranking its layers" in told
    assert "blue has no edit yet: searching for one" in told
    assert "open_clip loads it as local-dir:nëw clip" in told


def test_the_piped_output_of_each_command(chain):
    _, _, ran = chain
    ((head, *parts),) = rows(ran["build-sets"].stdout)
    assert head == ["part", "rows", "seen", "left out", "path"]
    assert [part[:2] for part in parts] == [
        ["forget", "20"],
        ["retain", "64"],
        ["eval first", "64"],
        ["eval second", "40"],
    ]
    ((head, *written),) = rows(ran["apply"].stdout)
    assert head == ["file", "layer", "dtype", "relative change", "bytes"]
    (row,) = written
    assert row[0] == "nëw clip/open_clip_model.safetensors"
    assert int(row[4]) == Path(chain[0], row[0]).stat().st_size
    ((head, *layers),) = rows(ran["rank"].stdout)
    assert head[:5] == ["layer", "tower", "front", "importance", "alignment"]
    assert len(layers) == 2 * len({row[0] for row in layers}) == 2 * 42
    assert {row[2] for row in layers} == {"yes", ""}
    (head, *figures), neutral = rows(ran["eval"].stdout)
    assert head == ["figure", "original", "local-dir:nëw clip", "change"]
    assert [row[0] for row in figures] == [
        "FA@1",
        "FA@5",
        "TA@1 first",
        "TA@5 first",
        "TA@1 second",
        "TA@5 second",
    ]
    assert float(figures[0][2]) == 0 < float(figures[0][1])
    assert neutral[0] == ["model", "prompts", "spread", "overlap"]
    assert neutral[1][0] == "local-dir:nëw clip"


@pytest.mark.usefixtures("drawing")
def test_json_is_one_document_with_the_documented_keys(chain, store, tmp_path):
    _, _, ran = chain
    assert [row["role"] for row in json.loads(ran["grad"].stdout)["gradients"]] == [
        "forget",
        "retain",
    ]
    listed = json.loads(slsgu("ls", "--json", "--store", store).stdout)["store"]
    assert {"kind", "name", "path", "size", "state", "reason", "made_from"} == set(listed[0])
    for entry in listed:
        assert (store / entry["path"]).exists()
        assert entry["state"] == "ok"
    ranked = json.loads(inside("rank", "blue", "--json", store=store).stdout)
    assert set(ranked) == {"schema", "command", "ranking", "plots"}
    assert all(Path(plot).read_bytes().startswith(b"\x89PNG") for plot in ranked["plots"])
    out = tmp_path / "out"
    applied = json.loads(inside("apply", "blue", "--out", out, "--json", store=store).stdout)
    assert set(applied) == {"schema", "command", "applied"}
    assert applied["applied"]["model"] == f"local-dir:{out}"


def test_a_second_search_and_eval_agree(chain, store, shared_world):
    folder, _, ran = chain
    layer = Store(str(store)).read_header("edits/blue.safetensors", EditHeader).layer
    done = inside("search", "blue", "--layer", known_as(layer), "--json", store=store)
    assert done.exit_code == 0
    assert "recorded trials were reused" in done.stderr
    found = json.loads(done.stdout)
    results = {"trials", "chosen", "accuracy", "harmed", "nearest", "files"}
    assert set(found) == {"schema", "command", *results}
    assert found["chosen"] in found["trials"]["trials"]
    measured = {row[0]: row[2] for row in rows(ran["eval"].stdout)[0][1:]}
    assert measured == {row["figure"]: f"{row['edited']:.10g}" for row in found["accuracy"]}
    before = load_file(shared_world.folder / "open_clip_model.safetensors")
    after = load_file(folder / "nëw clip" / "open_clip_model.safetensors")
    assert before.keys() == after.keys()
    changed = [name for name in before if (before[name] != after[name]).any()]
    assert changed == [found["chosen"]["layer"]] == [layer]


def test_quiet_prints_the_same_results_and_no_notes(store):
    quiet, normal = (slsgu(*PLAIN_RANK, *f, "--store", store) for f in (["-q"], []))
    assert quiet.stderr == ""
    assert "wrote" in normal.stderr
    assert quiet.stdout == normal.stdout


@pytest.mark.parametrize("columns", [80, 120])
def test_a_terminal_shows_whole_layer_names_and_units(store, columns):
    code, shown, told = on_terminal(*PLAIN_RANK, "--store", store, columns=columns)
    assert code == 0
    ranking = Store(str(store)).read_record("rankings/blue.json", Ranking)
    lines = shown.splitlines()
    assert lines[0] == "layers for blue"
    assert lines[1].split() == ["layer", "tower", "front", "importance", "alignment"]
    front = [known_as(score.layer) for score in ranking.scores if score.front]
    assert [line.split()[0] for line in lines[3:]] == front
    assert all(len(line) <= columns for line in lines)
    assert "layers are not on a front; -v shows them" in told
    code, shown, _ = on_terminal("ls", "--store", store, columns=columns)
    assert all(len(line) <= columns for line in shown.splitlines())
    assert "5.2 MB" in shown
    code, everything, _ = on_terminal(*PLAIN_RANK, "-v", "--store", store, columns=columns)
    assert len(everything.splitlines()) == 42 + 3


def test_colours_are_for_terminals_that_want_them(store):
    wrong = ("rank", "nosuch", "--store", store)
    assert "\x1b" not in slsgu(*wrong).stderr
    assert "\x1b[1;31m" in on_terminal(*wrong, both=True)[1]
    assert "31m" not in on_terminal(*wrong, both=True, env={"NO_COLOR": "1"})[1]
    _, shown, _ = on_terminal(*PLAIN_RANK, "--store", store, env={"NO_COLOR": "1"})
    assert "\x1b[3" not in shown


def test_help_of_every_command_has_an_example_and_the_common_options():
    shown = inside("--help").stdout
    for name in COMMANDS:
        assert f"\n  {name} " in shown
        text = inside(name, "--help").stdout
        assert f"Example: slsgu {name}" in " ".join(text.split())
        for option in ("--store", "SLSGU_STORE", "--json", "--quiet", "-v,", "--debug"):
            assert option in text
    assert "..." not in shown.partition("The five steps")[2]


def test_version_and_completion():
    assert slsgu("--version").stdout.startswith("slsgu 0.")
    wanted = {"_SLSGU_COMPLETE": "complete_bash", "COMP_WORDS": "slsgu ra", "COMP_CWORD": "1"}
    assert slsgu(env=wanted).stdout.split() == ["rank"]


@pytest.mark.parametrize("words", [["--help"], ["ls"], PLAIN_RANK, ["apply", "blue"], PLAIN_REPORT])
def test_commands_without_a_model_import_no_heavy_package(store, tmp_path, words):
    options = ["--store", store] if words != ["--help"] else []
    options += ["--out", tmp_path / "out"] if words[0] in ("apply", "report") else []
    assert imported(*words, *options) == []


def test_help_starts_at_once():
    """By the processor's time, of which a process takes no more where others run beside it."""

    def spent(*command):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *command], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    pairs = [(spent("-c", "pass"), spent("-m", "slsgu_cli", "--help")) for _ in range(7)]
    bare, helped = map(min, zip(*pairs, strict=True))
    assert helped <= 3 * bare + 0.15


@pytest.mark.parametrize("words", [PLAIN_RANK, ["ls", "--json"]])
def test_a_closed_pipe_is_not_an_error(store, words):
    reading, writing = os.pipe()
    os.close(reading)
    done = slsgu(*words, "-q", "--store", store, stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_results_that_cannot_be_written_are_an_error(store):
    with Path("/dev/full").open("w") as full:
        done = slsgu("ls", "--store", store, stdout=full)
        assert done.returncode == 3
        assert done.stderr.startswith("error: cannot write the results: No space left")
        for option in ("--help", "--version"):
            done = slsgu(option, stdout=full, env={"PYTHONUNBUFFERED": ""})
            assert (done.returncode, "Traceback" in done.stderr) == (1, False)
        silent = slsgu(
            "rank", "nosuch", "--store", store, stderr=full, env={"PYTHONUNBUFFERED": ""}
        )
        assert silent.returncode == 3


def test_commands_run_with_closed_outputs(store):
    line = f"{sys.executable} -m slsgu_cli ls --store '{store}'"
    assert subprocess.run(["sh", "-c", f"{line} >&-"], capture_output=True).returncode == 0
    done = subprocess.run(["sh", "-c", f"{line} 2>&-"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("kind\t")


def test_characters_outside_the_encoding_are_escaped(store):
    done = slsgu("rank", "bläü", "--store", store, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 3
    assert "has no set bl\\xe4\\xfc; it has blue" in done.stderr


def test_debug_shows_the_traceback_and_the_exit_code_stays(store):
    done = slsgu("rank", "nosuch", "--debug", "--store", store)
    assert done.returncode == 3
    assert "Traceback" in done.stderr
    assert done.stderr.index("Traceback") < done.stderr.index("error: ")
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["rank", "a/b"], 2, "'a/b' cannot name a set"),
        (["rank", "nosuch"], 3, "has no set nosuch; it has blue"),
        (["grad", "nosuch"], 3, "run `slsgu build-sets nosuch --source ...`"),
        (["search", "no such"], 3, "run `slsgu build-sets 'no such' --source ...`"),
        (["eval", "nosuch"], 3, "has no set nosuch"),
        (["apply", "nosuch", "--out", "x"], 3, "run `slsgu search nosuch`"),
        (["apply", "blue", "blue", "--out", "x"], 2, "is named twice"),
        (["apply", "no/edit.safetensors", "--out", "x"], 3, "there is no edit file"),
        (["rank", "blue", "--include", "nosuch"], 3, "no layer of blue is left to rank"),
        (["search", "blue", "--layer", "attn"], 2, "--layer attn fits 12 ranked layers"),
        (["search", "blue", "--layer", "nosuch"], 2, "fits 0 ranked layers: none"),
        (["apply", "blue", "--layer", "attn", "--step", "1", "--out", "x"], 2, "fits 12 layers"),
        (["apply", "blue", "--layer", "conv1", "--out", "x"], 2, "--layer goes with"),
        (
            ["apply", "blue", "--damping", "0.5", "--out", "x"],
            4,
            "along whitened (damping 0.01), which does not match --damping 0.5",
        ),
        (
            ["rank", "blue", "--direction", "gradient", "--damping", "1"],
            2,
            "--damping is for the whi",
        ),
        (["apply", "blue", "--step", "nan", "--out", "x"], 2, "--step nan is not a step size"),
        (["grad", "blue", "--memory-budget", "much"], 2, "'much' is not a size"),
        (["grad", "blue", "--batch-size", "1"], 2, "--batch-size 1 is out of range"),
        (["grad", "blue", "-m", "local-dir:nosuch"], 3, "model folder: there is no such folder"),
        (["grad", "blue", "--model", "ViT-B-33"], 3, "open_clip has no model ViT-B-33; near: "),
        (["grad", "blue", "--pretrained", "x"], 2, "--pretrained needs --model"),
        (["demo", "faceboo"], 2, "near: facebook"),
        (["ls", "--store", "nosuch://a"], 3, "cannot open the store nosuch://a"),
    ],
)
def test_each_mistake_has_a_message_and_an_exit_code(chain, words, code, told):
    own = () if "--store" in words else ("--store", chain[1])
    done = inside(*words, *own)
    assert (done.exit_code, done.stdout) == (code, "")
    assert told in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--match", "zebra"], 3, "the forget set is empty: nothing matches 'zebra'"),
        (["--match", "blue", "--retain-exclude", "a", "--retain-exclude", "e"], 0, ""),
        (["--match", "(", "--regex"], 2, "'(' is not a regular expression"),
        (["--source", "nosuch/*.tar"], 3, "no file matches source nosuch/*.tar"),
        (["--eval", "first"], 2, "--eval first is not NAME=VALUE"),
        (["--eval", "a=x", "--eval", "a=y"], 2, "--eval names a twice"),
        (["--classes", "a=x"], 2, "--classes names an evaluation set a"),
        (["--model", "local-dir:nosuch"], 3, "nosuch is not an open_clip model folder"),
    ],
)
def test_a_failed_build_says_why_and_leaves_no_set(shared_world, tmp_path, words, code, told):
    model = [] if "--model" in words else ["--model", shared_world.model.name]
    source = ["--source", shared_world.sources["pairs"]]
    done = inside("build-sets", "blue", *model, *source, *words, store=tmp_path / "store")
    assert done.exit_code == code
    assert told in " ".join(done.stderr.split())
    assert (tmp_path / "store" / "sets" / "blue.json").exists() == (code == 0)


def test_a_weights_file_as_model_gets_a_hint(shared_world, chain):
    file = shared_world.folder / "open_clip_model.safetensors"
    done = inside("grad", "blue", "--model", file, store=chain[1])
    assert done.exit_code == 3
    assert f"--model ViT-B-32 --pretrained {file}" in done.stderr


def test_a_store_that_is_missing_or_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLSGU_STORE", raising=False)
    listed = slsgu("ls", cwd=tmp_path)
    assert (listed.returncode, listed.stdout.count("\n")) == (0, 1)
    assert f"there is no store {tmp_path}/slsgu-store yet" in listed.stderr
    missing = slsgu("rank", "blue", cwd=tmp_path)
    assert missing.returncode == 3
    assert f"there is no store {tmp_path}/slsgu-store" in missing.stderr
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("mine")
    taken = slsgu("ls", "--store", "file", cwd=tmp_path)
    assert taken.returncode == 3
    assert "file is a file, not a folder" in taken.stderr


def test_a_missing_cuda_device_is_reported(store):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = inside("search", "blue", "--device", "cuda", store=store)
    assert done.exit_code == 2
    assert "device cuda is not available here" in done.stderr


def test_a_rebuilt_set_makes_its_gradients_stale(shared_world, store):
    done = inside(
        "build-sets",
        "blue",
        "--model",
        shared_world.model.name,
        "--retain-samples",
        30,
        "--source",
        shared_world.sources["pairs"],
        store=store,
    )
    assert done.exit_code == 0, done.stderr
    assert "will have no evaluation set" in done.stderr
    for words in (["rank", "blue"], ["search", "blue"], ["apply", "blue", "--out", "x"]):
        stale = inside(*words, store=store)
        assert stale.exit_code == 4
        assert "before its retain set was rebuilt" in stale.stderr
        assert "run `slsgu grad blue`" in stale.stderr
    listed = json.loads(inside("ls", "--json", store=store).stdout)["store"]
    assert {e["state"] for e in listed if e["kind"] in ("pointer", "ranking")} == {"stale"}


def test_an_edit_is_for_its_own_weights_unless_forced(store, tmp_path):
    other = tiny_clip.write_folder(tmp_path / "other", tiny_clip.fresh_model(seed=1))
    words = ["apply", "blue", "--model", f"local-dir:{other}", "--out", tmp_path / "out"]
    refused = inside(*words, store=store)
    assert refused.exit_code == 4
    assert "is not the layer that the edit blue was made for" in refused.stderr
    assert not (tmp_path / "out").exists()
    assert inside(*words, "--force", store=store).exit_code == 0
    assert (tmp_path / "out" / "open_clip_model.safetensors").exists()


def test_weights_of_another_architecture(store, tmp_path):
    wrong = tiny_clip.write_folder(tmp_path / "wrong")
    config = json.loads((wrong / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["layers"] = 4
    (wrong / "open_clip_config.json").write_text(json.dumps(config))
    done = inside("grad", "blue", "--model", f"local-dir:{wrong}", store=store)
    assert done.exit_code == 3
    assert "weights belong to this architecture" in done.stderr


def test_weights_that_are_not_numbers_name_the_mini_batch(shared_world, store, tmp_path):
    folder = tmp_path / "nan"
    shutil.copytree(shared_world.folder, folder)
    tensors = load_file(folder / "open_clip_model.safetensors")
    tensors["visual.transformer.resblocks.1.mlp.c_fc.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "open_clip_model.safetensors", {"format": "pt"})
    before = sorted(store.rglob("*"))
    done = inside("grad", "blue", "--model", f"local-dir:{folder}", store=store)
    assert done.exit_code == 3
    assert "not finite in mini-batch 0 (rows 0 to 15): " in done.stderr
    assert sorted(store.rglob("*")) == before


def test_a_search_that_does_not_forget_shows_its_trials_and_keeps_its_edit(store, tmp_path):
    words = ["search", "blue", "--layer", "1.mlp.c_fc", "--steps", "1"]
    done = inside(*words, "--json", store=store)
    assert done.exit_code == 5
    assert "no step forgets blue: the best, transformer.resblocks.1.mlp.c_fc" in done.stderr
    found = json.loads(done.stdout)
    assert found["chosen"]["forget"]["top1"] > 0
    assert found["error"]["exit_code"] == 5
    applied = inside("apply", "blue", "--out", tmp_path / "out", store=store)
    assert applied.exit_code == 0
    assert "does not forget completely" in applied.stderr


@pytest.mark.parametrize(
    ("content", "code", "told"),
    [
        (b'{"name": ', 3, "is not JSON"),
        (b"\xff\xfe", 3, "is not JSON"),
        (b'{"name": "blue"}', 3, "is damaged: it carries no digest"),
        (
            json.dumps(sealed({"name": "blue"})).encode(),
            4,
            "was not written by this version of slsgu: it has no 'concept'",
        ),
    ],
)
def test_a_damaged_manifest(store, content, code, told):
    (store / "sets" / "blue.json").write_bytes(content)
    done = inside("rank", "blue", store=store)
    assert done.exit_code == code
    assert f"{store}/sets/blue.json" in done.stderr
    assert told in done.stderr
    assert "try: " in done.stderr
    listed = inside("ls", "--json", store=store)
    assert listed.exit_code == 0
    (entry,) = (e for e in json.loads(listed.stdout)["store"] if e["kind"] == "set")
    assert entry["state"] == ("foreign" if code == 4 else "damaged")


def test_a_truncated_gradient_is_reported_and_recomputed(store):
    before = {file: load_file(file) for file in store.glob("gradients/*.safetensors")}
    for file, left in zip(before, (4, 1_000_000), strict=True):
        os.truncate(file, left)
    broken = inside("rank", "blue", store=store)
    assert broken.exit_code == 3
    assert "is damaged: " in broken.stderr
    again = inside("grad", "blue", "-v", store=store)
    assert again.exit_code == 0
    assert "of activations a pair" in again.stderr
    assert again.stderr.count("is damaged or outdated; it is replaced") == 2
    assert [row[-2] for row in rows(again.stdout)[0]] == ["made", "computed", "computed"]
    for file, gradients in before.items():
        for name, gradient in load_file(file).items():
            np.testing.assert_allclose(gradient, gradients[name], rtol=1e-3, atol=1e-4)


def test_a_damaged_chunk_is_reported(store):
    for chunk in store.glob("data/*/images/c/0/0/0/0"):
        with chunk.open("r+b") as file:
            file.seek(100)
            file.write(b"xxxxxxxx")
    shutil.rmtree(store / "gradients")
    for words in (["grad", "blue"], ["eval", "blue"]):
        done = inside(*words, store=store)
        assert done.exit_code == 3
        assert ".zarr is damaged: " in done.stderr
        assert "slsgu check --repair" in done.stderr


def test_a_full_disk_leaves_no_partial_file(store, tmp_path):
    def few_bytes():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    (store / "rankings" / "blue.json").unlink()
    before = sorted(store.rglob("*"))
    done = slsgu(*PLAIN_RANK, "--store", store, preexec_fn=few_bytes)
    assert done.returncode == 3
    assert "cannot write" in done.stderr
    assert "try: free some space, or choose another store" in done.stderr
    assert sorted(store.rglob("*")) == before
    out = tmp_path / "out"
    done = slsgu("apply", "blue", "--out", out, "--store", store, preexec_fn=few_bytes)
    assert done.returncode == 3
    assert "cannot write" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_read_only_store(store):
    before = sorted(store.rglob("*"))

    def bound_by_modes():
        # Root may write everywhere, unless it gives that up (PR_CAPBSET_DROP, CAP_DAC_OVERRIDE).
        if os.geteuid() == 0 and ctypes.CDLL(None).prctl(24, 1, 0, 0, 0):
            raise PermissionError

    for path in [store, *before]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        done = slsgu(*PLAIN_RANK, "--store", store, preexec_fn=bound_by_modes)
    except subprocess.SubprocessError:
        pytest.skip("root cannot give up its rights here")
    finally:
        for path in [store, *before]:
            path.chmod(0o755 if path.is_dir() else 0o644)
    assert done.returncode == 3, done.stderr
    assert "cannot write" in done.stderr
    assert "Permission denied" in done.stderr
    assert sorted(store.rglob("*")) == before


def test_the_whitened_direction_from_ranking_to_checkpoint(store, tmp_path):
    done = inside("rank", "blue", "--direction", "whitened", "--damping", "0.1", store=store)
    assert done.exit_code == 0, done.output
    ((head, *_),) = rows(done.stdout)
    assert head[:5] == ["layer", "tower", "front", "importance", "alignment"]
    ranking = Store(str(store)).read_record("rankings/blue.json", Ranking)
    assert [str(each) for each in ranking.directions] == ["whitened (damping 0.1)"]
    done = inside("search", "blue", "--steps", "3", "--layer", "visual.proj", "-q", store=store)
    head, *trials = rows(done.stdout)[0][:-1]
    (chosen,) = [row for row in trials if row[head.index("chosen")]]
    assert chosen[0] == "visual.proj"
    assert chosen[head.index("direction")] == "whitened (damping 0.1)"
    listed = inside("ls", store=store).stdout
    assert "\ncovariance\t" in listed
    assert "directions whitened" in listed
    out = tmp_path / "out"
    refused = inside("apply", "blue", "--direction", "gradient", "--out", out, store=store)
    assert refused.exit_code == 4
    assert "does not match --direction gradient" in refused.stderr
    flags = ("--layer", "visual.proj", "--step", "0.5", "--direction", "whitened", "--out", out)
    assert inside("apply", "blue", *flags, store=store).exit_code == 0
    assert (out / "open_clip_model.safetensors").exists()
