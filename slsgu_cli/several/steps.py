"""The steps of several edits, adjusted together until every concept is forgotten.

A pure function of what was measured so far, as the search of one step is: a test can drive
it with any made-up accuracies.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

# What a concept's step grows by while the concept is still recognised beside the others.
RAISE = 1.25
# Steps are shortened until they are known to this share of their length.
CLOSE = 0.02


@dataclass(slots=True)
class JointSteps:
    """The steps to measure next, by concept, and the shortest that are known to forget.

    First, the step of every concept that is still recognised is raised, until none is.
    Then all steps are shortened together by bisection; those of concepts that come back go
    to where they were, and the rest is measured again. `too_short` holds a step of each
    concept that does not forget it.
    """

    steps: dict[str, float]
    too_short: dict[str, float]
    forgetting: dict[str, float] | None = field(init=False, default=None)
    done: bool = field(init=False, default=False)

    def observe(self, left: Mapping[str, float]) -> None:
        """Take in the forget accuracy of each concept at `steps`, and choose the next steps."""
        recognised = [name for name, accuracy in left.items() if accuracy > 0]
        for name in recognised:
            self.too_short[name] = max(self.too_short[name], self.steps[name])
        if not recognised:
            self.forgetting = dict(self.steps)
            self._shorten(self.forgetting)
        elif self.forgetting is None:
            for name in recognised:
                self.steps[name] *= RAISE
        else:
            for name in recognised:
                self.steps[name] = self.forgetting[name]
            if self.steps == self.forgetting:
                self._shorten(self.forgetting)

    def _shorten(self, forgetting: Mapping[str, float]) -> None:
        self.steps = {
            name: (step + self.too_short[name]) / 2
            if step - self.too_short[name] > CLOSE * step
            else step
            for name, step in forgetting.items()
        }
        self.done = self.steps == forgetting
