"""Tables of paths: what is odd in them is counted, and what cannot be read is said."""

import json
from collections import Counter

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_images import encoded, write_folder, write_parquet, write_tar
from worlds import Listener

from slsgu_cli.errors import InputError, MissingError
from slsgu_cli.sources.opening import fetch, open_sources, scan
from slsgu_cli.sources.reader import Columns

NEEDS = Columns(needs=frozenset(["caption"]))


def read(source, columns=NEEDS):
    """Return the rows, what was counted, and the images."""
    trouble, readers = Counter(), open_sources([str(source)], columns)
    rows = [row for _, row in scan(readers, trouble)]
    images = {at: data for (_, at), data in fetch(readers, {(0, r.index): None for r in rows})}
    return rows, trouble, images


def table(folder, text, name="t.csv", images=("a.png", "b.png")):
    write_folder(folder, {name: text, **dict.fromkeys(images, b"1")})
    return folder / name


def test_malformed_rows_are_counted(tmp_path):
    text = 'path,caption\na.png,"one, with a comma"\na.png,one, with a comma\n\nb.png,two\nc.png\n'
    text += f"b.png,{'x' * 70000}\n" + f'b.png,"{"x" * 140000}"\n' + 'b.png,"two\nlines"\n'
    rows, trouble, _ = read(table(tmp_path, text))
    assert [(row.index, row.caption) for row in rows] == [
        (0, "one, with a comma"),
        (2, "two"),
        (6, "two\nlines"),
    ]
    assert trouble == {"not a value for each column": 2, "oversized file": 2}


def test_lines_without_json_are_counted(tmp_path):
    lines = [{"image": "a.png", "text": "one"}, ["a.png"], {"text": "no image"}]
    text = "".join(json.dumps(line) + "\n" for line in lines) + "{broken\n" + "[" * 100_000 + "\n"
    rows, trouble, images = read(table(tmp_path, text, "t.jsonl"))
    assert [(row.index, row.caption, row.has_image) for row in rows] == [
        (0, "one", True),
        (2, "no image", False),
    ]
    assert trouble == {"not a JSON object": 3}
    assert images[0] == b"1"


def test_a_warning_names_the_first_row_with_a_missing_image(tmp_path):
    listener = Listener()
    path = table(tmp_path, "path,caption\na.png,one\nc.png,two\nb.png,three\n../d.png,four\n")
    rows, _, images = read(path)
    assert [row.key for row in rows] == ["a", "c", "b", "../d"]
    assert images == {0: b"1", 1: None, 2: b"1", 3: None}
    (warning,) = listener.heard
    assert f"t.csv, row 2: its image {tmp_path}/c.png does not exist" in warning


@pytest.mark.parametrize("rows", [1, 40])
def test_a_table_whose_images_lie_elsewhere_is_refused_before_the_work(tmp_path, rows):
    path = table(tmp_path, "path,caption\n" + "img/a.png,one\n" * rows)
    with pytest.raises(InputError, match=rf"row 1: its image {tmp_path}/img/a\.png") as caught:
        read(path)
    assert "?images=FOLDER" in caught.value.hint
    write_folder(tmp_path / "img", {"a.png": encoded(1)})
    assert len(read(path)[0]) == rows


@pytest.mark.parametrize(
    ("text", "columns", "message", "hint"),
    [
        (
            "url,caption\nu,c\n",
            NEEDS,
            "no image column; its columns are: url, caption",
            "--metadata",
        ),
        ("path,title,x\na.png,c,1\n", Columns(caption="y"), "no column y; .*: path, title, x", ""),
        ("path,x\na.png,c\n", NEEDS, "no caption column; its columns are: path, x", "--caption-"),
        ("path,x\na.png,c\n", Columns(needs=frozenset(["label"])), "no label column", "--label-"),
        (
            "path,text\nhttp://x/a.png,c\n",
            NEEDS,
            "row 1: its image http://x/a.png is a URL, not a path",
            "--metadata",
        ),
        ("", NEEDS, "no image column; its columns are: none", "--image-column"),
    ],
)
def test_missing_columns_and_images_are_errors(tmp_path, text, columns, message, hint):
    with pytest.raises(InputError, match=message) as caught:
        read(table(tmp_path, text), columns)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.json", "{", "cannot be read as JSON"),
        (
            "t.json",
            '{"features": 1}',
            "neither a list of records nor COCO captions: it has features",
        ),
        ("t.json", '{"images": [], "annotations": [{"id": 1}]}', "does not have COCO's format"),
        ("t.txt", "490\n361\n", "has only numbers"),
        ("t.txt", "n01440764\nn01443537\nn01440764\n", "has 3 labels for 2 images"),
    ],
)
def test_malformed_tables_are_errors(tmp_path, name, text, message):
    with pytest.raises(InputError, match=message):
        read(table(tmp_path, text, name), Columns())


def test_images_may_be_in_another_folder_that_must_exist(tmp_path):
    path = table(tmp_path, "path,caption\na.png,one\n", images=())
    tar = write_tar(tmp_path / "far" / "i.tar", [("./a.png", b"2"), ("a.txt", b"")])
    write_folder(tmp_path / "far", {"a.png": b"3"})
    assert read(f"{path}?images={tar}")[2] == {0: b"2"}
    assert read(f"{path}?images={tmp_path}/far")[2] == {0: b"3"}
    assert read(f"{path}?images={tmp_path}/far&caption=other")[0] == []
    with pytest.raises(MissingError, match="images= names nowhere, which does not exist"):
        read(f"{path}?images=nowhere")


def test_tables_of_remote_file_systems_and_their_images(tmp_path):
    fs = fsspec.filesystem("memory")
    fs.pipe({"/tables/t.csv": b"path,caption\ni/a.png,one\n", "/tables/i/a.png": b"1"})
    try:
        assert read("memory://tables/t.csv")[2] == {0: b"1"}
    finally:
        fs.rm("/tables", recursive=True)


def test_identity_follows_the_images(tmp_path):
    (reader,) = open_sources([str(table(tmp_path, "path,caption\na.png,one\n"))], NEEDS)
    first = reader.identity()
    assert first == reader.identity()
    write_folder(tmp_path, {"a.png": b"another"})
    assert first != reader.identity()


def test_only_images_of_usual_files_are_read(tmp_path):
    path = table(tmp_path, "path,caption\na.png,one\n/dev/zero,two\n.,three\na\0b,four\n")
    with path.open("a") as file:
        file.write(f"{'a' * 300},five\nzip::a.png,six\nmemory://a.png,seven\n")
    assert read(path)[2] == {0: b"1"} | dict.fromkeys(range(1, 7))


def test_two_tables_in_an_imagefolder_are_an_error(tmp_path):
    write_folder(tmp_path, {"metadata.csv": "", "metadata.jsonl": ""})
    with pytest.raises(InputError, match=r"metadata\.csv and metadata\.jsonl"):
        read(tmp_path)


def test_an_error_for_a_folder_without_images_names_its_sources(tmp_path):
    write_parquet(tmp_path / "hub/data/train-0.parquet", [{"image": b"1"}])
    with pytest.raises(InputError, match="there are no images in") as caught:
        read(tmp_path / "hub")
    assert "hub/data/train-0.parquet" in caught.value.hint


def test_saved_datasets_are_read_as_saved(tmp_path):
    write_folder(tmp_path, {"state.json": '{"_data_files": [{"filename": "../x.arrow"}]}'})
    with pytest.raises(InputError, match=r"has no \.\./x\.arrow, which state\.json lists"):
        read(tmp_path)
    write_folder(tmp_path, {"state.json": '{"_indices_data_files": [{"filename": "i.arrow"}]}'})
    with pytest.raises(InputError, match="rows chosen by an index"):
        read(tmp_path)
    write_folder(tmp_path, {"x.arrow": b"no arrow at all"})
    with pytest.raises(InputError, match="cannot be read as an Arrow file"):
        read(tmp_path / "x.arrow")


def classes(path, feature, values):
    """Write a parquet file whose labels are numbers, with what Hugging Face says of them."""
    table = pa.table({"image": [b"1"] * len(values), "label": values})
    said = {"info": {"features": {"label": feature}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(said)}), path)
    return str(path)


def test_numbers_of_classes_have_their_names(tmp_path):
    path = classes(tmp_path / "a.parquet", {"names": ["cat", "dog"]}, [1, 0, -1, 2, None])
    rows, _, _ = read(path, Columns())
    told = [("dog", "1"), ("cat", "0"), (None, None), (None, None), (None, None)]
    assert [(row.label, row.number) for row in rows] == told
    for value in ("dog", "1"):
        assert [row.index for row in read(f"{path}?label={value}", Columns())[0]] == [0]
    plain = classes(tmp_path / "b.parquet", {"names": ["cat", "mouse"]}, [1])
    identities = [open_sources([each], NEEDS)[0].identity()[-1] for each in (path, plain)]
    assert identities == [{"label": ["cat", "dog"]}, {"label": ["cat", "mouse"]}]


def test_lists_of_classes_take_the_first(tmp_path):
    path = classes(tmp_path / "a.parquet", {"feature": {"names": ["cat", "dog"]}}, [[1, 0], []])
    assert [row.label for row in read(path, Columns())[0]] == ["dog", None]


def test_an_arrow_file_of_images_alone(tmp_path):
    table = pa.table({"image": [b"1" * 70_000, None, b"3"]})
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    rows, trouble, images = read(tmp_path / "a.arrow", Columns())
    assert [row.key for row in rows] == ["a:0", "a:1", "a:2"]
    assert not trouble
    assert images == {0: b"1" * 70_000, 1: None, 2: b"3"}


def test_structs_without_bytes_name_files(tmp_path):
    write_folder(tmp_path, {"a.png": b"1"})
    rows = [{"image": {"bytes": None, "path": "a.png"}}, {"image": {"bytes": b"2", "path": "b"}}]
    assert read(write_parquet(tmp_path / "a.parquet", rows), Columns())[2] == {0: b"1", 1: b"2"}
