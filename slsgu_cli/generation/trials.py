"""The trials of one search on a target: bisection on the concept, then what is kept.

A trial may take minutes on a large target, so each is recorded as soon as it is measured.
"""

from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter
from time import perf_counter

from slsgu_cli import progress
from slsgu_cli.generation.records import TargetTrial, TargetTrials
from slsgu_cli.generation.subjects import Subject
from slsgu_cli.generation.vectors import Ray
from slsgu_cli.stepsize import next_step
from slsgu_cli.store import Store


class TargetRun:
    """The state of one search: trials by layer and step, and the path taken.

    With `full`, what is kept is measured for every trial. `began` is when the search did,
    by the performance counter, if that was earlier.
    """

    def __init__(
        self,
        store: Store,
        path: str,
        subject: Subject,
        trials: TargetTrials,
        *,
        full: bool = False,
        began: float | None = None,
    ) -> None:
        self.store, self.path, self.subject = store, path, subject
        self.full = full
        self._began = perf_counter() if began is None else began
        self._spent = trials.seconds
        self.found = {(trial.layer, trial.step): trial for trial in trials.trials}
        self.taken: list[tuple[str, float]] = []
        self._header = trials

    @property
    def trials(self) -> TargetTrials:
        """Return what was tried so far, as an artifact."""
        return replace(self._header, trials=tuple(self.found.values()))

    def reaches(self, trial: TargetTrial) -> bool:
        """Return whether a trial reaches the goal."""
        return 100 - (trial.concept.percent or 0.0) >= self._header.goal

    def bisect(self, ray: Ray, steps: int, start: float | None) -> None:
        """Run Algorithm 3 on one layer, on what the target shows of the concept."""
        first = start or 0.1 / ray.share(1.0)
        tried: list[tuple[float, float]] = []
        with progress.bar(ray.layer, steps) as ticker:
            for _ in range(steps):
                step = next_step(tried, first)
                trial = self.found.get((ray.layer, step)) or self._try(ray, step)
                self._keep(self._with_others(ray, trial) if self.full else trial)
                left = 0.0 if self.reaches(trial) else trial.concept.percent or 0.0
                tried.append((step, left))
                ticker.advance()
        self.taken += [(ray.layer, step) for step, _ in tried]

    def choose(self, tried: Sequence[Ray]) -> TargetTrial:
        """Measure what each layer's shortest sufficient step keeps; return the best.

        Where none suffices, it is the step that leaves least of the concept.
        """
        shortest = []
        for ray in tried:
            own = [self.found[key] for key in self.taken if key[0] == ray.layer]
            enough = [trial for trial in own if self.reaches(trial)]
            if enough:
                shortest.append((ray, min(enough, key=attrgetter("step"))))
        if not shortest:
            least = min((self.found[key] for key in self.taken), key=lambda t: t.concept.count)
            shortest = [(ray, least) for ray in tried if ray.layer == least.layer]
        measured = []
        for ray, trial in shortest:
            measured.append(self._with_others(ray, trial))
            self._keep(measured[-1])
        return max(measured, key=lambda trial: trial.others.count if trial.others else -1)

    def _try(self, ray: Ray, step: float) -> TargetTrial:
        with self.subject.encoder.edited({ray.layer: ray.at(step)}):
            concept = self.subject.concept()
        tower = self.subject.encoder.home.tower
        return TargetTrial(ray.layer, tower, step, ray.share(step), concept, None)

    def _with_others(self, ray: Ray, trial: TargetTrial) -> TargetTrial:
        """Return the trial with what it keeps, measured if it was not."""
        if trial.others is not None:
            return trial
        with self.subject.encoder.edited({ray.layer: ray.at(trial.step)}):
            return replace(trial, others=self.subject.others())

    def _keep(self, trial: TargetTrial) -> None:
        """Record a trial at once: each takes minutes on a large target."""
        if self.found.get((trial.layer, trial.step)) != trial:
            self.found[trial.layer, trial.step] = trial
            spent = self._spent + perf_counter() - self._began
            self._header = replace(self._header, seconds=spent)
            self.store.write_record(self.path, self.trials)
