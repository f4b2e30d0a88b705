"""Towers that stop and resume at any stage."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slsgu_cli.checkpoints.layers import block_of
from slsgu_cli.clip.blocks import attention_half, mlp_half
from slsgu_cli.clip.onednn import FastProducts

EMBED = -1
_MLP_HALF = re.compile(r"\.(?:ln_2|mlp|ls_2)\.")


class SplitTower(ABC):
    """One tower; `inputs` are normalised pixels (N, 3, H, W) or token ids (N, L)."""

    depth: int
    halves = False
    checkpointing = False
    exact_split = True

    @property
    def token_table(self) -> Tensor | None:
        """The token embeddings, (vocabulary, width); None if `embed` is not a plain look-up.

        The input of stage 0 at a token is its row plus a term that does not depend on the token.
        """
        return None

    @abstractmethod
    def embed(self, inputs: Tensor) -> Tensor:
        """Return the inputs of stage 0."""

    @abstractmethod
    def stage(self, index: int, x: Tensor, inputs: Tensor) -> Tensor:
        """Return the outputs of stage `index`; those of the last block may be pooled."""

    @abstractmethod
    def head(self, x: Tensor, inputs: Tensor) -> Tensor:
        """Return features (N, E), not normalised, from the outputs of the last stage."""

    def stage_of(self, parameter: str) -> int:
        """Return the first stage that `parameter` acts in."""
        block = block_of(parameter)
        if block is not None and self.halves:
            return 2 * block + bool(_MLP_HALF.search(parameter))
        if block is not None:
            return block
        is_head = re.search(
            r"ln_post|proj$|proj\.weight$|ln_final|(^|\.)norm\.|fc_norm|head", parameter
        )
        return self.depth if is_head and "patch_embed" not in parameter else EMBED

    def advance(self, x: Tensor, inputs: Tensor, start: int, stop: int) -> Tensor:
        """Run stages `start` to `stop` (not included) on `x`, the inputs of stage `start`."""
        if start == EMBED and stop > EMBED:
            with FastProducts():
                x, start = self.embed(x), 0
            if x.dtype in (torch.bfloat16, torch.float16):
                # In 16 bits, every sum of the residual stream would be rounded.
                x = x.float()
        for index in range(start, min(stop, self.depth)):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(self._stage, index, x, inputs, use_reentrant=False)
            else:
                x = self._stage(index, x, inputs)
        return x

    def _stage(self, index: int, x: Tensor, inputs: Tensor) -> Tensor:
        if self.halves:  # Halves of blocks ask for fast products themselves.
            return self.stage(index, x, inputs)
        with FastProducts():
            return self.stage(index, x, inputs)

    def features(self, x: Tensor, inputs: Tensor, start: int = EMBED) -> Tensor:
        """Return unit features from the inputs `x` of stage `start`."""
        x = self.advance(x, inputs, start, self.depth)
        with FastProducts():
            outputs = self.head(x, inputs)
        return F.normalize(outputs.float(), dim=-1)

    def lengths(self, inputs: Tensor) -> Tensor:
        """Return the number of positions of each row that can influence its features."""
        return torch.full(inputs.shape[:1], inputs.shape[1], device=inputs.device)

    def counted(self, inputs: Tensor) -> Tensor:
        """Return the mask of positions that can influence features, (rows, positions)."""
        positions = torch.arange(inputs.shape[1], device=inputs.device)
        return positions < self.lengths(inputs).unsqueeze(1)

    def trim(self, inputs: Tensor) -> Tensor:
        """Return token ids without trailing positions that influence no features."""
        return inputs[:, : int(self.lengths(inputs).max())]


class OpenClipVision(SplitTower):
    """open_clip's VisionTransformer."""

    def __init__(self, visual: Any) -> None:
        self.visual = visual
        self.blocks = visual.transformer.resblocks
        self.halves = all(map(_is_plain, self.blocks))
        self.depth = len(self.blocks) * (1 + self.halves)
        self.one_token = self.halves and visual.attn_pool is None and visual.pool_type == "tok"

    def embed(self, inputs: Tensor) -> Tensor:
        """Return the normalised patch and class tokens."""
        return _tensor(self.visual._embeds(inputs))

    def stage(self, index: int, x: Tensor, inputs: Tensor) -> Tensor:
        """Run half a block; the last one only for the class token if nothing else is pooled."""
        if not self.halves:
            return _tensor(self.blocks[index](x))
        if index % 2:
            return mlp_half(self.blocks[index // 2], x)
        last = index == self.depth - 2 and self.one_token
        return attention_half(
            self.blocks[index // 2], x, keep=x.new_zeros(x.shape[0]) if last else None
        )

    def head(self, x: Tensor, inputs: Tensor) -> Tensor:
        """Pool, normalise and project."""
        pooled = self.visual.ln_post(x) if self.one_token else self.visual._pool(x)[0]
        return _tensor(pooled if self.visual.proj is None else pooled @ self.visual.proj)


class OpenClipText(SplitTower):
    """The text tower of open_clip's CLIP, or of CustomTextCLIP or CoCa under `text`.

    CoCa's appends a class token, whose state is its features, and masks padding.
    """

    def __init__(self, owner: Any, pool_type: str, eos_id: int | None) -> None:
        self.owner = owner
        self.blocks = owner.transformer.resblocks
        self.halves = all(map(_is_plain, self.blocks))
        self.depth = len(self.blocks) * (1 + self.halves)
        self.pool_type = pool_type
        self.eos_id = eos_id
        self.causal = owner.attn_mask is not None
        self.has_class = getattr(owner, "cls_emb", None) is not None
        self.shortens = self.causal and pool_type in ("argmax", "eos") and not self.has_class

    @property
    def token_table(self) -> Tensor:
        """The embeddings of the tokens."""
        return _tensor(self.owner.token_embedding.weight)

    def lengths(self, inputs: Tensor) -> Tensor:
        """Count up to the end of text: under a causal mask, later positions have no influence."""
        return self.pooled_at(inputs) + 1 if self.shortens else super().lengths(inputs)

    def counted(self, inputs: Tensor) -> Tensor:
        """Return the mask of positions that can influence features, with CoCa's class token."""
        seen = self.seen(inputs)
        if seen is None:
            return super().counted(inputs)
        return torch.cat([seen[:, :-1], torch.ones_like(seen[:, -1:])], dim=1)

    def seen(self, inputs: Tensor) -> Tensor | None:
        """Return the mask of keys, (rows, positions); None if attention sees all.

        As CoCa's weights were trained, the mask of the padding is one position late.
        """
        if not self.has_class:
            return None
        texts = inputs != self.owner.pad_id
        parts = [texts, torch.ones_like(texts[:, :1])]
        return torch.cat(parts if self.owner.correct_cls_mask else parts[::-1], dim=1)

    def embed(self, inputs: Tensor) -> Tensor:
        """Return token plus position embeddings."""
        x = self.owner.token_embedding(inputs)
        if self.has_class:
            x = torch.cat([x, self.owner.cls_emb.expand(len(x), 1, -1)], dim=1)
        return _tensor(x + self.owner.positional_embedding[: x.shape[1]])

    def stage(self, index: int, x: Tensor, inputs: Tensor) -> Tensor:
        """Run half a block; the last one only for the pooled token."""
        if not self.halves:
            length = x.shape[1]
            mask = self.owner.attn_mask[:length, :length] if self.causal else None
            return _tensor(self.blocks[index](x, attn_mask=mask))
        if index % 2:
            return mlp_half(self.blocks[index // 2], x)
        keep = self.pooled_at(inputs) if index == self.depth - 2 else None
        return attention_half(
            self.blocks[index // 2], x, causal=self.causal, seen=self.seen(inputs), keep=keep
        )

    def head(self, x: Tensor, inputs: Tensor) -> Tensor:
        """Normalise, pool and project."""
        if not self.halves:
            x = x[torch.arange(x.shape[0], device=x.device), self.pooled_at(inputs)]
        x = self.owner.ln_final(x)
        projection = self.owner.text_projection
        if projection is None:
            return x
        return _tensor(projection(x) if isinstance(projection, nn.Linear) else x @ projection)

    def states(self, inputs: Tensor) -> Tensor:
        """Return the normalised states of all positions, (rows, positions, width)."""
        x, seen = self.embed(inputs), self.seen(inputs)
        for index, block in enumerate(self.blocks):
            if self.halves:
                x = mlp_half(block, attention_half(block, x, causal=self.causal, seen=seen))
            else:
                x = self.stage(index, x, inputs)
        return _tensor(self.owner.ln_final(x))

    def pooled_at(self, inputs: Tensor) -> Tensor:
        """Return the position whose state is pooled, for each row."""
        rows, length = inputs.shape
        if self.has_class:
            return torch.full((rows,), length, device=inputs.device)
        if self.pool_type == "argmax":
            return inputs.argmax(dim=-1)
        if self.pool_type == "eos":
            return torch.eq(inputs, self.eos_id or 0).int().argmax(dim=-1)
        position = length - 1 if self.pool_type == "last" else 0
        return torch.full((rows,), position, device=inputs.device)


class TimmVision(SplitTower):
    """timm's plain and EVA vision transformers inside open_clip's adapter."""

    def __init__(self, visual: Any) -> None:
        self.trunk = visual.trunk
        self.blocks = self.trunk.blocks
        self.end = _timm_end(visual, "norm")
        self.depth = len(self.blocks)
        self.rope: Tensor | None = None

    def embed(self, inputs: Tensor) -> Tensor:
        """Return patch tokens with their positions."""
        x = self.trunk._pos_embed(self.trunk.patch_embed(inputs))
        if isinstance(x, tuple):
            x, self.rope = x[0], x[1]
        for name in ("patch_drop", "norm_pre"):
            layer = getattr(self.trunk, name, None)
            x = x if layer is None else layer(x)
        return _tensor(x)

    def stage(self, index: int, x: Tensor, inputs: Tensor) -> Tensor:
        """Run one block of the trunk."""
        block = self.blocks[index]
        return _tensor(block(x) if self.rope is None else block(x, rope=self.rope))

    def head(self, x: Tensor, inputs: Tensor) -> Tensor:
        """Normalise, pool and project."""
        return self.end(x)


class _Staged(SplitTower):
    """A tower that runs one part after another.

    `parts` maps prefixes of parameter names to the modules of the stages; `behind` are the
    prefixes of the head.
    """

    def __init__(self, parts: Mapping[str, Any], behind: Sequence[str]) -> None:
        self.parts = list(parts.values())
        self.depth = len(parts)
        self._stages = {f"{name}.": stage for stage, name in enumerate(parts)}
        self._stages |= {f"{name}.": self.depth for name in behind}

    def stage_of(self, parameter: str) -> int:
        """Return the first stage that `parameter` acts in."""
        starts = (at for name, at in self._stages.items() if parameter.startswith(name))
        return next(starts, EMBED)


class StagedVision(_Staged):
    """A vision tower of parts between `stem` and `end`: a ResNet, or one of timm's in stages."""

    def __init__(
        self,
        stem: Callable[[Tensor], Tensor],
        parts: Mapping[str, Any],
        end: Callable[[Tensor], Tensor],
        behind: Sequence[str],
    ) -> None:
        parts = {f"visual.{name}": part for name, part in parts.items()}
        super().__init__(parts, [f"visual.{name}" for name in behind])
        self.stem, self.end = stem, end

    def embed(self, inputs: Tensor) -> Tensor:
        """Return the outputs of the stem."""
        return _tensor(self.stem(inputs))

    def stage(self, index: int, x: Tensor, inputs: Tensor) -> Tensor:
        """Run one part."""
        return _tensor(self.parts[index](x))

    def head(self, x: Tensor, inputs: Tensor) -> Tensor:
        """Pool, normalise and project."""
        return _tensor(self.end(x))


class HuggingFaceText(_Staged):
    """A text tower of transformers in open_clip's adapter, whose attention masks padding.

    The encoder is a BERT, RoBERTa, XLM-R, mT5 or M2M100 (NLLB): one of `KINDS`.
    """

    # For each encoder: the module with its blocks, and the module after them.
    KINDS: ClassVar = {
        "BertModel": ("encoder.layer", "pooler"),
        "RobertaModel": ("encoder.layer", "pooler"),
        "XLMRobertaModel": ("encoder.layer", "pooler"),
        "MT5Stack": ("block", "final_layer_norm"),
        "M2M100Encoder": ("layers", "layer_norm"),
    }

    def __init__(self, adapter: Any) -> None:
        self.adapter, self.encoder = adapter, adapter.transformer
        self.kind = _kind(self.encoder)
        blocks, self.last = self.KINDS[self.kind]
        place = f"text.transformer.{blocks}"
        parts = {
            f"{place}.{i}": block for i, block in enumerate(self.encoder.get_submodule(blocks))
        }
        super().__init__(parts, [f"text.transformer.{self.last}", "text.proj"])

    @classmethod
    def fits(cls, text: Any) -> bool:
        """Return whether a text tower is an adapter of a known encoder with known attention."""
        config = getattr(getattr(text, "transformer", None), "config", None)
        return (
            _kind(text) == "HFTextEncoder"
            and _kind(text.transformer) in cls.KINDS
            and config is not None
            and not getattr(config, "is_decoder", False)
            and config._attn_implementation in ("eager", "sdpa")
        )

    def lengths(self, inputs: Tensor) -> Tensor:
        """Count up to the last token that is not padding: later positions are masked."""
        places = torch.arange(1, inputs.shape[1] + 1, device=inputs.device)
        return (self.counted(inputs) * places).amax(dim=1).clamp(min=1)

    def counted(self, inputs: Tensor) -> Tensor:
        """Return the mask of tokens that are not padding."""
        return _tensor(inputs != self.adapter.config.pad_token_id)

    def embed(self, inputs: Tensor) -> Tensor:
        """Return the embeddings of tokens, with the positions of the family."""
        encoder = self.encoder
        if self.kind == "MT5Stack":
            return _tensor(encoder.embed_tokens(inputs))
        if self.kind == "M2M100Encoder":
            x = encoder.embed_tokens(inputs)
            return _tensor(x + encoder.embed_positions(inputs, x))
        return _tensor(encoder.embeddings(input_ids=inputs))

    def stage(self, index: int, x: Tensor, inputs: Tensor) -> Tensor:
        """Run one block; the first block of mT5 has the position bias of all blocks."""
        lowest = torch.finfo(x.dtype).min
        hidden = torch.zeros(inputs.shape, dtype=x.dtype, device=x.device)
        mask = hidden.masked_fill(~self.counted(inputs), lowest)[:, None, None, :]
        if self.kind == "MT5Stack":
            attention, length = self.parts[0].layer[0].SelfAttention, x.shape[1]
            bias = attention.compute_bias(length, length, device=x.device)
            outputs = self.parts[index](x, position_bias=bias + mask)
        else:
            outputs = self.parts[index](x, attention_mask=mask)
        return _tensor(outputs[0] if isinstance(outputs, tuple) else outputs)

    def head(self, x: Tensor, inputs: Tensor) -> Tensor:
        """Normalise or pool as the family does, pool and project as open_clip does."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        last = getattr(self.encoder, self.last)
        pooled = None
        if self.last == "pooler":
            pooled = None if last is None else last(x)
        else:
            x = last(x)
        states = BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=pooled)
        return _tensor(self.adapter.proj(self.adapter.pooler(states, self.counted(inputs).long())))


# The modules of timm's towers before the stages, with the stages, and after them.
_TIMM_STAGES = {
    "ConvNeXt": ("stem", "stages", "norm_pre"),
    "FastVit": ("stem", "stages", "final_conv"),
    "SwinTransformer": ("patch_embed", "layers", "norm"),
}
# Modules of a stage before its blocks.
_BEFORE_BLOCKS = ("downsample", "pos_emb")


def _resnet(visual: Any) -> StagedVision:
    parts = {
        f"{layer}.{index}": block
        for layer in ("layer1", "layer2", "layer3", "layer4")
        for index, block in enumerate(getattr(visual, layer))
    }
    return StagedVision(visual.stem, parts, visual.attnpool, ("attnpool",))


def _timm_stages(visual: Any) -> StagedVision:
    trunk = visual.trunk
    stem, stages, last = _TIMM_STAGES[_kind(trunk)]
    parts: dict[str, Any] = {}
    for index, stage in enumerate(getattr(trunk, stages)):
        place = f"trunk.{stages}.{index}"
        before = {f"{place}.{name}": getattr(stage, name, None) for name in _BEFORE_BLOCKS}
        parts |= {
            name: part for name, part in before.items() if not isinstance(part, nn.Identity | None)
        }
        parts |= {f"{place}.blocks.{i}": block for i, block in enumerate(stage.blocks)}

    behind = (f"trunk.{last}", "trunk.head", "head")
    return StagedVision(getattr(trunk, stem), parts, _timm_end(visual, last), behind)


def _relative_positions(visual: Any) -> StagedVision:
    """Return timm's vision transformer with relative positions in each block."""
    trunk = visual.trunk

    def stem(inputs: Tensor) -> Tensor:
        x = _tensor(trunk.patch_embed(inputs))
        if trunk.cls_token is None:
            return x
        return torch.cat([trunk.cls_token.expand(len(x), -1, -1), x], dim=1)

    parts = {f"trunk.blocks.{index}": block for index, block in enumerate(trunk.blocks)}
    behind = ("trunk.norm", "trunk.fc_norm", "trunk.head", "head")
    return StagedVision(stem, parts, _timm_end(visual, "norm"), behind)


def _timm_end(visual: Any, last: str) -> Callable[[Tensor], Tensor]:
    """Return the function that pools and projects after module `last` of a timm tower."""
    trunk = visual.trunk
    return lambda x: _tensor(visual.head(trunk.forward_head(getattr(trunk, last)(x))))


class WholeTower(SplitTower):
    """A tower of unknown structure: every edit runs the whole tower again."""

    depth = 0
    exact_split = False

    def __init__(self, encode: Any, padding: int | None = None) -> None:
        self.encode = encode
        self._padding = padding

    def counted(self, inputs: Tensor) -> Tensor:
        """Return the mask of tokens that are not padding, if the tower masks padding."""
        if self._padding is None:
            return super().counted(inputs)
        return _tensor(inputs != self._padding)

    def stage_of(self, parameter: str) -> int:
        """Return EMBED: any stage may be affected."""
        return EMBED

    def embed(self, inputs: Tensor) -> Tensor:
        """Return the features."""
        return _tensor(self.encode(inputs))

    def stage(self, index: int, x: Tensor, inputs: Tensor) -> Tensor:
        """Raise IndexError: there are no stages."""
        raise IndexError(index)

    def head(self, x: Tensor, inputs: Tensor) -> Tensor:
        """Return the features."""
        return x


def vision_tower(model: Any) -> SplitTower:
    """Return the vision tower of an open_clip model."""
    visual, whole = model.visual, WholeTower(model.encode_image)
    kind = _kind(visual)
    if kind == "VisionTransformer" and _batch_first(visual.transformer):
        return OpenClipVision(visual)
    trunk: Any = getattr(visual, "trunk", None)
    if kind == "TimmModel" and _kind(trunk) in ("VisionTransformer", "Eva"):
        return TimmVision(visual)
    if kind == "ModifiedResNet":
        return _resnet(visual)
    if kind == "TimmModel" and _kind(trunk) in _TIMM_STAGES:
        return _timm_stages(visual)
    if kind == "TimmModel" and _kind(trunk) == "VisionTransformerRelPos":
        return _relative_positions(visual) if trunk.shared_rel_pos is None else whole
    return whole


def text_tower(model: Any) -> SplitTower:
    """Return the text tower of an open_clip model."""
    if _kind(model) == "CLIP" and _batch_first(model.transformer):
        return OpenClipText(model, model.text_pool_type, model.text_eos_id)
    text: Any = getattr(model, "text", None)
    if HuggingFaceText.fits(text):
        return HuggingFaceText(text)
    if _kind(text) == "HFTextEncoder":
        return WholeTower(model.encode_text, text.config.pad_token_id)
    is_plain = _kind(text) == "TextTransformer" and _batch_first(text.transformer)
    if is_plain and not text.use_pad_mask and text.pool_type != "none":
        tower = OpenClipText(text, text.pool_type, text.eos_id)
        return tower if tower.halves or not tower.has_class else WholeTower(model.encode_text)
    return WholeTower(model.encode_text)


def _is_plain(block: Any) -> bool:
    """Return whether the two halves are equivalent to `block`."""
    attention = getattr(block, "attn", None)
    return (
        _kind(block) == "ResidualAttentionBlock"
        and not hasattr(block, "ln_1_kv")
        and isinstance(attention, nn.MultiheadAttention)
        and attention._qkv_same_embed_dim
        and attention.bias_k is None
        and not attention.add_zero_attn
    )


def _kind(module: Any) -> str:
    return type(module).__name__


def _batch_first(transformer: Any) -> bool:
    return bool(getattr(transformer, "batch_first", False))


def _tensor(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"a tower returned {type(value).__name__} where a tensor was expected")
    return value
