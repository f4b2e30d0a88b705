"""GAFT: each epoch ascends on the forget set, then descends on the retain set."""

from collections.abc import Iterator

from slsgu_cli.compare.registry import trained
from slsgu_cli.compare.runner import BaselineRunner
from slsgu_cli.records.comparison import Method

LOSSES = ("forget", "retain")


@trained(Method.GAFT, label="GAFT", losses=LOSSES)
def gaft(runner: BaselineRunner, rate: float) -> Iterator[int]:
    """Train at a learning rate."""
    return runner.train(LOSSES, rate)
