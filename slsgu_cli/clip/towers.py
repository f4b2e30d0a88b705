"""Towers that stop and resume at any stage, and the activations kept for it."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slsgu_cli.checkpoints.layers import block_of
from slsgu_cli.clip import processes

EMBED = -1
_MLP_HALF = re.compile(r"\.(?:ln_2|mlp|ls_2)\.")


class SplitTower(ABC):
    """One tower; `inputs` are normalised pixels (N, 3, H, W) or token ids (N, L)."""

    depth: int
    halves = False
    checkpointing = False
    exact_split = True
    # The modules of the blocks, each of one stage or, in halves, of two.
    blocks: Sequence[Any] = ()
    # The model it is of where each process has a shard of every block, and gathers it to run it.
    sharded_model: Any = None

    @property
    def sharded(self) -> bool:
        """Whether all processes have to run it together."""
        return self.sharded_model is not None

    @property
    def token_table(self) -> Tensor | None:
        """What `embed` looks each token up in, (vocabulary, width); None where it does more.

        What enters stage 0 at a token's place is then its row plus what the token has no
        part in.
        """
        return None

    @abstractmethod
    def embed(self, inputs: Tensor) -> Tensor:
        """Return what enters stage 0."""

    @abstractmethod
    def stage(self, index: int, x: Tensor, inputs: Tensor) -> Tensor:
        """Return what leaves stage `index`; the last block may leave pooled rows."""

    @abstractmethod
    def head(self, x: Tensor, inputs: Tensor) -> Tensor:
        """Return features (N, E), not normalised, from what leaves the last stage."""

    def stage_of(self, parameter: str) -> int:
        """Return the first stage that `parameter` acts in."""
        block = block_of(parameter)
        if block is not None and self.halves:
            # The halves of a sharded block run together.
            return 2 * block + bool(_MLP_HALF.search(parameter) and not self.sharded)
        if block is not None:
            return block
        is_head = re.search(
            r"ln_post|proj$|proj\.weight$|ln_final|(^|\.)norm\.|fc_norm|head", parameter
        )
        return self.depth if is_head and "patch_embed" not in parameter else EMBED

    def advance(self, x: Tensor, inputs: Tensor, start: int, stop: int) -> Tensor:
        """Run stages `start` to `stop` (not included) on `x`, which enters stage `start`."""
        if start == EMBED and stop > EMBED:
            x, start = _widened(self.embed(x)), 0
        if self.sharded and self.halves:
            # Both halves while the block's weights are here.
            for block in self.blocks[start // 2 : stop // 2]:
                x = block.both_halves(x, inputs)
            return x
        return self._through(x, inputs, start, min(stop, self.depth))

    def run(self, forward: Callable[[], Tensor], start: int = EMBED) -> Tensor:
        """Return what `forward` makes with the stages from `start` on.

        All processes must run those of a sharded model.
        """
        if not self.sharded:
            return forward()
        first = max(start, 0) // (1 + self.halves)
        return processes.run(self.sharded_model, forward, blocks=self.blocks[first:])

    def shard(self, model: Any) -> None:
        """Gather the weights of each block when it runs, as the processes have each a part."""
        self.sharded_model = model
        for index, block in enumerate(self.blocks if self.halves else ()):
            halves = partial(self._through, start=2 * index, stop=2 * index + 2)
            processes.gathering(block, "both_halves", halves)

    def _through(self, x: Tensor, inputs: Tensor, start: int, stop: int) -> Tensor:
        for index in range(start, stop):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(self.stage, index, x, inputs, use_reentrant=False)
            else:
                x = self.stage(index, x, inputs)
        return x

    def features(self, x: Tensor, inputs: Tensor, start: int = EMBED) -> Tensor:
        """Return unit features from what enters stage `start`."""
        x = self.advance(x, inputs, start, self.depth)
        return F.normalize(self.head(x, inputs).float(), dim=-1)

    def lengths(self, inputs: Tensor) -> Tensor:
        """Return how many positions of each row can influence its features."""
        return torch.full(inputs.shape[:1], inputs.shape[1], device=inputs.device)

    def counted(self, inputs: Tensor) -> Tensor:
        """Return which positions of each row can influence its features, (rows, positions)."""
        positions = torch.arange(inputs.shape[1], device=inputs.device)
        return positions < self.lengths(inputs).unsqueeze(1)

    def trim(self, inputs: Tensor) -> Tensor:
        """Return token ids without the positions that influence no row's features."""
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
        """Run half a block, the last one for the class token only if that is all that counts."""
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
    """The text tower of open_clip's CLIP, or of CustomTextCLIP under `text`."""

    def __init__(self, owner: Any, pool_type: str, eos_id: int | None) -> None:
        self.owner = owner
        self.blocks = owner.transformer.resblocks
        self.halves = all(map(_is_plain, self.blocks))
        self.depth = len(self.blocks) * (1 + self.halves)
        self.pool_type = pool_type
        self.eos_id = eos_id
        self.causal = owner.attn_mask is not None
        self.shortens = self.causal and pool_type in ("argmax", "eos")

    @property
    def token_table(self) -> Tensor:
        """The embeddings of the tokens."""
        return _tensor(self.owner.token_embedding.weight)

    def lengths(self, inputs: Tensor) -> Tensor:
        """Count up to the end of text: under a causal mask no later position reaches it."""
        return self.pooled_at(inputs) + 1 if self.shortens else super().lengths(inputs)

    def embed(self, inputs: Tensor) -> Tensor:
        """Return token plus position embeddings."""
        x = self.owner.token_embedding(inputs)
        return _tensor(x + self.owner.positional_embedding[: inputs.shape[1]])

    def stage(self, index: int, x: Tensor, inputs: Tensor) -> Tensor:
        """Run half a block, the last one for the pooled token only."""
        if not self.halves:
            length = x.shape[1]
            mask = self.owner.attn_mask[:length, :length] if self.causal else None
            return _tensor(self.blocks[index](x, attn_mask=mask))
        if index % 2:
            return mlp_half(self.blocks[index // 2], x)
        keep = self.pooled_at(inputs) if index == self.depth - 2 else None
        return attention_half(self.blocks[index // 2], x, causal=self.causal, keep=keep)

    def head(self, x: Tensor, inputs: Tensor) -> Tensor:
        """Normalise, pool and project."""
        if not self.halves:
            x = x[torch.arange(x.shape[0], device=x.device), self.pooled_at(inputs)]
        x = self.owner.ln_final(x)
        projection = self.owner.text_projection
        if projection is None:
            return x
        return _tensor(projection(x) if isinstance(projection, nn.Linear) else x @ projection)

    def pooled_at(self, inputs: Tensor) -> Tensor:
        """Return the position of each row whose state becomes its features."""
        rows = inputs.shape[0]
        if self.pool_type == "argmax":
            return inputs.argmax(dim=-1)
        if self.pool_type == "eos":
            return torch.eq(inputs, self.eos_id or 0).int().argmax(dim=-1)
        position = inputs.shape[1] - 1 if self.pool_type == "last" else 0
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


class StagedVision(SplitTower):
    """A vision tower that runs one part after another: a ResNet, or one of timm's in stages.

    `parts` are the modules between `stem` and `end`, and `behind` the modules in `end`, by what
    the names of their parameters begin with.
    """

    def __init__(
        self,
        stem: Callable[[Tensor], Tensor],
        parts: Mapping[str, Any],
        end: Callable[[Tensor], Tensor],
        behind: Sequence[str],
    ) -> None:
        self.stem, self.end = stem, end
        self.parts = list(parts.values())
        self.depth = len(parts)
        self._stages = {f"visual.{name}.": stage for stage, name in enumerate(parts)}
        self._stages |= {f"visual.{name}.": self.depth for name in behind}

    def stage_of(self, parameter: str) -> int:
        """Return the first stage that `parameter` acts in."""
        starts = (at for name, at in self._stages.items() if parameter.startswith(name))
        return next(starts, EMBED)

    def embed(self, inputs: Tensor) -> Tensor:
        """Return what leaves the stem."""
        return _tensor(self.stem(inputs))

    def stage(self, index: int, x: Tensor, inputs: Tensor) -> Tensor:
        """Run one part."""
        return _tensor(self.parts[index](x))

    def head(self, x: Tensor, inputs: Tensor) -> Tensor:
        """Pool, normalise and project."""
        return _tensor(self.end(x))


# Of timm's towers: the parts before, in and behind the stages.
_TIMM_STAGES = {
    "ConvNeXt": ("stem", "stages", "norm_pre"),
    "FastVit": ("stem", "stages", "final_conv"),
    "SwinTransformer": ("patch_embed", "layers", "norm"),
}
# Of a stage, what comes before its blocks.
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
        parts |= {name: part for name, part in before.items() if _runs(part)}
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
    """Return what pools and projects behind the `last` part of a tower of timm's."""
    trunk = visual.trunk
    return lambda x: _tensor(visual.head(trunk.forward_head(getattr(trunk, last)(x))))


def _runs(module: Any) -> bool:
    return module is not None and not isinstance(module, nn.Identity)


class WholeTower(SplitTower):
    """A tower whose inside is unknown: every edit runs the whole of it again."""

    depth = 0
    exact_split = False

    def __init__(self, encode: Any, visible: Callable[[Tensor], Tensor] | None = None) -> None:
        self.encode = encode
        self._visible = visible

    def counted(self, inputs: Tensor) -> Tensor:
        """Return what is no padding, of a text tower that hides padding from attention."""
        return super().counted(inputs) if self._visible is None else self._visible(inputs)

    def stage_of(self, parameter: str) -> int:
        """Return EMBED: nothing is known to be unaffected."""
        return EMBED

    def embed(self, inputs: Tensor) -> Tensor:
        """Return the features; there is nothing to stop at."""
        return _tensor(self.encode(inputs))

    def stage(self, index: int, x: Tensor, inputs: Tensor) -> Tensor:
        """Raise: there are no stages."""
        raise IndexError(index)

    def head(self, x: Tensor, inputs: Tensor) -> Tensor:
        """Return the features."""
        return x


def vision_tower(model: Any) -> SplitTower:
    """Return the vision tower of an open_clip model, which may be sharded."""
    return _in_shards(_vision(model), model)


def text_tower(model: Any) -> SplitTower:
    """Return the text tower of an open_clip model, which may be sharded."""
    return _in_shards(_text(model), model)


def _in_shards(tower: SplitTower, model: Any) -> SplitTower:
    if processes.has_shards(model):
        tower.shard(model)
    return tower


def _vision(model: Any) -> SplitTower:
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


def _text(model: Any) -> SplitTower:
    if _kind(model) == "CLIP" and _batch_first(model.transformer):
        return OpenClipText(model, model.text_pool_type, model.text_eos_id)
    text: Any = getattr(model, "text", None)
    is_plain = _kind(text) == "TextTransformer" and _batch_first(text.transformer)
    if is_plain and text.cls_emb is None and not text.use_pad_mask and text.pool_type != "none":
        return OpenClipText(text, text.pool_type, text.eos_id)
    return WholeTower(model.encode_text, _visible_in(text))


def _visible_in(text: Any) -> Callable[[Tensor], Tensor] | None:
    """Return what tells which positions attention sees, where a text tower hides its padding."""
    if _kind(text) == "HFTextEncoder":
        return lambda tokens: tokens != text.config.pad_token_id
    if _kind(text) != "TextTransformer" or text.cls_emb is None or text.attn_mask is None:
        return None

    def seen_by_class(tokens: Tensor) -> Tensor:
        """Count the tokens and the class token behind them, which alone leaves the tower.

        As CoCa's weights were trained, what hides the padding is one position too late.
        """
        seen, one = tokens != text.pad_id, torch.ones_like(tokens[:, :1], dtype=torch.bool)
        parts = [seen, one] if text.correct_cls_mask else [one, seen[:, :-1], one]
        return torch.cat(parts, dim=1)

    return seen_by_class


def attention_half(
    block: Any, x: Tensor, *, causal: bool = False, keep: Tensor | None = None
) -> Tensor:
    """Run the attention of an open_clip residual block by one fused projection and kernel.

    With `keep`, the position of one token a row, only that token leaves the block, as
    (rows, width): keys and values of all tokens, everything else of one.
    """
    rows, length, width = x.shape
    attention = block.attn
    heads, size = attention.num_heads, width // attention.num_heads
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    normed = block.ln_1(x)
    if keep is None:
        q, k, v = F.linear(normed, weight, bias).view(rows, length, 3, heads, size).unbind(2)
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal
        )
        mixed = mixed.transpose(1, 2).reshape(rows, length, width)
    else:
        here = (torch.arange(rows, device=x.device), keep.long())
        query = F.linear(normed[here], weight[:width], None if bias is None else bias[:width])
        packed = F.linear(normed, weight[width:], None if bias is None else bias[width:])
        k, v = packed.view(rows, length, 2, heads, size).unbind(2)
        visible = _visible(keep, length) if causal else None
        mixed = F.scaled_dot_product_attention(
            query.view(rows, heads, 1, size), k.transpose(1, 2), v.transpose(1, 2), visible
        ).reshape(rows, width)
        x = x[here]
    projected = F.linear(mixed, attention.out_proj.weight, attention.out_proj.bias)
    return _tensor(x + block.ls_1(projected))


@dataclass(frozen=True, slots=True)
class Stretch:
    """Positions in a row of packed states: of `rows` prompts `length` each, from `start` on.

    All of these prompts begin with the positions `beginning`, which lie before them; None
    where the stretch is a beginning itself.
    """

    start: int
    rows: int
    length: int
    beginning: range | None

    def of(self, states: Tensor) -> Tensor:
        """Return the states of its positions, (rows, length, ...)."""
        part = states[self.start : self.start + self.rows * self.length]
        return part.view(self.rows, self.length, *states.shape[1:])

    def with_beginning(self, states: Tensor) -> Tensor:
        """Return the states of the prompts from their beginning on."""
        rest = self.of(states)
        if not self.beginning:
            return rest
        before = states[self.beginning.start : self.beginning.stop]
        return torch.cat([before.expand(self.rows, *before.shape), rest], dim=1)


def stretched_attention(
    block: Any, x: Tensor, stretches: Sequence[Stretch], *, ends: bool = False
) -> Tensor:
    """Run the causal attention of an open_clip residual block over packed states.

    With `ends`, only the last position of each prompt leaves it, stretch by stretch; of
    beginnings none does.
    """
    attention, width = block.attn, x.shape[1]
    projected = F.linear(block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias)
    states = projected.view(len(x), 3, attention.num_heads, width // attention.num_heads)
    q, k, v = states.unbind(1)
    mixed, leaving = [], []
    for stretch in stretches:
        if ends and stretch.beginning is None:
            continue
        query, keys, values = stretch.of(q), stretch.with_beginning(k), stretch.with_beginning(v)
        if ends:
            query = query[:, -1:]
            leaving.append(stretch.of(x)[:, -1])
        before = keys.shape[1] - query.shape[1]
        visible = x.new_ones(query.shape[1], keys.shape[1], dtype=torch.bool).tril(before)
        after = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            visible if before and query.shape[1] > 1 else None,
            is_causal=not before,
        )
        mixed.append(after.transpose(1, 2).reshape(-1, width))
    projected = F.linear(torch.cat(mixed), attention.out_proj.weight, attention.out_proj.bias)
    return _tensor((torch.cat(leaving) if ends else x) + block.ls_1(projected))


def mlp_half(block: Any, x: Tensor) -> Tensor:
    """Run the MLP of an open_clip residual block."""
    return _tensor(x + block.ls_2(block.mlp(block.ln_2(x))))


def _widened(x: Tensor) -> Tensor:
    """Return what blocks add to, in fp32 where a 16-bit pass would round every sum."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _visible(keep: Tensor, length: int) -> Tensor:
    """Return which positions the kept token of each row may look at."""
    return (torch.arange(length, device=keep.device) <= keep.unsqueeze(1))[:, None, None, :]


def _is_plain(block: Any) -> bool:
    """Return whether the two halves together compute what `block` computes."""
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
    """Return the name of a module's type; one that is sharded has a type of its own."""
    return type(module).__name__.removeprefix("FSDP")


def _batch_first(transformer: Any) -> bool:
    return bool(getattr(transformer, "batch_first", False))


def _tensor(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"a tower returned {type(value).__name__} where a tensor was expected")
    return value


@dataclass(slots=True)
class CacheBudget:
    """Bytes of activations that may still be kept."""

    left: int

    def take(self, size: int) -> bool:
        """Reserve `size` bytes if they are left."""
        if size > self.left:
            return False
        self.left -= size
        return True


class Activations:
    """What enters one stage, of as many of `rows` rows as there is room for.

    Those whose keys are least are kept. `places` tells where a row lies in `values`, -1 for
    a row that is not kept.
    """

    def __init__(self, rows: int, room: int, like: Tensor) -> None:
        self.values = like.new_empty(room, *like.shape[1:])
        self.places = torch.full((rows,), -1, device=like.device)
        self._rows = torch.full((room,), -1, device=like.device)
        self._keys = torch.full((room,), float("inf"), device=like.device)

    def offer(self, rows: Tensor, x: Tensor, keys: Tensor) -> None:
        """Keep what enters for `rows`, in place of other rows whose keys are greater."""
        if len(self.values) == len(self.places):
            self.values[rows] = x
            self.places[rows] = rows
            return
        chosen = torch.zeros(len(self._keys) + len(x), dtype=torch.bool, device=x.device)
        chosen[torch.cat([self._keys, keys]).topk(len(self._keys), largest=False).indices] = True
        old, new = torch.split(chosen, [len(self._keys), len(x)])
        freed, entering = (~old).nonzero().squeeze(1), new.nonzero().squeeze(1)
        left = self._rows[freed]
        self.places[left[left >= 0]] = -1
        self.values[freed] = x[entering]
        self.places[rows[entering]] = freed
        self._rows[freed], self._keys[freed] = rows[entering], keys[entering]


def room_for_all(
    entering: Mapping[int, Tensor], rows: int, budget: CacheBudget
) -> dict[int, Activations]:
    """Make room for all of `rows` rows where it is left, at the deepest stages first.

    `entering` is what enters each stage, for some rows. The deepest save the most.
    """
    return {
        stage: Activations(rows, rows, entering[stage])
        for stage in sorted(entering, reverse=True)
        if budget.take(rows * entering[stage][0].nbytes)
    }


def room_for_some(
    entering: Mapping[int, Tensor], rows: int, budget: CacheBudget, share: float
) -> dict[int, Activations]:
    """Divide a share of what is left evenly among the stages, each for as many rows as fit.

    What a stage needs less is left to the others.
    """
    kept, left = {}, int(budget.left * share)
    stages = sorted(entering, key=lambda stage: entering[stage][0].nbytes)
    for index, stage in enumerate(stages):
        size = entering[stage][0].nbytes
        room = min(rows, left // (len(stages) - index) // size)
        left -= room * size
        if room and budget.take(room * size):
            kept[stage] = Activations(rows, room, entering[stage])
    return kept
