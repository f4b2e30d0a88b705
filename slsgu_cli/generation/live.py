"""A model in memory whose CLIP layers can take other values for a while.

Layers have open_clip's names and shapes here, wherever and however the model keeps them.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from shlex import quote

import torch
from torch import Tensor, nn

from slsgu_cli.edits import Edit
from slsgu_cli.errors import InputError, StaleError
from slsgu_cli.planning import by_layer
from slsgu_cli.targets.mapping import Home, Slot, homes, slots
from slsgu_cli.targets.target import Encoder
from slsgu_cli.weights import DIGEST_PRECISIONS, layer_digest
from slsgu_cli.zeroshot import edited


@dataclass(frozen=True, slots=True)
class LiveEncoder:
    """A CLIP tower inside a loaded model, and what the model reads of it."""

    module: nn.Module
    home: Home
    encoder: Encoder

    @classmethod
    def find(cls, module: nn.Module, encoder: Encoder) -> "LiveEncoder":
        """Return the CLIP tower among a module's parameters. Raises InputError."""
        tower = encoder.reach[0].tower
        found = [home for home in homes(dict(module.named_parameters())) if home.tower is tower]
        if not found:
            raise InputError(f"{encoder.name} as loaded has no CLIP {tower} tower")
        return cls(module, found[0], encoder)

    def slots(self, layer: str) -> tuple[Slot, ...]:
        """Return where the layer lies. Raises InputError where it has no influence or place."""
        if reason := self.encoder.why_not(layer):
            raise InputError(
                f"{layer} cannot influence {self.encoder.name}: {reason}",
                hint="search with --target, which leaves such layers out",
            )
        places = slots(layer, self.home)
        if not places:
            raise InputError(f"{self.encoder.name} has no layer {layer}")
        return places

    def value(self, layer: str) -> Tensor:
        """Return the layer's values now, in open_clip's shape."""
        return joined(self.slots(layer), [self._parameter(slot) for slot in self.slots(layer)])

    @contextmanager
    def edited(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Give layers other values for the length of a block."""
        with ExitStack() as stack:
            for layer, value in values.items():
                for slot in self.slots(layer):
                    own = self._parameter(slot).clone()
                    slot.rows(own).copy_(slot.take(value))
                    stack.enter_context(edited(self.module, slot.key, own))
            yield

    def parameters(self, layer: str) -> list[nn.Parameter]:
        """Return the parameters that hold a layer, in order."""
        return [self.module.get_parameter(slot.key) for slot in self.slots(layer)]

    def _parameter(self, slot: Slot) -> Tensor:
        return self.module.get_parameter(slot.key).data


def joined(places: Sequence[Slot], parts: Sequence[Tensor]) -> Tensor:
    """Return a layer in open_clip's shape from values in the shape of the tensors it lies in."""
    straight = [slot.held(part) for slot, part in zip(places, parts, strict=True)]
    return straight[0] if len(straight) == 1 else torch.cat(straight)


def new_values(live: Sequence[LiveEncoder], edits: Sequence[Edit]) -> list[dict[str, Tensor]]:
    """Return for each encoder the values that edits give its layers.

    An edit goes to the encoder that holds the weights it was made for. Raises StaleError
    where none does, InputError where its layer has no influence, UsageError where one edit
    changes a whole parameter and another a third of it.
    """
    values: list[dict[str, Tensor]] = [{} for _ in live]
    for edit in (edit for group in by_layer(edits).values() for edit in group):
        layer = edit.header.layer
        place = _home_of(live, edit)
        now = values[place].get(layer)
        now = live[place].value(layer).float() if now is None else now
        delta = torch.from_numpy(edit.delta()).to(now.device)
        values[place][layer] = now + edit.factor * delta
    return values


def _home_of(live: Sequence[LiveEncoder], edit: Edit) -> int:
    header = edit.header
    reached = [n for n, one in enumerate(live) if one.encoder.why_not(header.layer) is None]
    if not reached:
        live[0].slots(header.layer)
    for number in reached:
        values = live[number].value(header.layer).float().cpu().numpy()
        known = set(header.digests.values())
        if any(layer_digest(values, precision) in known for precision in DIGEST_PRECISIONS):
            return number
    raise StaleError(
        f"the target's {header.layer} is not the layer that the edit {header.name} was made for "
        f"({header.model})",
        hint=f"a target built on the model that `slsgu search {quote(header.name)}` edited",
    )
