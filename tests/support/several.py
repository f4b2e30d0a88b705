"""Commands that several processes run together, one after another: `several.py FILE`.

A launcher starts it in each of them. FILE has the words of each command, as JSON. The first
process prints the exit code of each after what it printed itself.
"""

import json
import sys
from pathlib import Path

from slsgu_cli.cli.app import app
from slsgu_cli.clip import processes

if __name__ == "__main__":
    commands = json.loads(Path(sys.argv[1]).read_text())
    with processes.together():
        for words in commands:
            code = app(words, standalone_mode=False)
            if processes.is_first():
                print("exit", code or 0, flush=True)
