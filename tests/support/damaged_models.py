"""Models in every layout with one damaged file, and what the commands make of them.

A command may print the result of the undamaged model, the result of what is now another model,
or one error with an exit code. NaN in a tensor that it reads must be an error.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hf_clip
import tiny_clip
import tiny_targets
import torch
from processes import inside
from safetensors.torch import load_file

from slsgu_cli.clip import tokenizers

LAYER = "transformer.resblocks.2.mlp.c_proj.weight"
State = dict[str, torch.Tensor]
Harm = Callable[[random.Random, Path], None]

# Values of types that no configuration has in any place.
STRANGE = (None, True, -1, 0, 1.5, 10**12, "x", [], [[]], {}, {"a": 1})
RESULT_CODES, REFUSALS = (0, 5), (2, 3, 4)


def truncate(rng: random.Random, path: Path) -> None:
    """Cut off the end."""
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(1, len(data))])


def empty(rng: random.Random, path: Path) -> None:
    """Empty the file."""
    path.write_bytes(b"")


def flip(path: Path, place: int, bit: int) -> None:
    """Flip one bit."""
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ (1 << bit)]))


def header_length(path: Path) -> int:
    """Return the number of bytes before the tensors, if the file has a header."""
    data = path.read_bytes()
    if path.suffix != ".safetensors":
        return min(len(data), 2048)
    return min(len(data), 8 + int.from_bytes(data[:8], "little"))


def flip_header(rng: random.Random, path: Path) -> None:
    """Flip a bit of the header."""
    flip(path, rng.randrange(header_length(path)), rng.randrange(8))


def flip_data(rng: random.Random, path: Path) -> None:
    """Flip a bit behind the header."""
    size, start = path.stat().st_size, header_length(path)
    flip(path, rng.randrange(start if start < size else 0, size), rng.randrange(8))


def tensors(path: Path) -> State:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path)


def rewritten(change: Callable[[random.Random, State], None]) -> Harm:
    """Return a function that changes the tensors of a file and writes it again."""

    def harm(rng: random.Random, path: Path) -> None:
        state = tensors(path)
        change(rng, state)
        tiny_targets.save(state, path)

    harm.__name__ = change.__name__
    return harm


@rewritten
def no_tensor(rng: random.Random, state: State) -> None:
    """Remove a tensor."""
    del state[rng.choice(sorted(state))]


@rewritten
def no_tensors(rng: random.Random, state: State) -> None:
    """Remove all tensors."""
    state.clear()


@rewritten
def another_tensor(rng: random.Random, state: State) -> None:
    """Add a tensor that nothing reads."""
    state["surplus.weight"] = torch.ones(3)


@rewritten
def other_shape(rng: random.Random, state: State) -> None:
    """Append a row to a tensor, or remove all rows."""
    name = rng.choice(sorted(state))
    value = torch.atleast_1d(state[name])
    state[name] = value[:0] if rng.random() < 0.3 else torch.cat([value, value[:1]])


@rewritten
def other_type(rng: random.Random, state: State) -> None:
    """Store a tensor as integers."""
    name = rng.choice(sorted(state))
    state[name] = state[name].to(torch.int64)


def nan(rng: random.Random, path: Path) -> None:
    """Put a NaN or an infinity into a floating-point tensor."""
    state = tensors(path)
    name = rng.choice(sorted(name for name, value in state.items() if value.is_floating_point()))
    flat = state[name].clone().reshape(-1)
    flat[rng.randrange(len(flat))] = rng.choice([float("nan"), float("inf"), float("-inf")])
    state[name] = flat.reshape(state[name].shape)
    tiny_targets.save(state, path)


def _entries(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each object or list inside a JSON value with each of its keys."""
    keys = value if isinstance(value, dict) else range(len(value)) if type(value) is list else ()
    for key in keys:
        yield value, key
        yield from _entries(value[key])


def rewritten_json(change: Callable[[random.Random, Any], Any]) -> Harm:
    """Return a function that changes a JSON file and writes it again."""

    def harm(rng: random.Random, path: Path) -> None:
        path.write_text(json.dumps(change(rng, json.loads(path.read_text()))))

    harm.__name__ = change.__name__
    return harm


def _some_entry(rng: random.Random, content: Any) -> tuple[Any, Any]:
    # Skip the long vocabularies: configurations are near the top.
    some = [entry for entry, _ in zip(_entries(content), range(400), strict=False)]
    return rng.choice(some)


@rewritten_json
def other_value(rng: random.Random, content: Any) -> Any:
    """Replace a value by one of another type."""
    holder, key = _some_entry(rng, content)
    holder[key] = rng.choice(STRANGE)
    return content


@rewritten_json
def no_key(rng: random.Random, content: Any) -> Any:
    """Remove a key."""
    holder, key = _some_entry(rng, content)
    del holder[key]
    return content


@rewritten_json
def another_key(rng: random.Random, content: Any) -> Any:
    """Add an unknown key."""
    return {**content, "surplus": [1]} if isinstance(content, dict) else [*content, 1]


@rewritten_json
def other_kind(rng: random.Random, content: Any) -> Any:
    """Replace the whole document."""
    return rng.choice(STRANGE)


OF_ALL = (truncate, empty, flip_header, flip_data)
OF_WEIGHTS = (no_tensor, no_tensors, another_tensor, other_shape, other_type, nan)
OF_JSON = (other_value, other_value, other_value, no_key, no_key, another_key, other_kind)


def harms(path: Path) -> tuple[Harm, ...]:
    """Return the ways in which a file can be damaged."""
    if path.suffix in (".safetensors", ".bin", ".pt"):
        return OF_ALL + OF_WEIGHTS
    return OF_ALL + OF_JSON if path.suffix == ".json" else OF_ALL


@dataclass(frozen=True)
class Layout:
    """A model in files and the commands that load it. `reads_all`: they read every file."""

    name: str
    folder: Path
    commands: dict[str, str]
    reads_all: bool

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())


# Commands that name a model, commands that use the set's model, and commands on targets.
OF_MODEL = (
    "build-sets red --source PAIRS --label-column label --retain-samples 20 --model MODEL",
    "apply blue --model MODEL --out OUT",
    "check FOLDER --edit blue",
    "grad blue --model MODEL --batch-size 7",
    "eval blue --model MODEL",
    "verify blue --checks typos --model MODEL",
)
SMALL = f"--layer {LAYER} --direction gradient"
OF_SET = (
    "rank blue",
    f"search blue {SMALL} --steps 3",
    f"trajectory blue {SMALL} --points 3",
    "compare blue --methods ga --lr 1e-4 --retain-rows 8",
    "verify blue --checks nearest",
    "report blue --out OUT.html",
    "eval blue",
    "apply blue --out OUT",
)
OF_TARGET = (
    "apply blue --target FOLDER --out OUT",
    "check FOLDER --edit blue",
    "rank blue --target FOLDER",
)
MOVED = "apply blue --layer visual.transformer.resblocks.0.mlp.c_fc.weight --step 1"
OF_LLAVA = (f"{MOVED} --target FOLDER --out OUT", "rank blue --target FOLDER")
GENERATE = "generate blue --target FOLDER --prompt dog --seeds 0 --denoise 2 --out OUT"
ASK = "ask blue --target FOLDER --samples 1 --out OUT"


@dataclass
class Models:
    """A store with the searched set `blue` of the tiny CLIP, and that CLIP in every layout."""

    folder: Path
    store: Path
    layouts: dict[str, Layout]

    @classmethod
    def write(
        cls,
        folder: Path,
        *,
        clip: Path,
        store: Path,
        pairs: str,
        own: bool,
        trained: Path | None = None,
    ) -> "Models":
        """Write the models next to a store whose set uses the model in `clip`.

        With `own`, that model is damaged too, for commands that accept no other. `trained` is a
        folder with a small Stable Diffusion and a LLaVA.
        """
        made = cls(folder, store, {})
        folder.mkdir()
        if not own:
            clip = Path(shutil.copytree(clip, folder / "open_clip"))
        state = load_file(clip / "open_clip_model.safetensors")
        made.add("open_clip", clip, OF_MODEL + (OF_SET if own else ()), f"local-dir:{clip}")
        pickled = Path(shutil.copytree(clip, folder / "bin"))
        (pickled / "open_clip_model.safetensors").unlink()
        tiny_targets.save(state, pickled / "open_clip_pytorch_model.bin")
        made.add("bin", pickled, OF_MODEL, f"local-dir:{pickled}")
        (folder / "pt").mkdir()
        architecture, weights = folder / "pt" / "tiny.json", folder / "pt" / "tiny.pt"
        architecture.write_text(json.dumps(tiny_clip.CONFIG))
        tiny_targets.save(state, weights)
        made.add("pt", folder / "pt", OF_MODEL[:2], f"{architecture} --pretrained {weights}")
        hf_clip.write_folder(folder / "transformers", state)
        made.add("transformers", folder / "transformers", OF_MODEL, str(folder / "transformers"))
        encoders = {"text_encoder": ("CLIPTextModel", tiny_targets.tower(state, "text"))}
        pipeline = tiny_targets.pipeline(folder / "sd", "StableDiffusionPipeline", encoders)
        made.add("pipeline", pipeline, OF_TARGET)
        llava = tiny_targets.llava(folder / "llava", state, "vision_tower.vision_model.", shards=2)
        made.add("llava", llava, OF_LLAVA)
        if trained is not None:
            made._add_trained(clip, trained)
        for layout in made.layouts.values():
            for name, words in layout.commands.items():
                layout.commands[name] = words.replace("PAIRS", pairs)
        return made

    def _add_trained(self, clip: Path, trained: Path) -> None:
        """Add a model with its own tokenizer, and models that generate and answer."""
        words = Path(shutil.copytree(clip, self.folder / "tokenizer"))
        config = json.loads((words / "open_clip_config.json").read_text())
        config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "local"
        (words / "open_clip_config.json").write_text(json.dumps(config))
        shutil.copytree(trained / "sd/tokenizer", words, dirs_exist_ok=True)
        self.add("tokenizer", words, OF_MODEL[:3], f"local-dir:{words}")
        for name, command in (("sd", GENERATE), ("llava", ASK)):
            copy = Path(shutil.copytree(trained / name, self.folder / f"trained-{name}"))
            for path in [copy, *copy.rglob("*")]:
                path.chmod(0o755 if path.is_dir() else 0o644)
            self.add(f"trained {name}", copy, (command,))

    def add(self, name: str, folder: Path, commands: tuple[str, ...], model: str = "") -> None:
        """Add a layout. Its commands are named by their first word and a number."""
        filled = {
            f"{command.split()[0]} {number}": command.replace("MODEL", model)
            .replace("FOLDER", str(folder))
            .replace("OUT", str(self.folder / "out"))
            for number, command in enumerate(commands)
        }
        self.layouts[name] = Layout(name, folder, filled, reads_all=bool(model))

    @contextmanager
    def copied(self) -> Iterator[Path]:
        """Yield a copy of the store and remove it afterwards."""
        copy = self.folder / "copy"
        shutil.copytree(self.store, copy)
        try:
            yield copy
        finally:
            shutil.rmtree(copy)

    def run(self, layout: Layout, command: str) -> Any:
        """Run a command on a copy of the store, with empty caches."""
        tokenizers._tokenizer.cache_clear()
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        (self.folder / "out.html").unlink(missing_ok=True)
        with self.copied() as store:
            return inside(*layout.commands[command].split(), "--json", store=store)

    def outcome(self, rng: random.Random, layout: Layout, command: str) -> tuple[str, str, bool]:
        """Damage a file of a model and run a command.

        Return the outcome, a description, and whether the outcome is acceptable.
        """
        path = rng.choice(layout.files())
        harm = rng.choice(harms(path))
        whole = path.read_bytes()
        try:
            harm(rng, path)
            done = self.run(layout, command)
        finally:
            path.write_bytes(whole)
        about = f"{layout.name}: {harm.__name__} of {path.relative_to(layout.folder)}: "
        about += f"{command}: {done.exit_code}: {done.stderr[-300:]}"
        errors = done.stderr.count("error: ")
        if done.exit_code in REFUSALS and errors == 1 and "error: unexpected" not in done.stderr:
            return "refused", about, True
        # `rank` reads neither the logit scale nor embeddings of words that no caption has.
        measured = layout.reads_all and command.split()[0] in ("grad", "eval", "search")
        counted = harm is nan and (measured or "NaN" in done.stdout)
        if done.exit_code in RESULT_CODES and not counted:
            return "a result", about, True
        return "UNEXPECTED", about, False
