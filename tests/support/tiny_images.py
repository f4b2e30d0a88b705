"""Tiny encoded images and sources of them, for tests of `build-sets`."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def encoded(seed: int, size: tuple[int, int] = (20, 16), *, mode: str = "RGB", kind="PNG") -> bytes:
    """Return an image that looks different for every seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def sample(seed: int, caption: str | None, **fields) -> dict:
    return {"key": f"row{seed}", "image": encoded(seed), "caption": caption, **fields}


def write_parquet(path: Path, rows: list[dict], *, group: int = 1000) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return str(path)


def write_tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def shard(path: Path, captions: list[str], *, first: int = 0) -> str:
    """Write a tar as img2dataset does: image, caption and fields per sample."""
    members = []
    for offset, caption in enumerate(captions):
        key = f"{first + offset:09d}"
        fields = {"caption": caption, "key": key, "kind": "odd" if offset % 2 else "even"}
        members += [
            (f"{key}.jpg", encoded(first + offset, kind="JPEG")),
            (f"{key}.json", json.dumps(fields).encode()),
            (f"{key}.txt", caption.encode()),
        ]
    return write_tar(path, members)


def write_folder(root: Path, files: dict[str, bytes | str]) -> str:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(root)
