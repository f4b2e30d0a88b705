"""A few of the embedded icons, in the layout of all of them."""

import pyarrow.parquet as pq
from places import DEMO


def write_few(folder, concept, *, one_in=24):
    """Write a small `slsgu_cli/demo` folder: all icons of a concept and some of the others."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("clip", "classes.json", "templates.txt"):
        (folder / name).symlink_to(DEMO / name)
    for name in ("train.parquet", "heldout.parquet"):
        icons = pq.read_table(DEMO / name)
        concepts = enumerate(icons["concept"].to_pylist())
        some = [row for row, each in concepts if each == concept or row % one_in == 0]
        pq.write_table(icons.take(some), folder / name)
    return folder
