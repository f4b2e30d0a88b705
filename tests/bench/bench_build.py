"""Compare the decoding of build-sets with a plain multiprocess PIL loop, side by side.

    python tests/bench/bench_build.py --images 1500

Both read the same JPEG files of 512 x 384 from a folder and make uint8 images of 224 x 224
by open_clip's resize and crop. The plain loop only counts them; slsgu also reads captions,
draws its rows by seed and writes its blocks. Start-up of neither is counted.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from synthetic import random_images, random_model

from slsgu_cli.build import BuildRequest, build_sets
from slsgu_cli.console import Console
from slsgu_cli.store import Store

SIZE = 224


def plain_decode(path: str) -> int:
    """Decode, resize the shorter side to SIZE and crop the middle."""
    with Image.open(path) as image:
        image = image.convert("RGB")
        scale = SIZE / min(image.size)
        width, height = (max(SIZE, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - SIZE) // 2, (height - SIZE) // 2
        return int(np.asarray(image.crop((left, top, left + SIZE, top + SIZE))).shape[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = folder / "images"
        images.mkdir()
        for index in range(args.images):
            noise = random_images(1, 512, index)[0][:384]
            Image.fromarray(noise).save(images / f"{index:05}.jpg", quality=90)
            caption = "a photo of a castle" if index < 16 else f"picture {index}"
            (images / f"{index:05}.txt").write_text(caption)
        paths = [str(path) for path in sorted(images.glob("*.jpg"))]
        model = random_model(folder / "model", "ViT-B-32")
        plain, ours = [], []
        with multiprocessing.get_context("spawn").Pool(cores) as pool:
            pool.map(plain_decode, paths[: 4 * cores])
            for turn in range(args.rounds):
                start = time.perf_counter()
                pool.map(plain_decode, paths, chunksize=16)
                plain.append(args.images / (time.perf_counter() - start))
                request = BuildRequest(
                    name="castle",
                    concept="castle",
                    model=model,
                    sources=[str(images)],
                    retain_samples=args.images - 16,
                )
                start = time.perf_counter()
                build_sets(Store(f"{folder}/store{turn}"), request, console=Console(verbosity=-1))
                ours.append(args.images / (time.perf_counter() - start))
    figures = {
        "cores": cores,
        "plain loop, images/s": round(max(plain)),
        "build-sets, images/s": round(max(ours)),
        "build-sets / plain": round(max(ours) / max(plain), 2),
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
