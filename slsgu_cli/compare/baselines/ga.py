"""GA: gradient ascent on the forget set."""

from collections.abc import Iterator

from slsgu_cli.compare.registry import Trained, register
from slsgu_cli.compare.runner import BaselineRunner
from slsgu_cli.records.comparison import Method

LOSSES = ("forget",)


def ga(runner: BaselineRunner, rate: float) -> Iterator[int]:
    """Train at a learning rate."""
    return runner.train(LOSSES, rate)


register(Method.GA, Trained(label="GA", losses=LOSSES, epochs=ga))
