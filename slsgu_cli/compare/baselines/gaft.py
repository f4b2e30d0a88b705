"""GAFT: each epoch ascends on the forget set, then descends on the retain set."""

from slsgu_cli.compare.registry import Trained, register
from slsgu_cli.records.comparison import Method

register(Method.GAFT, Trained(label="GAFT", losses=("forget", "retain")))
