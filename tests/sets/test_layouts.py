"""Sets are the same in whatever layout their rows lie: each is built from the embedded icons."""

import csv
import io
import json
import tarfile
from collections import Counter
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from places import DEMO
from tiny_images import write_folder, write_parquet, write_tar

from slsgu_cli.records.options import BuildRequest
from slsgu_cli.records.sets import InputSpec, ModelSpec
from slsgu_cli.sets.build import build_sets
from slsgu_cli.sets.context import BuildContext
from slsgu_cli.sets.evaluation_sets import plan_eval
from slsgu_cli.sources.opening import fetch, open_sources, scan
from slsgu_cli.sources.reader import Columns
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.store import Store

CLIP = ModelSpec(f"local-dir:{DEMO / 'clip'}")
SPEC = InputSpec(64, 64, (0.5,) * 3, (0.5,) * 3, "bicubic", "shortest", 0, "", 32)
TABLE = {"image": "file", "text": "caption", "label": "label"}
NAMES = ("facebook", "github", "npm")

pytestmark = pytest.mark.usefixtures("one_tokenizer")


@pytest.fixture(scope="module")
def icons():
    """Four icons of each of three brands, by file name."""
    rows = pq.read_table(DEMO / "train.parquet", columns=["image", "caption", "concept"])
    listed = rows.to_pylist()
    some = [row for name in NAMES for row in [r for r in listed if r["concept"] == name][:4]]
    return [
        {
            "file": f"{number:03}.png",
            "image": row["image"],
            "caption": row["caption"],
            "label": row["concept"],
        }
        for number, row in enumerate(some)
    ]


@dataclass
class Layout:
    """A source of all rows, with captions or labels or both, and how its classes are named."""

    source: str
    captions: bool = True
    labels: bool = True
    options: dict = field(default_factory=dict)


def images(folder, icons, *, prefix=""):
    return write_folder(folder, {prefix + icon["file"]: icon["image"] for icon in icons})


def text_table(path, icons, columns, delimiter=","):
    """Write a table of `columns`: by their name, what of an icon they hold."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(columns)
        writer.writerows([[icon[what] for what in columns.values()] for icon in icons])
    return str(path)


def lines(path, icons, columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    records = ({name: icon[what] for name, what in columns.items()} for icon in icons)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def csv_table(at, icons):
    images(at, icons)
    return Layout(text_table(at / "t.csv", icons, TABLE))


def tsv_of_other_columns(at, icons):
    images(at / "elsewhere", icons)
    columns = {"where": "file", "words": "caption", "what": "label"}
    table = text_table(at / "t.tsv", icons, columns, "\t")
    named = {"image_column": "where", "caption_column": "words", "label_column": "what"}
    return Layout(f"{table}?images={at}/elsewhere", options=named)


def open_clip_csv(at, icons):
    """As open_clip's `--dataset-type csv` takes it: tabs, and whole paths."""
    images(at / "far", icons)
    icons = [{**icon, "file": f"{at}/far/{icon['file']}"} for icon in icons]
    table = text_table(at / "train.csv", icons, {"filepath": "file", "title": "caption"}, "\t")
    return Layout(table, labels=False)


def json_lines(at, icons):
    images(at / "images", icons)
    icons = [{**icon, "file": f"images/{icon['file']}"} for icon in icons]
    return Layout(lines(at / "t.jsonl", icons, TABLE))


def json_list(at, icons):
    images(at, icons)
    records = [{"image": i["file"], "caption": i["caption"], "label": i["label"]} for i in icons]
    (at / "t.json").write_text(json.dumps(records))
    return Layout(f"{at}/t.json")


def parquet_of_paths(at, icons):
    images(at, icons)
    rows = [{"file_name": i["file"], "text": i["caption"], "class": i["label"]} for i in icons]
    return Layout(write_parquet(at / "t.parquet", rows, group=5))


def coco_captions(at, icons):
    images(at / "val2017", icons)
    (at / "annotations").mkdir()
    files = [{"id": 7 * n, "file_name": icon["file"]} for n, icon in enumerate(icons)]
    notes = [{"id": n, "image_id": 7 * n, "caption": i["caption"]} for n, i in enumerate(icons)]
    table = at / "annotations/captions_val2017.json"
    table.write_text(json.dumps({"info": {}, "images": files, "annotations": notes}))
    return Layout(str(table), labels=False)


def celeba(at, icons):
    """As CelebA is unpacked: numbers for people, a file of splits, images in a folder."""
    images(at / "Img/img_align_celeba", icons)
    numbers = "".join(f"{i['file']} {10 + NAMES.index(i['label'])}\n" for i in icons)
    extra = "left_out.png 10\n"
    splits = "".join(f"{icon['file']} 2\n" for icon in icons) + "left_out.png 0\n"
    write_folder(
        at,
        {
            "Anno/identity_CelebA.txt": numbers + extra,
            "Eval/list_eval_partition.txt": splits,
            "names.tsv": "".join(f"{10 + n}\t{name}\n" for n, name in enumerate(NAMES)),
            "Img/img_align_celeba/left_out.png": b"no image",
        },
    )
    source = f"{at}/Anno/identity_CelebA.txt?split=test"
    return Layout(source, captions=False, options={"classes": {"e": f"{at}/names.tsv"}})


def imagefolder_csv(at, icons):
    for split, some in (("train", icons[:7]), ("test", icons[7:])):
        images(at / split, some)
        columns = {"file_name": "file", "text": "caption", "label": "label"}
        text_table(at / split / "metadata.csv", some, columns)
    return Layout(str(at))


def imagefolder_jsonl_of_class_folders(at, icons):
    icons = [{**icon, "file": f"{icon['label']}/{icon['file']}"} for icon in icons]
    images(at, icons)
    lines(at / "metadata.jsonl", icons, {"file_name": "file", "caption": "caption"})
    return Layout(str(at))


def hugging_face(icons):
    """A table as datasets has it: images as structs, labels as numbers that have names."""
    features = {
        "image": {"_type": "Image"},
        "text": {"dtype": "string", "_type": "Value"},
        "label": {"names": list(NAMES), "_type": "ClassLabel"},
    }
    table = pa.table(
        {
            "image": pa.array(
                [{"bytes": icon["image"], "path": None} for icon in icons],
                pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
            ),
            "text": [icon["caption"] for icon in icons],
            "label": [NAMES.index(icon["label"]) for icon in icons],
        }
    )
    return table.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )


def class_label_parquet(at, icons):
    pq.write_table(hugging_face(icons), at / "train.parquet", row_group_size=5)
    return Layout(f"{at}/train.parquet")


def save_to_disk(at, icons, *, stream=True):
    """Two files of rows, and one that `map` left there."""
    table, files = hugging_face(icons), ("data-0-of-2.arrow", "data-1-of-2.arrow")
    folder = at / "train"
    folder.mkdir()
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    parts = (table.slice(0, 5), table.slice(5), table)
    for name, part in zip((*files, "cache-1.arrow"), parts, strict=True):
        with new(folder / name, table.schema) as writer:
            writer.write_table(part, max_chunksize=3)
    state = {"_data_files": [{"filename": name} for name in files], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (at / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    return Layout(str(at))


def arrow_files(at, icons):
    save_to_disk(at, icons, stream=False)
    return Layout(f"{at}/train/data-*.arrow")


def tar_of(icons, mode="w"):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as tar:
        for icon in icons:
            member = tarfile.TarInfo(icon["file"].replace(".png", ".JPEG"))
            member.size = len(icon["image"])
            tar.addfile(member, io.BytesIO(icon["image"]))
    return file.getvalue()


def imagenet_val(at, icons):
    """A tar of images, in no order, and a label a line for them in the order of their names."""
    (at / "val.tar").write_bytes(tar_of(icons[::-1]))
    (at / "labels.txt").write_text("".join(f"{icon['label']}\n" for icon in icons))
    return Layout(f"{at}/labels.txt?images={at}/val.tar", captions=False)


def imagenet_val_of_names(at, icons):
    (at / "val.tar.gz").write_bytes(tar_of(icons[::-1], "w:gz"))
    text = "".join(f"{i['file'].replace('png', 'JPEG')} {NAMES.index(i['label'])}\n" for i in icons)
    write_folder(at, {"val.txt": text, "names.txt": "\n".join(NAMES)})
    classes = {"classes": {"e": f"{at}/names.txt"}}
    return Layout(f"{at}/val.txt?images={at}/val.tar.gz", captions=False, options=classes)


def imagenet_train(at, icons, *, name="train.tar", mode="w"):
    """A tar of a tar for each class."""
    inner = [(f"{label}.tar", tar_of([i for i in icons if i["label"] == label])) for label in NAMES]
    return Layout(write_tar(at / name, inner, mode), captions=False)


def imagenet_train_compressed(at, icons):
    return imagenet_train(at, icons, name="train.tar.gz", mode="w:gz")


LAYOUTS = (
    csv_table,
    tsv_of_other_columns,
    open_clip_csv,
    json_lines,
    json_list,
    parquet_of_paths,
    coco_captions,
    celeba,
    imagefolder_csv,
    imagefolder_jsonl_of_class_folders,
    class_label_parquet,
    save_to_disk,
    arrow_files,
    imagenet_val,
    imagenet_val_of_names,
    imagenet_train,
    imagenet_train_compressed,
)


def build(at, source, **options):
    options = {"name": "facebook", "retain_samples": 100} | options
    store = Store(str(at / "store"))
    manifest = build_sets(store, BuildRequest(model=CLIP, sources=[source], **options))
    return {part: DataBlock.open(store, ref) for part, ref in manifest.blocks().items()}


def content(block):
    """Return what a block's rows are: the image, its pixels, and the caption or the class."""
    classes = block.class_names
    words = [
        classes[label] if classes else caption
        for caption, label in zip(block.captions, block.labels, strict=True)
    ]
    pixels = [image.tobytes() for image in block.images(0, block.rows)]
    sources = [row.tobytes() for row in block.source_digests]
    return sorted(zip(sources, pixels, words, strict=True))


def captioned(source, **columns):
    """Return every row's image and caption."""
    readers = open_sources([source], Columns(needs=frozenset(["caption"]), **columns))
    captions = {(at, row.index): readers[at].caption(row) for at, row in scan(readers, Counter())}
    return [(data, captions[place]) for place, data in fetch(readers, dict.fromkeys(captions))]


def labelled(at, source, classes=None, **columns):
    """Return every row's image and class, as an evaluation set has them."""
    readers = open_sources([source], Columns(needs=frozenset(["label"]), **columns))
    context = BuildContext(Store(str(at / "store")), SPEC, len, len)
    request = BuildRequest(
        name="e", classes={"e": classes} if classes else {}, label_column=columns.get("label")
    )
    plan = plan_eval(context, request, "e", source=source, readers=readers)
    images = fetch(readers, dict.fromkeys(plan.rows))
    return [(data, plan.class_names[plan.rows[place][1]]) for place, data in images]


def written(layout, icons, at):
    at.mkdir()
    return layout(at, icons)


@pytest.fixture(scope="module")
def plain(icons, tmp_path_factory):
    """One parquet file of the icons with their images."""
    rows = [{"image": i["image"], "caption": i["caption"], "label": i["label"]} for i in icons]
    return write_parquet(tmp_path_factory.mktemp("plain") / "icons.parquet", rows)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_reads_as_parquet_does(layout, icons, plain, tmp_path):
    made = written(layout, icons, tmp_path / "data")
    columns = {what: made.options.get(f"{what}_column") for what in ("image", "caption", "label")}
    if made.captions:
        given = captioned(made.source, image=columns["image"], caption=columns["caption"])
        assert sorted(given) == sorted(captioned(plain))
        assert len(given) == 12
    if made.labels:
        classes = made.options.get("classes", {}).get("e")
        named = {"image": columns["image"], "label": columns["label"]}
        given = labelled(tmp_path, made.source, classes, **named)
        assert sorted(given) == sorted(labelled(tmp_path, plain))
        assert Counter(label for _, label in given) == dict.fromkeys(NAMES, 4)


@pytest.mark.parametrize("layout", [open_clip_csv, save_to_disk])
def test_sets_are_built_alike_of_every_layout(layout, icons, plain, tmp_path):
    made = written(layout, icons, tmp_path / "data")
    evals = {"e": made.source} if made.labels else {}
    blocks = build(tmp_path, made.source, evals=evals)
    expected = build(tmp_path, plain, evals={"e": plain})
    assert [expected[part].rows for part in ("forget", "retain", "e")] == [4, 8, 12]
    assert {p: content(b) for p, b in blocks.items()} == {p: content(expected[p]) for p in blocks}
