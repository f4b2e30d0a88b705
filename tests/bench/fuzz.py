"""Fuzz the parsers of untrusted input, guided by coverage.

    pip install atheris
    python tests/bench/fuzz.py records -max_total_time=60      # or tensors, tars

Further arguments go to libFuzzer. A parser may return or raise its documented errors; anything
else ends the run, with the input in a file.
"""

import sys
import tempfile
from collections import Counter
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["slsgu_cli"]):
    from slsgu_cli.checkpoints.layouts import open_weights
    from slsgu_cli.errors import SlsguError
    from slsgu_cli.records.codec import decode, parse_json
    from slsgu_cli.records.method import EditHeader
    from slsgu_cli.sources.reader import Columns
    from slsgu_cli.sources.tar import TarSource


PLACE = Path(tempfile.mkdtemp()) / "a.tar"


def records(data: bytes) -> None:
    with suppress(SlsguError, ValueError):
        decode(EditHeader, parse_json(data))


def tensors(data: bytes) -> None:
    PLACE.write_bytes(len(data).to_bytes(8, "little") + data)
    with suppress(SlsguError):
        file = open_weights(PLACE)
        for name in file.entries:
            file.stored(name)


def tars(data: bytes) -> None:
    PLACE.write_bytes(data)
    with suppress(SlsguError):
        list(TarSource(str(PLACE), Columns(), {}).rows(Counter()))


TARGETS = {each.__name__: each for each in (records, tensors, tars)}

if __name__ == "__main__":
    name = sys.argv.pop(1)
    atheris.Setup(sys.argv, TARGETS[name])
    atheris.Fuzz()
