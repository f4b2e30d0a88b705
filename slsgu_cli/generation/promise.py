"""What a layer's move promises on a target: forget loss gained for what it reads changed.

How far a move disturbs a layer's own outputs does not tell what reaches the target: the
blocks behind it enlarge some disturbances and lose others, and have the longer to do so
the earlier the layer lies. So each layer is moved while a few retained inputs run, and
what the target reads is compared:

    promise = <grad L_forget, D> / (||f(W + s D) - f(W)|| / (s ||f(W)||))

for a step s that changes f, what the target reads, by a few percent.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from slsgu_cli.generation.subjects import Subject
from slsgu_cli.generation.vectors import Ray

# The change of what is read at which a move is measured: above fp16's noise, and still small.
CHANGE = 0.03
# The share of a layer's norm that it is moved by first, to see which step makes that change.
FIRST = 0.1


def by_promise(
    subject: Subject, found: Sequence[Ray], gradients: Mapping[str, Tensor]
) -> list[Ray]:
    """Return rays with what they promise for their importance, best first.

    They stay as they are where the subject does not say what its target reads.
    """
    before = subject.read()
    if before is None:
        return list(found)

    def promised(ray: Ray) -> Ray:
        def change(step: float) -> float:
            with subject.encoder.edited({ray.layer: ray.at(step)}):
                after = subject.read()
            return 0.0 if after is None else float((after - before).norm() / before.norm())

        gradient = gradients[ray.layer].to(ray.direction.device)
        slope = float((gradient.double() * ray.direction.double()).sum())
        return replace(ray, importance=promise(slope, change, FIRST / ray.share(1.0)))

    return sorted(map(promised, found), key=lambda ray: (-ray.importance, ray.layer))


def promise(slope: float, change: Callable[[float], float], first: float) -> float:
    """Return a slope over the change of what is read for each unit of step.

    `change` tells the change after a step: after `first`, to find a step that changes
    about as much as CHANGE, and after that. Returns 0 where `first` changes nothing.
    """
    seen = change(first)
    if seen == 0:
        return 0.0
    step = first * CHANGE / seen
    return slope * step / change(step)
