"""A MetaClip2Model of transformers as a model: features, gradients and edits as in open_clip."""

import json

import hf_metaclip
import pytest
import tiny_targets
import torch
from safetensors.torch import load_file
from worlds import World

from slsgu_cli.clip.loading import load
from slsgu_cli.clip.model_folder import require_weights
from slsgu_cli.clip.models import resolve
from slsgu_cli.clip.tokenizers import tokenizer
from slsgu_cli.engine.apply import apply
from slsgu_cli.engine.set_edits import direct_edit
from slsgu_cli.errors import InputError
from slsgu_cli.records.directions import Direction
from slsgu_cli.records.options import ApplyRequest, RankOptions
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.store import Store

LAYER = "transformer.resblocks.1.attn.in_proj_weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny MetaCLIP 2 as transformers saves it; do not write to it."""
    return hf_metaclip.write_folder(tmp_path_factory.mktemp("hf") / "metaclip")


def features(model, pixels, tokens):
    answer = model(input_ids=tokens, pixel_values=pixels)
    return answer.image_embeds, answer.text_embeds


def test_features_are_those_of_transformers_where_the_tokenizer_ends_a_text(folder):
    model = resolve(ModelSpec(str(folder)))
    require_weights(model)
    loaded, theirs = load(model), hf_metaclip.model()
    weights = tiny_targets.transformers_weights(loaded.state_dict())
    assert weights.keys() == theirs.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in theirs.state_dict().items())
    tokens = torch.from_numpy(tokenizer(model)(["a blue ring", "ring ring the the red"])).long()
    assert [row.index(hf_metaclip.EOS) for row in tokens.tolist()] == [3, 5]
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        image, text = features(theirs, pixels, tokens)
        for found, other in (
            (loaded.encode_image(pixels, normalize=True), image),
            (loaded.encode_text(tokens, normalize=True), text),
        ):
            torch.testing.assert_close(found, other, rtol=0, atol=1e-5)


def test_gradients_are_those_of_transformers_and_edits_go_into_the_folder(
    folder, shared_world, tmp_path
):
    from transformers import MetaClip2Model

    store = Store(str(tmp_path / "store"))
    world = World(store, "blue", ModelSpec(str(folder)), shared_world.sources)
    world.build()
    world.grade(batch_size=500)
    block, spec = DataBlock.open(store, world.manifest.forget), world.manifest.input
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    images = torch.from_numpy(block.images(0, block.rows)).permute(0, 3, 1, 2) / 255
    pixels, tokens = (images - mean) / std, torch.from_numpy(block.tokens).long()
    theirs = hf_metaclip.model()
    image, text = features(theirs, pixels, tokens)
    (1 - (image * text).sum(-1)).mean().backward()
    stored = store.read_tensors(Artifact.GRADIENT.path(world.pointer.forget))
    found = tiny_targets.transformers_weights({n: torch.from_numpy(v) for n, v in stored.items()})
    compared = [name for name, value in theirs.named_parameters() if value.grad is not None]
    assert len(compared) > 50
    for name in compared:
        plain = theirs.get_parameter(name).grad
        least = float(1e-4 * plain.abs().max() + 1e-7)
        torch.testing.assert_close(found[name], plain, rtol=0, atol=least)
    options = RankOptions(direction=Direction.GRADIENT)
    edit = direct_edit(store, world.name, layer=LAYER, step=1.0, options=options)
    request = ApplyRequest(
        names=[world.name],
        out=tmp_path / "out",
        model=world.model,
        layer=LAYER,
        step=1.0,
        direction=Direction.GRADIENT,
    )
    apply(store, request)
    changed = load(resolve(world.model))
    changed.get_parameter(LAYER).data += torch.from_numpy(edit.delta())
    written = MetaClip2Model.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        _, text = features(written, pixels, tokens)
        expected = changed.encode_text(tokens, normalize=True)
        torch.testing.assert_close(text, expected, rtol=0, atol=1e-5)
    before, after = (load_file(at / "model.safetensors") for at in (folder, tmp_path / "out"))
    other = {name for name in before if not torch.equal(before[name], after[name])}
    prefix = "text_model.encoder.layers.1.self_attn."
    assert other and other <= {f"{prefix}{letter}_proj.weight" for letter in "qkv"}


def test_models_that_open_clip_cannot_express_are_refused(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = [1, 2]
    path = hf_metaclip.write_folder(tmp_path / "other") / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"eos_token_id \[1, 2\], which open_clip's MetaClip2"):
        resolve(ModelSpec(str(path.parent)))
