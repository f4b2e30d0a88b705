"""How long the gradient passes take whose results the store holds.

A pass that was run for a comparison is timed as it runs. One that was found in the store
is run once more for its time alone, unless another comparison has timed it here before.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from time import perf_counter
from typing import TYPE_CHECKING

from slsgu_cli.baselines.records import Comparison, PassTime
from slsgu_cli.errors import SlsguError
from slsgu_cli.gradients import GradResult, compute_gradients, load_graded
from slsgu_cli.layout import comparison_path, gradient_path
from slsgu_cli.models import pick_device
from slsgu_cli.records import GradientHeader, GradientPointer, PassOptions, Precision, SetManifest
from slsgu_cli.store import Store

if TYPE_CHECKING:
    from torch import nn

ROLES = ("forget", "retain")


@dataclass
class PassTimes:
    """The times of the passes of one set, measured as they are asked for."""

    store: Store
    manifest: SetManifest
    asked_device: str
    known: dict[str, PassTime] = field(default_factory=dict)

    @cached_property
    def device(self) -> str:
        """The device of what is measured, once PyTorch has been asked what there is."""
        return pick_device(self.asked_device)

    @cached_property
    def where(self) -> str:
        """What the times are measured on, in words."""
        import torch

        if self.device.startswith("cuda"):
            return str(torch.cuda.get_device_name(self.device))
        return f"{self.device}, {torch.get_num_threads()} threads"

    def ensure(self, pointer: GradientPointer | None, *, squares: bool) -> GradientPointer:
        """Compute the gradients or squares that are missing, and note how long it took."""
        options = PassOptions(device=self.asked_device)
        if pointer is not None:
            precision = Precision(pointer.precision)
            options = replace(options, batch_size=pointer.batch_size, precision=precision)
        result: GradResult = compute_gradients(
            self.store,
            self.manifest.name,
            model=pointer.model if pointer else None,
            options=options,
            squares=squares,
        )
        for role, seconds in result.seconds.items():
            key = _key(getattr(result.pointer, role), squares)
            self.known[key] = PassTime(seconds, self.where)
        return result.pointer

    def seconds(
        self,
        pointer: GradientPointer,
        roles: Iterable[str],
        *,
        squares: bool,
        model: "nn.Module | None" = None,
    ) -> float:
        """Return what the passes of `roles` take; `model` is the original, if it is loaded."""
        total = 0.0
        for role in roles:
            key = _key(getattr(pointer, role), squares)
            if key not in self.known:
                found = self._elsewhere(key)
                if found is None:
                    model = model or load_graded(self.manifest, pointer, self.device)[1]
                    found = self._measure(model, pointer, role, squares)
                self.known[key] = found
            total += self.known[key].seconds
        return total

    def _elsewhere(self, key: str) -> PassTime | None:
        """Return the time that another comparison of the store has for the same pass."""
        for name in self.store.names("comparisons", ".json"):
            try:
                found = self.store.read_record(comparison_path(name), Comparison)
            except SlsguError:
                continue
            time = found.passes.get(key)
            if time is not None and time.where == self.where:
                return time
        return None

    def _measure(
        self, model: "nn.Module", pointer: GradientPointer, role: str, squares: bool
    ) -> PassTime:
        from slsgu_cli.gradpass import GradientPass
        from slsgu_cli.sets import DataBlock

        header = self.store.read_header(gradient_path(getattr(pointer, role)), GradientHeader)
        block = DataBlock.open(self.store, getattr(self.manifest, role))
        options = PassOptions(
            batch_size=min(header.batch_size, block.rows),
            precision=Precision(header.precision),
            device=self.device,
        )
        start = perf_counter()
        run = GradientPass.prepare(model, header.loss, spec=self.manifest.input, options=options)
        label = f"time of the {role} gradient"
        (run.run_squared if squares else run.run)(block, label)
        return PassTime(perf_counter() - start, self.where)


def _key(digest: str, squares: bool) -> str:
    return f"squares {digest}" if squares else digest
