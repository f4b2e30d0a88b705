"""FT: fine-tuning on the retain set."""

from collections.abc import Iterator

from slsgu_cli.compare.registry import trained
from slsgu_cli.compare.runner import BaselineRunner
from slsgu_cli.records.comparison import Method

LOSSES = ("retain",)


@trained(Method.FT, label="FT", losses=LOSSES)
def ft(runner: BaselineRunner, rate: float) -> Iterator[int]:
    """Train at a learning rate."""
    return runner.train(LOSSES, rate)
