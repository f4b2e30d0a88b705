"""GA: gradient ascent on the forget set."""

from collections.abc import Iterator

from slsgu_cli.compare.registry import trained
from slsgu_cli.compare.runner import BaselineRunner
from slsgu_cli.records.comparison import Method

LOSSES = ("forget",)


@trained(Method.GA, label="GA", losses=LOSSES)
def ga(runner: BaselineRunner, rate: float) -> Iterator[int]:
    """Train at a learning rate."""
    return runner.train(LOSSES, rate)
