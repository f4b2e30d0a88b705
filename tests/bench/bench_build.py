"""Compare the decoding of build-sets with a plain multiprocess PIL loop, side by side.

    python tests/bench/bench_build.py --images 1500

Both read the same tar shards of 512 x 384 JPEG files with captions and make uint8 images of
224 x 224 by open_clip's resize and crop. The files have the spectrum and the size (about 65 kB)
of photographs. The plain loop, one process a core and one shard at a time, only counts the
images; a second loop saves them, one array a shard. slsgu also matches captions, draws rows by
seed, tokenizes, and writes its blocks. Start-up is not counted.
"""

import argparse
import functools
import io
import json
import multiprocessing
import os
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from synthetic import random_model

from slsgu_cli.clip.decoding import Decoded, decode_in_order, decoder
from slsgu_cli.clip.models import resolve
from slsgu_cli.clip.tokenizers import input_spec
from slsgu_cli.records.options import BuildRequest
from slsgu_cli.sets.build import build_sets
from slsgu_cli.store.store import Store

SIZE = 224


def plain_decode(shard: str, keep: bool = False) -> int:
    """Decode a shard's images, resize the shorter side to SIZE and crop the centre."""
    kept, count = [], 0
    with tarfile.open(shard, "r|") as tar:
        for member in tar:
            if not member.name.endswith(".jpg"):
                continue
            with Image.open(io.BytesIO(tar.extractfile(member).read())) as image:
                image = image.convert("RGB")
                scale = SIZE / min(image.size)
                width, height = (max(SIZE, round(side * scale)) for side in image.size)
                image = image.resize((width, height), Image.Resampling.BICUBIC)
                left, top = (width - SIZE) // 2, (height - SIZE) // 2
                pixels = np.asarray(image.crop((left, top, left + SIZE, top + SIZE)))
                count += bool(pixels.size)
                if keep:
                    kept.append(pixels)
    if keep:
        np.save(f"{shard}.npy", np.stack(kept))
    return count


def decoding_rate(shards: list[str], decode: Callable[[bytes], Decoded]) -> float:
    """Return the images a second of slsgu's decoding alone, reading of tar shards included."""
    start, count = time.perf_counter(), 0
    for _ in decode_in_order(encoded_images(shards), decode):
        count += 1
    return count / (time.perf_counter() - start)


def encoded_images(shards: list[str]) -> Iterator[tuple[str, bytes]]:
    """Yield the images of all shards in order."""
    for shard in shards:
        with tarfile.open(shard, "r|") as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    yield member.name, tar.extractfile(member).read()


def write_shards(folder: Path, images: int) -> list[str]:
    """Write tar shards of 250 images and captions, as img2dataset names them."""
    shards = []
    for start in range(0, images, 250):
        path = folder / f"{start // 250:05}.tar"
        with tarfile.open(path, "w") as tar:
            for index in range(start, min(start + 250, images)):
                picture = io.BytesIO()
                Image.fromarray(photo_like(index)).save(picture, "JPEG", quality=90)
                caption = b"a photo of a castle" if index < 16 else f"picture {index}".encode()
                for suffix, data in (("jpg", picture.getvalue()), ("txt", caption)):
                    member = tarfile.TarInfo(f"{index:09}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        shards.append(str(path))
    return shards


def photo_like(seed: int, height: int = 384, width: int = 512) -> np.ndarray:
    """Return noise, uint8 (height, width, 3), with the spectrum of photographs."""
    white = np.random.default_rng(seed).normal(size=(4, height, width))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = 1 / max(height, width)
    smooth = np.fft.irfft2(np.fft.rfft2(white) / frequency**1.4, s=(height, width))
    smooth /= smooth.std(axis=(1, 2), keepdims=True)
    light, tint = smooth[0], smooth[1:]
    return np.clip(128 + 50 * (light + 0.3 * tint), 0, 255).astype(np.uint8).transpose(1, 2, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shards = write_shards(folder, args.images)
        model = random_model(folder / "model", "ViT-B-32")
        decode = decoder(input_spec(resolve(model)))
        rates: dict[str, list[float]] = {"plain": [], "saving": [], "decoding": [], "ours": []}
        with multiprocessing.get_context("spawn").Pool(cores) as pool:
            pool.map(plain_decode, shards[:cores], chunksize=1)
            for _ in range(args.rounds):
                # Both write new files: overwriting would reuse cached pages.
                for saved in folder.glob("*.npy"):
                    saved.unlink()
                shutil.rmtree(folder / "store", ignore_errors=True)
                for name, decode_shard in (
                    ("plain", plain_decode),
                    ("saving", functools.partial(plain_decode, keep=True)),
                ):
                    start = time.perf_counter()
                    pool.map(decode_shard, shards, chunksize=1)
                    rates[name].append(args.images / (time.perf_counter() - start))
                rates["decoding"].append(decoding_rate(shards, decode))
                request = BuildRequest(
                    name="castle",
                    concept="castle",
                    model=model,
                    sources=shards,
                    retain_samples=args.images - 16,
                )
                start = time.perf_counter()
                build_sets(Store(f"{folder}/store"), request)
                rates["ours"].append(args.images / (time.perf_counter() - start))

    def ratio(rate: str, to: str) -> float:
        """Return the median over the rounds, which other load disturbs least."""
        pairs = zip(rates[rate], rates[to], strict=True)
        return round(statistics.median(ours / other for ours, other in pairs), 2)

    middle = {name: round(statistics.median(found)) for name, found in rates.items()}
    figures = {
        "cores": cores,
        "plain loop, images/s": middle["plain"],
        "plain loop that saves, images/s": middle["saving"],
        "decoding alone, images/s": middle["decoding"],
        "build-sets, images/s": middle["ours"],
        "decoding alone / plain": ratio("decoding", "plain"),
        "build-sets / plain": ratio("ours", "plain"),
        "build-sets / plain that saves": ratio("ours", "saving"),
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
