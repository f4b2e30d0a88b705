"""The command line, the only package that knows typer and rich.

`app` lists the commands and the modules that hold them. Heavy packages are imported inside the
command functions.
"""

from slsgu_cli.cli.app import app

__all__ = ["app"]
