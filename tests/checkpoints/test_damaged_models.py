"""A model whose files are damaged: the right result or one refusal, whatever loads it.

A few of many: `tests/bench/faults.py --parts models` tries as many as one likes.
"""

import random
from pathlib import Path

import pytest
from damaged_models import LAYER, Models

from slsgu_cli.checkpoints.edits import write_edit
from slsgu_cli.engine.set_edits import direct_edit
from slsgu_cli.records.directions import Direction
from slsgu_cli.records.options import RankOptions


@pytest.fixture(scope="module")
def models(shared_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    world = shared_world.copied(folder / "store")
    options = RankOptions(direction=Direction.GRADIENT)
    write_edit(
        world.store, direct_edit(world.store, "blue", layer=LAYER, step=1.0, options=options)
    )
    return Models.write(
        folder / "models",
        clip=world.folder,
        store=Path(world.store.root),
        pairs=world.sources["pairs"],
        own=False,
    )


# Those that take a second or more, on whole models.
SLOW = ("eval", "verify", "rank")


@pytest.mark.parametrize("seed", range(16))
def test_a_damaged_model_gives_its_result_or_one_refusal(models, seed):
    rng = random.Random(seed)
    layout = rng.choice(list(models.layouts.values()))
    quick = [name for name in layout.commands if not name.startswith(SLOW)]
    _, about, fine = models.outcome(rng, layout, rng.choice(quick))
    assert fine, about


@pytest.mark.parametrize(
    ("layout", "file", "content", "message"),
    [
        ("pt", "tiny.json", "5", "is not an open_clip architecture: it has no embed_dim"),
        ("pt", "tiny.json", '{"embed_dim": 8, "vision_cfg": 5, "text_cfg": {}}', "vision_cfg"),
        ("llava", "config.json", '{"model_type": "llava", "vision_feature_layer": {}}', "vision l"),
    ],
)
def test_a_configuration_with_wrong_types_is_refused(models, layout, file, content, message):
    chosen = models.layouts[layout]
    path = chosen.folder / file
    whole = path.read_bytes()
    path.write_text(content)
    try:
        done = models.run(chosen, next(iter(chosen.commands)))
    finally:
        path.write_bytes(whole)
    assert done.exit_code == 3
    assert message in done.stderr
