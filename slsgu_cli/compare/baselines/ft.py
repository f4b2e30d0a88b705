"""FT: fine-tuning on the retain set."""

from slsgu_cli.compare.registry import Trained, register
from slsgu_cli.records.comparison import Method

register(Method.FT, Trained(label="FT", losses=("retain",)))
