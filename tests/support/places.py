"""Paths that many tests use, and special files."""

import os
import socket
import stat
import sys
from pathlib import Path

import slsgu_cli

ROOT = Path(__file__).parents[2]
DEMO = Path(slsgu_cli.__file__).parent / "demo"
# A command that behaves like img2dataset, without a network.
FAKE_IMG2DATASET = f"{sys.executable} {Path(__file__).with_name('fake_img2dataset.py')}"


def special_files(folder):
    """Create a pipe, a socket and a link; return them, and a check that all still exist."""
    pipe, listening, link = (folder / name for name in ("pipe", "socket", "link"))
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(listening.relative_to(Path.cwd())))

    def there():
        kinds = [stat.S_IFMT(path.lstat().st_mode) for path in (pipe, listening, link)]
        return kinds == [stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFLNK]

    return [pipe, listening, link], there
