"""GA: gradient ascent on the forget set."""

from slsgu_cli.compare.registry import Trained, register
from slsgu_cli.records.comparison import Method

register(Method.GA, Trained(label="GA", losses=("forget",)))
