"""Fixtures shared by several test files.

A world is a store with a set that is built, graded and ranked (see `worlds.py`):

- `world`, for one test alone: the colour blue and a tiny model of coloured shapes (see
  `tiny_clip.py`), with evaluation sets of 64 colours and 40 shapes;
- `shared_world`, the same, shared by all tests and read-only;
- `several_world`, shared too, with sets for blue, red and green that share a retain set;
- `demo_world`, shared too: facebook and the embedded CLIP, with few rows.

Tests run in several processes. One of them makes a slow fixture and all read it (`made_once`).
Slow files come first, so that no process waits for the last one.
"""

import fcntl
import functools
import itertools
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import figures_undrawn
import pytest
from places import DEMO

from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.store.store import Store

# Set before PyTorch is loaded: each process has one thread, and no thread spins.
# Sums over more threads differ in the last digits, and tests compare bytes.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


# The slowest files in order.
LONGEST = (
    "test_target_figures.py",
    "test_demo.py",
    "test_search.py",
    "test_cli.py",
    "test_erasing.py",
    "test_generation.py",
    "test_ranks.py",
    "test_joint.py",
    "test_interrupts.py",
    "test_installed.py",
    "test_sweep.py",
    "test_remote.py",
)


def pytest_collection_modifyitems(items):
    """Run slow files first; a process takes one file after another."""
    long = {item.path for item in items if item.get_closest_marker("slow")}
    first = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (first.get(item.path.name, len(first)), item.path not in long))


PASSED = pytest.StashKey[bool]()
# Removing a store's folders can take longer than the test that made it.
REMOVAL = ThreadPoolExecutor(4)
REMOVED = itertools.count()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Remove the folder of a passed test in the background.

    It is renamed first: open_clip rereads the configurations that it knows by path, and a
    folder must not disappear while it is read.
    """
    report = yield
    if report.when == "call":
        item.stash[PASSED] = report.passed
    if report.when == "teardown" and item.stash.get(PASSED, False) and "tmp_path" in item.funcargs:
        folder = item.funcargs["tmp_path"]
        passed = folder.rename(folder.with_name(f"passed-{next(REMOVED)}"))
        REMOVAL.submit(shutil.rmtree, passed, ignore_errors=True)
    return report


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """`made_once(name, make)` is the result of `make(folder)` in the process that came first.

    All tests share it; nobody may add files to `folder`.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    files = {}

    def get(name, make):
        result = root / f"{name}.pickle"
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not result.exists():
                (root / name).mkdir()
                made = make(root / name)
                result.write_bytes(pickle.dumps((made, files_below(root / name))))
        made, files[root / name] = pickle.loads(result.read_bytes())
        return made

    yield get
    for folder, made in files.items():
        assert files_below(folder) == made, f"a test wrote into {folder}, which all tests share"


def files_below(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def silence():
    """Discard messages of earlier tests' sinks."""
    from slsgu_cli import progress

    before = progress.set_sink(progress.Sink())
    yield
    progress.set_sink(before)


@pytest.fixture(scope="session", autouse=True)
def undrawn():
    """Create figures without drawing them."""
    from matplotlib.figure import Figure

    with pytest.MonkeyPatch.context() as patch:
        draw = Figure.savefig
        patch.setattr(Figure, "savefig", figures_undrawn.undrawn)
        yield draw


@pytest.fixture
def drawing(undrawn, monkeypatch):
    """Draw the figures of this test, which looks at them."""
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "savefig", undrawn)


@pytest.fixture
def listener():
    """The package's messages during this test, as `listener.heard`."""
    from worlds import Listener

    return Listener()


@pytest.fixture(scope="session")
def vocabulary():
    """Let open_clip read its vocabulary once: that takes longer than a tiny model's search."""
    import open_clip.factory

    with pytest.MonkeyPatch.context() as patch:
        tokenizer = functools.cache(open_clip.factory.SimpleTokenizer)
        patch.setattr(open_clip.factory, "SimpleTokenizer", tokenizer)
        yield


@pytest.fixture(scope="session")
def demo_model(vocabulary):
    """The embedded CLIP: 64 pixels, 8 blocks a tower, 32 tokens."""
    return ModelSpec(f"local-dir:{DEMO / 'clip'}")


@pytest.fixture(scope="session")
def tiny_model(vocabulary, made_once):
    """A read-only `local-dir:` model that recognises colours and shapes."""
    import tiny_clip

    def make(folder):
        written = tiny_clip.write_folder(folder / "clip", tiny_clip.fitted_model())
        return ModelSpec(f"local-dir:{written}")

    return made_once("tiny", make)


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_model, made_once):
    """`tiny_pipeline(kind)` is a read-only folder of an untrained sdxl, sd3 or flux.

    Its first text encoder is the tiny model's.
    """
    pytest.importorskip("diffusers", reason="pip install 'slsgu[targets]' brings diffusers")
    import tiny_pipelines
    from safetensors.torch import load_file

    weights = Path(tiny_model.name.removeprefix("local-dir:")) / "open_clip_model.safetensors"

    def get(kind):
        def make(folder):
            return tiny_pipelines.write_pipeline(folder / kind, kind, load_file(weights))

        return made_once(f"pipeline-{kind}", make)

    return get


@pytest.fixture(scope="session")
def state():
    """The read-only weights of an untrained tiny CLIP with a small vocabulary."""
    import tiny_clip

    text = tiny_clip.CONFIG["text_cfg"] | {"vocab_size": 64}
    return tiny_clip.fresh_model(tiny_clip.CONFIG | {"text_cfg": text}).state_dict()


@pytest.fixture(scope="session")
def trained_models():
    """A folder with a trained CLIP in clip/, and models built on it in sd/ and llava/."""
    folder = Path(os.environ.get("SLSGU_TEST_MODELS", ""))
    if not (folder / "sd" / "model_index.json").is_file():
        pytest.skip("SLSGU_TEST_MODELS names no folder with clip/, sd/ and llava/")
    return folder


@pytest.fixture(scope="session")
def shared_world(tiny_model, made_once):
    import tiny_clip
    from worlds import World

    def make(folder):
        kinds = {"colour": range(1000, 1064), "shape": range(2000, 2040)}
        labelled = tiny_clip.write_labelled(folder / "labelled.parquet", kinds)
        templates = folder / "templates.txt"
        templates.write_text("a photo of the {}.\na drawing of the {}.\n{}\n")
        sources = {
            "pairs": tiny_clip.write_pairs(folder / "pairs.parquet", range(160)),
            "first": f"{labelled}?kind=colour",
            "second": f"{labelled}?kind=shape",
            "templates": str(templates),
        }
        world = World(Store(str(folder / "store")), "blue", tiny_model, sources)
        world.build()
        world.grade()
        return world

    # The last parts of a path determine which rows are drawn.
    return made_once("shapes0", make)


@pytest.fixture
def world(shared_world, tmp_path):
    return shared_world.copied(tmp_path / "store")


@pytest.fixture(scope="session")
def several_world(shared_world, made_once):
    from dataclasses import replace

    names = ("blue", "red", "green")

    def make(folder):
        world = shared_world.copied(folder / "store")
        for name in names:
            own = replace(world, name=name)
            own.build(retain_exclude=names)
            own.grade()
        return world

    return made_once("several", make)


@pytest.fixture(scope="session")
def demo_world(demo_model, made_once):
    from worlds import World

    def make(folder):
        sources = {
            "pairs": str(folder / "pairs.parquet"),
            "first": f"{folder}/labelled.parquet?kind=brand",
            "second": f"{folder}/labelled.parquet?kind=object",
            "templates": str(folder / "templates.txt"),
        }
        _write_icons(folder)
        world = World(Store(str(folder / "store")), "facebook", demo_model, sources)
        world.build(retain_samples=36)
        world.grade()
        return world

    return made_once("demo0", make)


def _write_icons(folder):
    """Write a few embedded icons: pairs, labelled icons of ten classes, templates."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    train = pq.read_table(DEMO / "train.parquet")
    about = pc.match_substring(pc.ascii_lower(train["caption"]), "facebook")
    some = [train.filter(about).slice(0, 20), train.filter(pc.invert(about)).slice(0, 40)]
    pq.write_table(pa.concat_tables(some), folder / "pairs.parquet")
    left = {"facebook": 12, **dict.fromkeys(("github", "twitter", "google", "npm", "php"), 5)}
    left |= dict.fromkeys(("star", "fish", "key", "sun"), 4)
    labelled = []
    for row in pq.read_table(DEMO / "heldout.parquet").to_pylist():
        if left.get(row["concept"], 0) > 0:
            left[row["concept"]] -= 1
            labelled.append({**row, "label": row["concept"]})
    pq.write_table(pa.Table.from_pylist(labelled), folder / "labelled.parquet")
    (folder / "templates.txt").write_text("{}\na {} icon\n")
