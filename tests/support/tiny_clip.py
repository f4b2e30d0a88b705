"""A tiny CLIP and the coloured shapes it recognises, both generated.

The model recognises eight colours and five shapes, neither perfectly, so accuracies change
gradually under an edit, as they do in a large model.
"""

import io
import json
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

SIZE = 32
DAMPING = 1e-4
SHAPES = ("circle", "square", "ring", "bar", "pole")
COLOURS = {
    "red": (220, 30, 30),
    "orange": (250, 140, 20),
    "yellow": (235, 220, 40),
    "green": (30, 190, 40),
    "cyan": (40, 220, 220),
    "blue": (40, 60, 230),
    "purple": (140, 40, 200),
    "white": (245, 245, 245),
}
CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {
        "image_size": SIZE,
        "layers": 3,
        "width": 48,
        "head_width": 24,
        "patch_size": 8,
    },
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 49408,
        "width": 24,
        "heads": 2,
        "layers": 3,
    },
}
PREPROCESS = {
    "mean": [0.3, 0.35, 0.4],
    "std": [0.25, 0.3, 0.35],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


def picture(shape: str, colour: str, rng: np.random.Generator) -> Image.Image:
    """Draw a shape in a colour at a random place on a dark background."""
    image = Image.new("RGB", (SIZE, SIZE), tuple(int(v) for v in rng.integers(0, 60, 3)))
    draw = ImageDraw.Draw(image)
    r = int(rng.integers(7, 12))
    x, y = (int(v) for v in rng.integers(r + 1, SIZE - r - 1, 2))
    fill, box = COLOURS[colour], (x - r, y - r, x + r, y + r)
    match shape:
        case "circle":
            draw.ellipse(box, fill)
        case "square":
            draw.rectangle(box, fill)
        case "ring":
            draw.ellipse(box, outline=fill, width=3)
        case "bar":
            draw.rectangle((x - r, y - 2, x + r, y + 2), fill)
        case "pole":
            draw.rectangle((x - 2, y - r, x + 2, y + r), fill)
    return image


def row(number: int) -> dict:
    """Return a sample that looks different for every number, labelled by shape and colour."""
    rng = np.random.default_rng(number)
    colour, shape = list(COLOURS)[number % len(COLOURS)], str(rng.choice(SHAPES))
    buffer = io.BytesIO()
    picture(shape, colour, rng).save(buffer, "PNG")
    template = ("a {} {}", "a picture of a {} {}", "{} {}", "the {} {}")[number % 4]
    return {
        "key": f"{colour}-{shape}-{number}",
        "image": buffer.getvalue(),
        "caption": template.format(colour, shape),
        "shape": shape,
        "colour": colour,
    }


def write_pairs(path: Path, numbers: range) -> str:
    """Write captioned samples as a parquet file and return its path."""
    pq.write_table(pa.Table.from_pylist([row(number) for number in numbers]), path)
    return str(path)


def write_labelled(path: Path, numbers: dict[str, range]) -> str:
    """Write samples labelled by `shape` or `colour`, as the column `kind` says."""
    samples = [
        {"key": sample["key"], "image": sample["image"], "label": sample[kind], "kind": kind}
        for kind, chosen in numbers.items()
        for sample in map(row, chosen)
    ]
    pq.write_table(pa.Table.from_pylist(samples), path)
    return str(path)


def write_folder(folder: Path, model: torch.nn.Module | None = None, **changes) -> Path:
    """Write a model folder in open_clip's layout; without a model, a random one."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": CONFIG | changes, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    if model is None:
        model = fresh_model(config["model_cfg"])
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors", {"format": "pt"})
    return folder


def fresh_model(config: dict = CONFIG, seed: int = 0) -> torch.nn.Module:
    """Return an untrained model of a configuration; the same seed gives the same model."""
    custom = config.get("custom_text") or config.get("init_logit_bias") is not None
    kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    arguments = {key: value for key, value in config.items() if key != "custom_text"}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(**arguments).eval()


def fitted_model() -> torch.nn.Module:
    """Return a model that recognises colours well and shapes a little.

    The blocks are random; the two projections are fitted by least squares, so that images
    and captions meet at the sum of a code for the colour and a code for the shape.
    """
    model = fresh_model()
    model.token_embedding.weight.data *= 30
    codes = torch.randn(
        len(COLOURS) + len(SHAPES), CONFIG["embed_dim"], generator=torch.Generator().manual_seed(1)
    )
    meaning = dict(zip((*COLOURS, *SHAPES), codes, strict=True))
    rows = [row(number) for number in range(10_000, 10_600)]
    captions = {r["caption"]: meaning[r["colour"]] + meaning[r["shape"]] for r in rows}
    for word, code in meaning.items():
        captions |= {f"a {start} of the {word}.": code for start in ("photo", "drawing", "itap")}
    tokenize = open_clip.SimpleTokenizer(context_length=CONFIG["text_cfg"]["context_length"])
    with torch.no_grad():
        _fit(
            model.visual.proj,
            lambda: model.encode_image(pixels(rows)),
            torch.stack([meaning[r["colour"]] + meaning[r["shape"]] for r in rows]),
        )
        _fit(
            model.text_projection,
            lambda: model.encode_text(tokenize(list(captions))),
            torch.stack(list(captions.values())),
        )
    return model


def pixels(rows: list[dict]) -> torch.Tensor:
    """Return the preprocessed images of some rows."""
    images = np.stack([np.array(Image.open(io.BytesIO(row["image"]))) for row in rows])
    mean, std = (torch.tensor(PREPROCESS[name]).view(3, 1, 1) for name in ("mean", "std"))
    return (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std


def _fit(projection: torch.nn.Parameter, encode, targets: torch.Tensor) -> None:
    """Set a projection to the ridge regression of `targets` on its inputs."""
    width, out = projection.shape
    parts = []
    for start in range(0, width, out):
        projection.data.zero_()
        span = min(out, width - start)
        projection.data[start : start + span, :span] = torch.eye(span)
        parts.append(encode()[:, :span])
    x = torch.cat(parts, dim=1).double()
    gram = x.T @ x + DAMPING * x.shape[0] * torch.eye(width)
    projection.data = torch.linalg.solve(gram, x.T @ targets.double()).float()
