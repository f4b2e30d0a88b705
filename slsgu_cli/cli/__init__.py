"""The command line: the only rooms that know typer and rich.

`app` says which room each command is in and loads it when the command is wanted. Nothing
heavy is imported at the top of these rooms: every command imports what it needs when it runs.
"""

from slsgu_cli.cli.app import app

__all__ = ["app"]
