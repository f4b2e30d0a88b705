"""The command line: the only rooms that know typer and rich.

Commands register with `app` as their rooms are imported. Nothing heavy is imported here or
at the top of those rooms: every command imports what it needs when it runs.
"""

from slsgu_cli.cli import compare, downstream, steps, study, verify
from slsgu_cli.cli.app import app

__all__ = ["app", "compare", "downstream", "steps", "study", "verify"]
