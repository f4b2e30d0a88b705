import os
from collections import Counter

import fsspec
import pytest
from tiny_images import encoded, write_folder

from slsgu_cli.errors import InputError
from slsgu_cli.sources.folder import FolderSource
from slsgu_cli.sources.reader import Columns


def rows(path, filters=None):
    return list(FolderSource(str(path), Columns(), filters or {}).rows(Counter()))


def test_captions_and_class_folders(tmp_path):
    write_folder(
        tmp_path,
        {
            "top.JPG": b"1",
            "top.txt": " a caption\n",
            "alone.png": b"2",
            "dog/b.webp": b"4",
            "dog/a.png": b"3",
            "dog/a.txt": "",
            "dog/deep/c.png": b"5",
            ".hidden/x.png": b"6",
            ".x.png": b"7",
            "notes.md": "no image",
        },
    )
    found = [(row.index, row.key, row.caption, row.label) for row in rows(tmp_path)]
    assert found == [
        (0, "alone", None, None),
        (1, "top", "a caption", None),
        (2, "dog/a", None, "dog"),
        (3, "dog/b", None, "dog"),
        (4, "dog/deep/c", None, "dog"),
    ]
    assert [
        data for _, data in FolderSource(str(tmp_path), Columns(), {}).images(dict.fromkeys([1, 4]))
    ] == [
        b"1",
        b"5",
    ]


def test_large_files_are_counted_and_pipes_and_dangling_links_ignored(tmp_path):
    write_folder(tmp_path, dict.fromkeys(("a.png", "b.png", "c.png", "d/e.png"), b"1"))
    write_folder(tmp_path, {"a.txt": "a", "b.txt": "b"})
    os.truncate(tmp_path / "b.txt", (1 << 16) + 1)
    os.truncate(tmp_path / "c.png", (1 << 26) + 1)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing")
    trouble = Counter()
    source = FolderSource(str(tmp_path), Columns(), {})
    found = [(row.index, row.key) for row in source.rows(trouble)]
    assert found == [(0, "a"), (3, "d/e")]
    assert trouble == {"oversized file": 2}
    assert dict(source.images(dict.fromkeys([0, 3]))) == {0: b"1", 3: b"1"}


def test_folders_within_folders_are_read_however_deep():
    fs = fsspec.filesystem("memory")
    fs.pipe(f"/deep/{'d/' * 1200}a.png", b"1")
    try:
        assert [row.label for row in rows("memory://deep")] == ["d"]
    finally:
        fs.rm("/deep", recursive=True)


def test_filters_go_by_label(tmp_path):
    write_folder(tmp_path, {"dog/1.png": b"1", "cat/1.png": b"2"})
    assert [row.label for row in rows(tmp_path, {"label": frozenset(["dog"])})] == ["dog"]
    with pytest.raises(InputError, match="no column kind; its columns are: key, caption, label"):
        rows(tmp_path, {"kind": frozenset(["x"])})


def test_identity_follows_images_and_captions(tmp_path):
    source = FolderSource(str(tmp_path), Columns(), {})
    write_folder(tmp_path, {"1.png": encoded(1), "1.txt": "one"})
    first = source.identity()
    write_folder(tmp_path, {"1.txt": "other words"})
    second = source.identity()
    write_folder(tmp_path, {"2.png": encoded(2)})
    assert len({str(value) for value in (first, second, source.identity())}) == 3


def test_an_image_that_vanished_is_counted_as_missing(tmp_path):
    write_folder(tmp_path, {"1.png": b"1", "2.png": b"2"})
    source = FolderSource(str(tmp_path), Columns(), {})
    images = source.images(dict.fromkeys([0, 1]))
    assert next(images) == (0, b"1")
    (tmp_path / "2.png").unlink()
    assert next(images) == (1, None)
