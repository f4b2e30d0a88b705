"""Times of the gradient passes of a set, measured when they are needed."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from time import perf_counter

from torch import nn

from slsgu_cli.clip.devices import device_name
from slsgu_cli.clip.models import resolve
from slsgu_cli.engine.gradient_pass import GradientPass
from slsgu_cli.engine.gradients import compute_gradients, load_graded, open_pairs
from slsgu_cli.records.figures import PassTime
from slsgu_cli.records.method import GradientHeader, GradientPointer, Precision
from slsgu_cli.records.options import PassOptions
from slsgu_cli.records.sets import SetManifest
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.store import Store

ROLES = ("forget", "retain")


@dataclass
class PassTimes:
    """The times of the gradient passes of one set on a device.

    `known` has those measured or recorded so far, by the digest of the gradient.
    """

    store: Store
    manifest: SetManifest
    device: str
    known: dict[str, PassTime] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """The name of the device."""
        return device_name(self.device)

    def compute(self, pointer: GradientPointer | None, *, squares: bool) -> GradientPointer:
        """Compute missing gradients or squares, and record the time."""
        options = PassOptions(device=self.device)
        if pointer is not None:
            options = replace(
                options,
                batch_size=pointer.batch_size,
                precision=Precision(pointer.precision),
                prefixes=pointer.prefixes,
                anchor=pointer.anchor,
            )
        result = compute_gradients(
            self.store,
            self.manifest.name,
            model=pointer.model if pointer else None,
            options=options,
            squares=squares,
        )
        for role, seconds in result.seconds.items():
            key = _pass_key(getattr(result.pointer, role), squares)
            self.known[key] = PassTime(seconds, self.where)
        return result.pointer

    def seconds(
        self,
        pointer: GradientPointer,
        roles: Iterable[str],
        *,
        squares: bool,
        model: nn.Module | None = None,
    ) -> float:
        """Return the time of the passes of `roles`; `model` is the original, if it is loaded."""
        total = 0.0
        for role in roles:
            key = _pass_key(getattr(pointer, role), squares)
            if key not in self.known:
                model = model or load_graded(pointer, self.device)[1]
                self.known[key] = self._measure(model, pointer, role, squares)
            total += self.known[key].seconds
        return total

    def _measure(
        self, model: nn.Module, pointer: GradientPointer, role: str, squares: bool
    ) -> PassTime:
        path = Artifact.GRADIENT.path(getattr(pointer, role))
        header = self.store.read_header(path, GradientHeader)
        graded = resolve(pointer.model)
        prefixes, anchor = (pointer.prefixes, pointer.anchor) if role == "forget" else ((), None)
        block = open_pairs(self.store, self.manifest, role, prefixes, graded, anchor=anchor)
        options = PassOptions(
            batch_size=min(header.batch_size, block.rows),
            precision=Precision(header.precision),
            device=self.device,
        )
        start = perf_counter()
        run = GradientPass(model, header.loss, spec=self.manifest.input, options=options)
        run.run(block, f"time of the {role} gradient", squares=squares)
        return PassTime(perf_counter() - start, self.where)


def _pass_key(digest: str, squares: bool) -> str:
    return f"squares {digest}" if squares else digest
