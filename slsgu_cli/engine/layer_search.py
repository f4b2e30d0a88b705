"""The search of some layers on a CLIP, and the choice among its trials."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from slsgu_cli import processes, progress
from slsgu_cli.clip.evaluation import Evaluation
from slsgu_cli.engine.choice import residual, utility_of
from slsgu_cli.engine.evaluator import Evaluator
from slsgu_cli.engine.shortest_step import ShortestStep
from slsgu_cli.engine.step_trials import StepSearch
from slsgu_cli.engine.utility import TOLERANCE, Bar, UtilityMeter
from slsgu_cli.method.step_search import best
from slsgu_cli.records.method import Criterion, Move, Tower, Trial, TrialKey, UtilityMetric
from slsgu_cli.records.options import NO_BOUND, SearchOptions

NO_UTILITY = float("-inf")
# Probability that races wrongly stop a step whose utility exceeds the others' by more than the
# tolerance, over all races of a search.
RISK = 0.01
# Points of mean TA@1 that sparing a class may cost: a class has few rows, and all have many.
PRICE_OF_SPARING = 0.25


class LayerSearch(StepSearch[Trial]):
    """The search of some layers on a CLIP, and the choice among all steps that were tried."""

    def __init__(
        self, trials: Iterable[Trial], evaluation: Evaluation, options: SearchOptions
    ) -> None:
        def left(trial: Trial) -> float:
            return residual(trial.forget, trial.gap, options.criterion, options.margin)

        super().__init__({(trial.move, trial.step): trial for trial in trials}, left)
        self.options = options
        self.overshoot = options.factor(of_prompts=evaluation.forget.of_prompts)
        self.evaluators: dict[Move, Evaluator] = {}
        self.lengthened: list[TrialKey] = []
        # Steps that bring back what earlier edits forget.
        self.refused: set[TrialKey] = set()
        self._meter = UtilityMeter(evaluation, options.utility)
        self._base_gap = evaluation.base_gap()

    def along(self, evaluator: Evaluator, first: float | None = None) -> None:
        """Try steps of a move, from `first` (default: the usual first step) on.

        The shortest step that forgets, times the overshoot, is the last one.
        """
        self.evaluators[evaluator.move] = evaluator
        # Trials record the distance to the fifth place, and to no other.
        if self.options.exact or self.options.criterion is Criterion.FA1:
            self.bisect(evaluator, self.options.steps, first)
        else:
            self._approach(evaluator, first)
        enough = self.shortest(evaluator.move)
        if enough is not None and self.overshoot > 1:
            key = evaluator.move, self.trial(evaluator, self.overshoot * enough).step
            self.path.append(key)
            self.lengthened.append(key)

    def _approach(self, evaluator: Evaluator, first: float | None) -> None:
        """Try steps of a move until the shortest one that bisection finds is known."""
        steps = self.options.steps
        wanted = self.options.margin if self.options.criterion is Criterion.MARGIN else 0.0
        search = ShortestStep(first or evaluator.first, steps, self._base_gap - wanted)
        with progress.bar(evaluator.move[0], steps) as ticker:
            while (step := search.next()) is not None:
                trial = self.trial(evaluator, step)
                self.path.append((evaluator.move, trial.step))
                search.observe(trial.gap - wanted, enough=self.residual(trial) == 0)
                ticker.advance()

    def choose(self) -> Trial:
        """Measure the utility of the steps that may win, and return the best (Algorithm 1).

        With an overshoot, the lengthened step of each move that forgets may win. A step within
        the bound on the loss of a class wins over a better one that is not, if its utility is
        nearly as high.
        """
        path = [key for key in dict.fromkeys(self.path) if key not in self.refused]
        price = PRICE_OF_SPARING if self.options.max_class_loss < NO_BOUND else 0.0
        left = {key: self.residual(self.trials[key]) for key in path}
        least = min(left.values())
        may_win = {key for key in path if left[key] == least}
        if least == 0:
            may_win = may_win.intersection(self.lengthened) or may_win
        best_utility = self._measure(path, may_win, price)
        measured = [
            self.trials[key]
            for key in path
            if key in may_win and self.trials[key].utility is not None
        ]
        utility = [utility_of(trial, self.options.utility) for trial in measured]
        figures = [
            (not (self._spares(trial) and value >= best_utility - price), value)
            for trial, value in zip(measured, utility, strict=True)
        ]
        return measured[best(figures)]

    def _measure(self, path: Sequence[TrialKey], may_win: set[TrialKey], price: float) -> float:
        """Measure the utility of steps, and return the highest of those that may win.

        A step may have a utility `price` lower and still win, unless another one spares every
        class. A step with a clearly higher utility than the rival is always measured in full, up
        to the risk, and becomes the next rival; so rivals do not depend on steps that stopped.
        """
        full, best_utility = self.options.full, NO_UTILITY
        sparing, least = NO_UTILITY, NO_UTILITY
        raced = [key for key in may_win if self.evaluators[key[0]].tower is Tower.VISION]
        risk = RISK / len(raced) if raced and not self.options.exact else 0.0
        # The utility may be that of a text layer's step, which cannot be a rival in a race.
        rival, rival_utility = None, NO_UTILITY
        for key in sorted(path, key=self._cost):
            evaluator, trial = self.evaluators[key[0]], self.trials[key]
            if self.options.utility is UtilityMetric.EXPECTED and trial.expected is None:
                trial = replace(trial, utility=None)  # The record has TA@1 only.
            if key in may_win or full:
                beat = max(best_utility - price, sparing)
                if risk:
                    beat = min(beat, rival_utility)
                if key in raced and least == NO_UTILITY:
                    least = beat
                bar = Bar(beat, least, risk if key in raced else 0.0, rival)
                trial = self.with_utility(evaluator, trial, None if full else bar)
            if key in may_win and trial.utility is not None:
                utility = utility_of(trial, self.options.utility)
                best_utility = max(best_utility, utility)
                if utility > rival_utility + TOLERANCE:
                    rival = (evaluator, trial) if key in raced else None
                    rival_utility = utility
                sparing = max(sparing, utility) if self._spares(trial) else sparing
        return best_utility

    def _spares(self, trial: Trial) -> bool:
        """Return whether no class is known to lose more than the bound."""
        return trial.worst is None or trial.worst.lost <= self.options.max_class_loss

    def with_utility(self, evaluator: Evaluator, trial: Trial, bar: Bar | None = None) -> Trial:
        """Return a trial with its utility, measured now unless it is known or below a bar."""
        if trial.utility is None:
            trial = processes.agreed(self._meter.measure(evaluator, trial, bar=bar))
            self.keep((evaluator.move, trial.step), trial)
        return trial

    def _cost(self, key: TrialKey) -> tuple[bool, int, float]:
        """Order trials so that cheap ones set the bar for expensive ones."""
        evaluator = self.evaluators[key[0]]
        return evaluator.tower is Tower.VISION, -evaluator.stage, self.trials[key].share
