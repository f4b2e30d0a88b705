"""Carry an edit into models of real size and out again: seconds, peak memory, and the bytes.

    python tests/bench/bench_targets.py            # all; needs 8 GB of disk
    python tests/bench/bench_targets.py llava sdxl

Random fp16 weights in the layouts of Stable Diffusion 1.5 and 2.1, SDXL, and LLaVA-1.5's
tower (CLIP ViT-L/14-336). For each, a fused and a projecting layer are edited: only the
edited tensors may differ, and the way back must end at the original bytes. The goal: less
than 300 MB.
"""

import hashlib
import json
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import numpy as np

from slsgu_cli.records import Tower
from slsgu_cli.targets.mapping import Home, Spelling, names, slots

sys.path.insert(0, str(Path(__file__).parents[1]))
# Width, blocks, and the width that it is projected to.
LARGE, HUGE, BIG = (768, 12, 768), (1024, 23, 1024), (1280, 32, 1280)
VISION = (1024, 24, 768)
TEXT_BLOCK, VISION_BLOCK = "transformer.resblocks.7.", "visual.transformer.resblocks.7."
CARRY = """
    import sys
    from pathlib import Path
    from slsgu_cli.console import Console
    from slsgu_cli.edits import load_edit
    from slsgu_cli.store import Store
    from slsgu_cli.targets.carrying import CarryOptions, carry
    from slsgu_cli.targets.target import read_target
    store, source, out, revert, *names = sys.argv[1:]
    edits = [load_edit(Store(store), name) for name in names]
    options = CarryOptions(revert=revert == "1")
    carry(edits, read_target(Path(source)), Path(out), options=options, console=Console())
    status = Path("/proc/self/status")
    print(status.read_text().partition("VmHWM:")[2].split()[0] if status.exists() else 0)
"""


def shape_of(name: str, width: int, projected: int) -> tuple[int, ...]:
    """Return the shape of a tensor that open_clip calls `name`."""
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


def write(path: Path, home: Home, sizes: tuple[int, int, int], *, left_out: str, shards: int = 1):
    """Write a tower's random weights in its layout, layer by layer; return some layers."""
    width, blocks, projected = sizes
    rng = np.random.default_rng(0)
    own = [name for name in names(home.tower, blocks) if name != left_out]
    prefix = "visual." if home.tower is Tower.VISION else ""
    wanted = {f"{prefix}transformer.resblocks.7.attn.in_proj_weight",
              f"{prefix}transformer.resblocks.7.mlp.c_proj.weight"}  # fmt: skip
    kept = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        tensors: dict[str, np.ndarray] = {}
        for name in own[shard::shards]:
            values = rng.standard_normal(shape_of(name, width, projected), np.float32)
            layer = (0.02 * values).astype("<f2")
            if name in wanted:
                kept[name] = layer
            for slot in slots(name, home):
                tensors[slot.key] = np.ascontiguousarray(slot.take(layer))
        file = path if shards == 1 else path.with_stem(f"{path.stem}-{shard + 1:05}-of-{shards:05}")
        save(file, tensors)
    return kept


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


def pipeline(folder: Path, kind: str, encoders: dict[str, tuple[int, int, int]]) -> dict:
    """Write a diffusers pipeline's text encoders."""
    index: dict[str, object] = {"_class_name": kind}
    layers = {}
    for name, sizes in encoders.items():
        second = name == "text_encoder_2"
        index[name] = ["transformers", f"CLIPTextModel{'WithProjection' if second else ''}"]
        home = Home(Tower.TEXT, Spelling.TRANSFORMERS, "text_model.")
        left_out = "" if second else "text_projection"
        layers = write(folder / name / "model.safetensors", home, sizes, left_out=left_out)
    (folder / "model_index.json").write_text(json.dumps(index))
    return layers


def llava(folder: Path) -> dict:
    """Write LLaVA-1.5's tower in two shards."""
    home = Home(Tower.VISION, Spelling.TRANSFORMERS, "vision_tower.vision_model.")
    folder.mkdir()
    config = {"model_type": "llava", "vision_feature_layer": -2}
    (folder / "config.json").write_text(json.dumps(config))
    return write(folder / "model.safetensors", home, VISION, left_out="visual.proj", shards=2)


def ldm(path: Path) -> dict:
    """Write the text encoder of Stable Diffusion 2.1 as it lies in a single file."""
    home = Home(Tower.TEXT, Spelling.OPEN_CLIP, "cond_stage_model.model.")
    return write(path, home, (1024, 24, 1024), left_out="")


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


def digests(path: Path) -> dict[str, str]:
    """Return the digest of every tensor and of every other file below a path."""
    from slsgu_cli.weights import open_weights

    found = {}
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.suffix == ".safetensors":
            opened = open_weights(file)
            for name in opened.names():
                found[f"{file.name} {name}"] = hashlib.sha256(opened.stored(name)).hexdigest()
        elif file.is_file():
            found[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def edits(store: Path, layers: dict[str, np.ndarray]) -> list[str]:
    """Write an edit of each layer into a store; return their names."""
    from edit_headers import edit

    from slsgu_cli.edits import write_edit
    from slsgu_cli.store import Store

    written = []
    for number, (layer, before) in enumerate(layers.items()):
        delta = np.full(before.shape, 1e-2, np.float32)
        write_edit(Store(str(store)), edit(layer, delta, before, name=f"edit{number}"))
        written.append(f"edit{number}")
    return written


def carry(store: Path, source: Path, out: Path, revert: bool, wanted: list[str]) -> tuple:
    """Run the carrying in a process of its own; return its seconds and peak memory in MB."""
    code = textwrap.dedent(CARRY)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, str(store), str(source), str(out), str(int(revert)), *wanted],
        check=True,
        capture_output=True,
        text=True,
    )
    return time.perf_counter() - start, int(done.stdout) / 1000


def main() -> None:
    """Carry edits into each model named on the command line, or into all."""
    for case in sys.argv[1:] or CASES:
        name, make = CASES[case]
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            source, out, back = (root / kind / name for kind in ("a", "b", "c"))
            source.parent.mkdir()
            layers = make(source)
            wanted = edits(root / "store", layers)
            seconds, memory = carry(root / "store", source, out, False, wanted)
            _, again = carry(root / "store", out, back, True, wanted)
            one, two, three = digests(source), digests(out), digests(back)
            changed = [key for key in one if one[key] != two[key]]
            files = [source] if source.is_file() else [p for p in source.rglob("*") if p.is_file()]
            size = sum(path.stat().st_size for path in files) / 1e9
            print(
                f"{case}: {size:.2f} GB, {seconds:.2f} s, {max(memory, again):.0f} MB at most; "
                f"{len(changed)} of {len(one)} tensors changed, "
                f"the way back {'is exact' if one == three else 'is NOT exact'}"
            )


if __name__ == "__main__":
    main()
