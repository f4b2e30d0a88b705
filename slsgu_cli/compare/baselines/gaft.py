"""GAFT: each epoch ascends on the forget set, then descends on the retain set."""

from collections.abc import Iterator

from slsgu_cli.compare.registry import Trained, register
from slsgu_cli.compare.runner import BaselineRunner
from slsgu_cli.records.comparison import Method

LOSSES = ("forget", "retain")


def gaft(runner: BaselineRunner, rate: float) -> Iterator[int]:
    """Train at a learning rate."""
    return runner.train(LOSSES, rate)


register(Method.GAFT, Trained(label="GAFT", losses=LOSSES, epochs=gaft))
