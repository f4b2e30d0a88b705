"""FT: fine-tuning on the retain set."""

from collections.abc import Iterator

from slsgu_cli.compare.registry import Trained, register
from slsgu_cli.compare.runner import BaselineRunner
from slsgu_cli.records.comparison import Method

LOSSES = ("retain",)


def ft(runner: BaselineRunner, rate: float) -> Iterator[int]:
    """Train at a learning rate."""
    return runner.train(LOSSES, rate)


register(Method.FT, Trained(label="FT", losses=LOSSES, epochs=ft))
