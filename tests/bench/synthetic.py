"""Models with random weights and sets of random rows, for measuring speed and memory.

Speed and memory do not depend on the weights, with one exception: a random tower maps all
inputs to nearly the same feature, and a search that stops where accuracy is lost would find
none to lose. So the last norm of each tower is centred. Images are smooth noise and differ from
each other. Captions have the lengths of web captions: log-normal, median 14 tokens, cut at
the context. Most labels are the model's own predictions, so that accuracies start high
and the search has something to forget; captions then name the classes.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file

import slsgu_cli
from slsgu_cli.clip.batches import pixel_normalizer, text_features, to_tokens
from slsgu_cli.clip.loading import load
from slsgu_cli.clip.metrics import class_means
from slsgu_cli.clip.models import resolve
from slsgu_cli.clip.tokenizers import input_spec, tokenizer
from slsgu_cli.clip.towers import text_tower, vision_tower
from slsgu_cli.records.sets import DataRef, ModelSpec, SetManifest
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.blocks import block_writer
from slsgu_cli.store.store import Store

TEMPLATES = ("{}", "a photo of a {}.", "a picture of {}", "itap of a {}.")


def random_model(folder: Path, name: str) -> ModelSpec:
    """Write an open_clip architecture with random weights as a local-dir model."""
    folder.mkdir(parents=True, exist_ok=True)
    config = open_clip.get_model_config(name)
    path = folder / "open_clip_config.json"
    path.write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    model = open_clip.create_model(name).eval()
    _centre(model)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return ModelSpec(f"local-dir:{folder}")


@torch.no_grad()
def _centre(model: Any) -> None:
    """Subtract the mean output of each tower's last norm from that norm's bias."""
    size, context = model.visual.image_size, model.context_length
    height = size[0] if isinstance(size, tuple) else size
    images = torch.from_numpy(random_images(48, height, 7)).permute(0, 3, 1, 2) / 127.5 - 1
    tokens = torch.from_numpy(random_tokens(48, context, 49408, 7)).long()
    vision, text = vision_tower(model), text_tower(model)
    trunk = getattr(model.visual, "trunk", None)
    norms = (
        (model.visual.ln_post if trunk is None else trunk.norm, vision, images),
        (getattr(model, "text", model).ln_final, text, tokens),
    )
    for norm, tower, inputs in norms:
        left: list[torch.Tensor] = []
        handle = norm.register_forward_hook(lambda _, __, out, left=left: left.append(out))
        tower.features(inputs, inputs)
        handle.remove()
        pooled = left[0] if left[0].ndim == 2 else left[0][:, 0]
        norm.bias -= pooled.mean(dim=0)


def random_images(rows: int, size: int, seed: int) -> np.ndarray:
    """Return uint8 (rows, size, size, 3): coarse colour noise, enlarged."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (rows, 7, 7, 3), dtype=np.uint8)
    index = np.arange(size) * 7 // size
    return coarse[:, index][:, :, index]


def random_tokens(rows: int, context: int, vocabulary: int, seed: int) -> np.ndarray:
    """Return int32 (rows, context) with the lengths of web captions."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(np.log(14), 0.5, rows).round(), 4, context).astype(int)
    tokens = rng.integers(1, vocabulary - 2, (rows, context)).astype(np.int32)
    columns = np.arange(context)
    tokens[columns >= lengths[:, None]] = 0
    tokens[:, 0] = vocabulary - 2
    tokens[np.arange(rows), lengths - 1] = vocabulary - 1
    return tokens


def captions(names: Sequence[str], rows: int, seed: int, concept: str = "") -> list[str]:
    """Return captions that name one to three of `names`, after `concept`."""
    rng = np.random.default_rng(seed)
    picked = [
        [names[i] for i in rng.integers(0, len(names), rng.integers(1, 4))] for _ in range(rows)
    ]
    return [" and ".join([concept, *chosen] if concept else chosen) for chosen in picked]


def pairs_block(store: Store, name: str, *, tokens: np.ndarray, size: int) -> DataRef:
    """Write image-text pairs to the store, a generated image for each row of `tokens`."""
    rows = len(tokens)
    path = f"data/{name}.zarr"
    with block_writer(store, path, height=size, width=size, rows=rows) as writer:
        for start in range(0, rows, 512):
            for offset, image in enumerate(random_images(min(512, rows - start), size, start)):
                writer.add(image, key=f"{name}-{start + offset}")
        fingerprint = writer.finish(tokens, {})
    return DataRef(path, fingerprint, rows, rows, {}, ("synthetic",))


def labelled_block(
    store: Store, name: str, *, labels: Sequence[int], names: Sequence[str], size: int, seed: int
) -> DataRef:
    """Write labelled evaluation images; the same seed gives the same images."""
    path = f"data/{name}.zarr"
    with block_writer(store, path, height=size, width=size, rows=len(labels)) as writer:
        for start in range(0, len(labels), 512):
            images = random_images(min(512, len(labels) - start), size, seed + start)
            for offset, image in enumerate(images):
                number = start + offset
                writer.add(image, key=f"{name}-{number}", label=int(labels[number]))
        attributes = {"class_names": list(names), "templates": list(TEMPLATES)}
        fingerprint = writer.finish(None, attributes)
    return DataRef(path, fingerprint, len(labels), len(labels), {}, ("synthetic",))


def class_names(count: int, seed: int) -> list[str]:
    """Return distinct generated names of one to three short words."""
    rng = np.random.default_rng(seed)
    words = ["red", "stone", "river", "lamp", "cat", "tower", "wheel", "leaf", "iron", "cloud"]
    found: dict[str, None] = {}
    while len(found) < count:
        picked = [words[i] for i in rng.integers(0, len(words), rng.integers(1, 4))]
        found[" ".join([*picked, str(rng.integers(0, 100))])] = None
    return list(found)


def own_labels(
    model: ModelSpec, names: Sequence[str], *, rows: int, wrong: float, seed: int, device: str
) -> np.ndarray:
    """Return the model's predictions for a block's images, a share of them altered."""
    resolved = resolve(model)
    module, spec = load(resolved, device), input_spec(resolved)
    normalize = pixel_normalizer(spec, device)
    vision, text = vision_tower(module), text_tower(module)
    texts = [template.replace("{}", name) for name in names for template in TEMPLATES]
    owners = torch.arange(len(names), device=device).repeat_interleave(len(TEMPLATES))
    found = []
    with torch.no_grad():
        tokens = to_tokens(tokenizer(resolved)(texts), "cpu")
        classes = class_means(text_features(text, tokens, device), owners, len(names))
        for start in range(0, rows, 512):
            images = normalize(random_images(min(512, rows - start), spec.height, seed + start))
            features = vision.features(images, images)
            found.append((features @ classes.T).argmax(1))
    labels = torch.cat(found).cpu().numpy()
    rng = np.random.default_rng(seed)
    altered = rng.random(rows) < wrong
    labels[altered] = rng.integers(0, len(names), int(altered.sum()))
    return labels


def _concept(labels: np.ndarray, classes: int) -> int:
    """Return the class whose number of images is nearest to 1%, at least eight.

    The share is 1% in the embedded evaluation sets, 0.1% in ImageNet's.
    """
    usual = max(8, len(labels) // 100)
    return int(np.abs(np.bincount(labels, minlength=classes) - usual).argmin())


def synthetic_set(
    store: Store,
    name: str,
    model: ModelSpec,
    *,
    forget: int,
    retain: int,
    evals: dict[str, tuple[int, int]],
    device: str,
    wrong: float = 0.1,
    test_fraction: float = 0.0,
) -> SetManifest:
    """Build a set; `evals` maps a name to its (images, classes).

    A share `wrong` of the evaluation images gets other labels than the model's predictions, and
    `test_fraction` of each class is test rows. Captions name the classes, so that the retain set
    matches what the evaluation measures; without evaluation sets they are random tokens.
    """
    resolved = resolve(model)
    spec = input_spec(resolved)
    refs, concept, kept = {}, "", []
    for number, (key, (rows, classes)) in enumerate(evals.items()):
        names = class_names(classes, seed=number)
        seed = 10**6 * (number + 1)
        labels = own_labels(model, names, rows=rows, wrong=wrong, seed=seed, device=device)
        concept = concept or names[_concept(labels, classes)]
        kept += [name for name in names if name != concept]
        refs[key] = labelled_block(
            store, f"{name}-{key}", labels=labels.tolist(), names=names, size=spec.height, seed=seed
        )

    def pairs(part: str, rows: int, shown: str = "") -> DataRef:
        if kept:
            texts = captions(kept, rows, len(part), shown)
            tokens = np.asarray(tokenizer(resolved)(texts), np.int32)
        else:
            tokens = random_tokens(rows, spec.context_length, 49408, len(part))
        return pairs_block(store, f"{name}-{part}", tokens=tokens, size=spec.height)

    manifest = SetManifest(
        name=name,
        concept=concept,
        patterns=(concept,),
        model=model,
        input=spec,
        forget=pairs("forget", forget, concept),
        retain=pairs("retain", retain),
        evals=refs,
        forget_eval=next(iter(refs), None),
        seed=0,
        command=(),
        version=slsgu_cli.__version__,
        test_fraction=test_fraction,
    )
    store.write_record(Artifact.SET.path(name), manifest)
    return manifest
