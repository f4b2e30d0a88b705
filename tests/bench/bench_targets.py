"""Apply edits to targets of real size and revert them: bytes, seconds, peak memory.

    python tests/bench/bench_targets.py            # all; needs 8 GB of disk
    python tests/bench/bench_targets.py llava sdxl

The models have random fp16 weights in the layouts of Stable Diffusion 1.5 and 2.1, SDXL's two
encoders, and LLaVA-1.5's tower (CLIP ViT-L/14-336), without a pipeline's other parts. `cp`
copies each of them too, in turn, for comparison. The edits change the fused query, key and value
of block 7 and the output matrix of its MLP. The run fails unless exactly their tensors change,
every other byte is the original's, and reverting restores the original. The goal: less than
300 MB.
"""

import hashlib
import json
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import apart
import numpy as np

from slsgu_cli.checkpoints.naming_schemes import NamingScheme, TowerPlace, names, tensor_places
from slsgu_cli.records.method import Tower

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
# Width, number of blocks, and width of the projection.
LARGE, HUGE, BIG = (768, 12, 768), (1024, 23, 1024), (1280, 32, 1280)
VISION = (1024, 24, 768)
# The names of tensors, by folder.
Names = set[tuple[Path, str]]


@dataclass(frozen=True)
class Made:
    """The layers to edit, and the places of their tensors."""

    layers: dict[str, np.ndarray]
    tensors: Names


def shape_of(name: str, width: int, projected: int) -> tuple[int, ...]:
    """Return the shape of the tensor with this name in open_clip."""
    sizes = {
        "token_embedding.weight": (49408, width),
        "positional_embedding": (77, width),
        "visual.positional_embedding": (577, width),
        "visual.class_embedding": (width,),
        "visual.conv1.weight": (width, 3, 14, 14),
        "text_projection": (width, projected),
        "visual.proj": (width, projected),
    }
    if name in sizes:
        return sizes[name]
    rows = {"in_proj": 3, "c_fc": 4}
    own = next((factor for part, factor in rows.items() if part in name), 1) * width
    if name.endswith("bias") or "ln_" in name:
        return (own,)
    return (own, 4 * width if "c_proj" in name else width)


def write(
    path: Path, place: TowerPlace, sizes: tuple[int, int, int], *, left_out: str, shards: int = 1
) -> Made:
    """Write a tower's random weights in its layout, layer by layer; return the layers to edit."""
    width, blocks, projected = sizes
    rng = np.random.default_rng(0)
    own = [name for name in names(place.tower, blocks) if name != left_out]
    prefix = "visual." if place.tower is Tower.VISION else ""
    wanted = {
        f"{prefix}transformer.resblocks.7.attn.in_proj_weight",
        f"{prefix}transformer.resblocks.7.mlp.c_proj.weight",
    }
    kept: dict[str, np.ndarray] = {}
    held: Names = set()
    path.parent.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        tensors: dict[str, np.ndarray] = {}
        for name in own[shard::shards]:
            values = rng.standard_normal(shape_of(name, width, projected), np.float32)
            layer = (0.02 * values).astype("<f2")
            if name in wanted:
                kept[name] = layer
                held |= {(path.parent, slot.key) for slot in tensor_places(name, place)}
            for slot in tensor_places(name, place):
                tensors[slot.key] = np.ascontiguousarray(slot.from_layer(layer))
        file = path if shards == 1 else path.with_stem(f"{path.stem}-{shard + 1:05}-of-{shards:05}")
        save(file, tensors)
    return Made(kept, held)


def save(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write fp16 tensors as a safetensors file."""
    entries, start = {}, 0
    for name, value in tensors.items():
        stop = start + value.nbytes
        entries[name] = {"dtype": "F16", "shape": value.shape, "data_offsets": [start, stop]}
        start = stop
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for value in tensors.values():
            file.write(value.tobytes())


def pipeline(folder: Path, kind: str, encoders: dict[str, tuple[int, int, int]]) -> Made:
    """Write the text encoders of a diffusers pipeline; the last one is edited."""
    index: dict[str, object] = {"_class_name": kind}
    made = Made({}, set())
    for name, sizes in encoders.items():
        second = name == "text_encoder_2"
        index[name] = ["transformers", f"CLIPTextModel{'WithProjection' if second else ''}"]
        place = TowerPlace(Tower.TEXT, NamingScheme.TRANSFORMERS, "text_model.")
        left_out = "" if second else "text_projection"
        made = write(folder / name / "model.safetensors", place, sizes, left_out=left_out)
    (folder / "model_index.json").write_text(json.dumps(index))
    return made


def llava(folder: Path) -> Made:
    """Write LLaVA-1.5's tower in two shards."""
    place = TowerPlace(Tower.VISION, NamingScheme.TRANSFORMERS, "vision_tower.vision_model.")
    folder.mkdir()
    config = {"model_type": "llava", "vision_feature_layer": -2}
    (folder / "config.json").write_text(json.dumps(config))
    return write(folder / "model.safetensors", place, VISION, left_out="visual.proj", shards=2)


def ldm(path: Path) -> Made:
    """Write the text encoder of Stable Diffusion 2.1 as a single file."""
    place = TowerPlace(Tower.TEXT, NamingScheme.OPEN_CLIP, "cond_stage_model.model.")
    return write(path, place, (1024, 24, 1024), left_out="")


CASES = {
    "sd15": ("sd", lambda p: pipeline(p, "StableDiffusionPipeline", {"text_encoder": LARGE})),
    "sd21": ("sd", lambda p: pipeline(p, "StableDiffusionPipeline", {"text_encoder": HUGE})),
    "sd21-file": ("sd.safetensors", ldm),
    "sdxl": (
        "sd",
        lambda p: pipeline(
            p, "StableDiffusionXLPipeline", {"text_encoder": LARGE, "text_encoder_2": BIG}
        ),
    ),
    "llava": ("llava", llava),
}


def digests(path: Path) -> dict[tuple[Path, str], str]:
    """Return digests of all bytes below a path: of tensors, of the bytes between, of files.

    The keys are the folder below `path`, and the name of a tensor or file.
    """
    from slsgu_cli.checkpoints.layouts import open_weights

    found = {}
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        folder = file.parent.relative_to(path if path.is_dir() else path.parent)
        if file.suffix == ".safetensors":
            opened = open_weights(file)
            with file.open("rb") as head:
                length = head.read(8)
                header = length + head.read(int.from_bytes(length, "little"))
            whole = header + str(file.stat().st_size).encode()
            found[folder, file.name] = hashlib.sha256(whole).hexdigest()
            for name in opened.entries:
                found[folder, name] = hashlib.sha256(opened.stored(name).tobytes()).hexdigest()
        elif file.is_file():
            found[folder, file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def write_edits(store: Path, layers: dict[str, np.ndarray]) -> list[str]:
    """Write an edit of each layer into a store; return their files."""
    from edit_headers import edit

    from slsgu_cli.checkpoints.edits import write_edit
    from slsgu_cli.store.store import Store

    written = []
    for number, (layer, before) in enumerate(layers.items()):
        delta = np.full(before.shape, 1e-2, np.float32)
        made = edit(layer, delta, before, name=f"edit{number}")
        written.append(str(store / write_edit(Store(str(store)), made)))
    return written


def timed(*command: str) -> tuple[float, str]:
    """Run a command after a sync; return its seconds and output."""
    subprocess.run(["sync"], check=True)
    start = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return time.perf_counter() - start, done.stdout


def apply(edits: list[str], source: Path, out: Path, *flags: str) -> tuple[float, float]:
    """Run `slsgu apply --target` in its own process; return seconds and peak MB."""
    words = ["apply", *edits, "--target", str(source), "--out", str(out), *flags]
    subprocess.run(["sync"], check=True)
    seconds, peak, _ = apart.command(*words)
    return seconds, peak["process"] / 1000


def measure(case: str, root: Path) -> str:
    """Make a model, apply the edits and revert them; return a row of the table."""
    name, make = CASES[case]
    source, plain, out, back = (root / kind / name for kind in ("a", "cp", "b", "c"))
    for path in (source, plain):
        path.parent.mkdir()
    made = make(source)
    base = source if source.is_dir() else source.parent
    wanted = {(folder.relative_to(base), key) for folder, key in made.tensors}
    edits = write_edits(root / "store", made.layers)
    copied, _ = timed("cp", "-r", str(source), str(plain))
    there, peak = apply(edits, source, out)
    again, other = apply(edits, out, back, "--revert")
    one, two, three = digests(source), digests(out), digests(back)
    two.pop((Path(), "README.md"), None)  # The model card of the copy.
    changed = {key for key in one if one[key] != two.get(key)}
    if changed != wanted or one.keys() != two.keys() or one != three:
        raise SystemExit(f"{case}: {sorted(changed)} changed, {sorted(wanted)} should have")
    size = sum(path.stat().st_size for path in [source, *source.rglob("*")] if path.is_file()) / 1e9
    return (
        f"| {case} | {size:.2f} | {len(changed)} of {len(one)} | {copied:.2f} "
        f"| {there:.2f} | {again:.2f} | {max(peak, other):.0f} |"
    )


def main() -> None:
    """Measure the models named on the command line, or all."""
    print("| model | GB | changed, of tensors and files | `cp` | `apply` | `--revert` | peak MB |")
    print("|---|---|---|---|---|---|---|")
    for case in sys.argv[1:] or CASES:
        with tempfile.TemporaryDirectory() as folder:
            print(measure(case, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
