"""Building a model as a module of open_clip, with its weights or without."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from slsgu_cli.checkpoints.configurations import CONFIG
from slsgu_cli.checkpoints.layouts import open_weights
from slsgu_cli.checkpoints.naming_schemes import NamingScheme
from slsgu_cli.checkpoints.tensor_file import COMPILED
from slsgu_cli.checkpoints.transformers_families import bert_config
from slsgu_cli.errors import SlsguError
from slsgu_cli.records.sets import LOCAL

if TYPE_CHECKING:
    import torch
from slsgu_cli.clip.models import ResolvedModel, explained, quiet, weights_of

# The timm architecture of every SigLIP tower; its sizes are arguments.
TIMM_SIGLIP = "vit_base_patch16_siglip_224"


def load(
    model: ResolvedModel, device: str = "cpu", *, warn: Callable[[str], None] | None = None
) -> "torch.nn.Module":
    """Build the module in fp32 and evaluation mode on `device`, with its weights loaded."""
    import open_clip

    if model.scheme is NamingScheme.TRANSFORMERS or not is_read_by_open_clip(model):
        return _load_ourselves(model, device, warn)
    # An absolute path: a file may have the name of a tag, which open_clip would take first.
    pretrained = None if ":" in model.identifier else str(model.weights.absolute())
    with quiet(), explained(model):
        module: torch.nn.Module = open_clip.create_model(
            model.identifier,
            pretrained=pretrained,
            device=device,
            precision="fp32",
            require_pretrained=True,
        )
    if warn and model.spec.pretrained:
        _check_activation(model, warn)
    return module.eval().requires_grad_(True)


def is_read_by_open_clip(model: ResolvedModel) -> bool:
    """Return whether open_clip reads a file: not TorchScript or weights of a compiled model.

    A damaged file counts as readable, so that open_clip reports the damage.
    """
    try:
        file = open_weights(model.weights)
    except SlsguError:
        return True
    return not (file.is_script or any(COMPILED in name for name in file.entries))


def _load_ourselves(
    model: ResolvedModel, device: str, warn: Callable[[str], None] | None
) -> "torch.nn.Module":
    """Build the module and read its weights from files that open_clip cannot read."""
    import torch

    with quiet(), explained(model):
        module = without_weights(model)
        stored = weights_of(model)
        shapes = stored.shapes()
        if any(shapes.get(name) != shape for name, shape in shapes_of(module).items()):
            raise ValueError("its weights do not match the architecture")
        weights = {
            name: torch.tensor(stored.read(name)).to(device, value.dtype)
            for name, value in module.state_dict().items()
        }
        module.load_state_dict(weights, assign=True)
    if warn and open_weights(model.weights).is_script and not model.config.get("quick_gelu"):
        warn(
            f"{model.spec} is TorchScript, as OpenAI's models are, which were trained with "
            "QuickGELU, but is built with GELU: use the -quickgelu architecture name for those"
        )
    return module.to(device).eval().requires_grad_(True)


def without_weights(model: ResolvedModel) -> "torch.nn.Module":
    """Build the module in evaluation mode, if possible with its parameters on `meta`."""
    import torch

    register = torch.nn.Module.register_parameter

    def on_meta(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = torch.nn.Parameter(parameter.detach().to("meta"))
        register(module, name, parameter)

    kind: Any = torch.nn.Module
    with quiet(), explained(model):
        kind.register_parameter = on_meta
        try:
            return _unfilled(model)
        except RuntimeError:
            # Some of timm's towers run a part of themselves to find its size.
            kind.register_parameter = register
            return _unfilled(model)
        finally:
            kind.register_parameter = register


def _unfilled(model: ResolvedModel) -> "torch.nn.Module":
    """Build the module of a model's configuration, without its weights."""
    import open_clip

    on_no_device: Any = None
    if model.scheme is NamingScheme.TRANSFORMERS:
        return _built_by_config(model.config)
    return open_clip.create_model(  # type: ignore[no-any-return]
        model.identifier, load_weights=False, pretrained_text=False, device=on_no_device
    )


def shapes_of(module: "torch.nn.Module") -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a module, by its name."""
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def _built_by_config(config: Mapping[str, Any]) -> "torch.nn.Module":
    """Build open_clip's module for the model_cfg of a folder of transformers.

    open_clip builds towers of timm and Hugging Face by name. The name here is the path of a
    temporary folder with the tower's configuration.
    """
    import open_clip

    rest = {name: value for name, value in config.items() if name != "custom_text"}
    kind = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
    with TemporaryDirectory() as folder:
        rest["vision_cfg"] = _vision_in(Path(folder), config["vision_cfg"])
        rest["text_cfg"] = _text_in(Path(folder), config["text_cfg"])
        return kind(**rest)  # type: ignore[no-any-return]


def _vision_in(folder: Path, vision: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a vision_cfg with a folder for timm's tower that pools by attention.

    The tower has the sizes of the vision_cfg, which need not be those of a name of timm.
    """
    if vision.get("timm_pool") != "map":
        return vision
    arguments = {
        "img_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "embed_dim": vision["width"],
        "depth": vision["layers"],
        "num_heads": vision["width"] // vision["head_width"],
        "mlp_ratio": vision["mlp_ratio"],
        "act_layer": "gelu_tanh" if vision["act_kwargs"]["approximate"] == "tanh" else "gelu",
    }
    tower = {"architecture": TIMM_SIGLIP, "model_args": arguments, "pretrained_cfg": {}}
    (folder / CONFIG).write_text(json.dumps(tower))
    return {**vision, "timm_model_name": f"{LOCAL}{folder}"}


def _text_in(folder: Path, text: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a text_cfg with a folder for the BERT of its `hf_config`."""
    if "hf_config" not in text:
        return text
    (folder / CONFIG).write_text(json.dumps(bert_config(text)))
    named = {"hf_model_name": str(folder), "hf_model_pretrained": False}
    return {name: value for name, value in text.items() if name != "hf_config"} | named


def _check_activation(model: ResolvedModel, warn: Callable[[str], None]) -> None:
    """Warn if a pretrained tag was trained with another activation than the architecture has."""
    import open_clip

    tag = open_clip.get_pretrained_cfg(model.identifier, model.spec.pretrained) or {}
    quick = bool(tag.get("quick_gelu", False))
    if tag and quick != bool(model.config.get("quick_gelu", False)):
        trained, used, name = (
            ("QuickGELU", "GELU", "-quickgelu") if quick else ("GELU", "QuickGELU", "plain")
        )
        warn(
            f"{model.spec} was trained with {trained} but is built with {used}; its accuracy "
            f"suffers. Use the {name} architecture name unless you reproduce a result that was "
            "made this way"
        )
