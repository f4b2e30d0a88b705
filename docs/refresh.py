"""Run the commands of a document and put what they print in place of what stands there.

    python docs/refresh.py README.md docs/guide.md
    python docs/refresh.py docs/results.md#sweep        # the section `## Sweep` alone

Every ```console block is run, from the first to the last, in one new folder per document
in which `slsgu_cli` is the checkout's. Lines that begin with `$ ` are commands, lines with
`> ` go on with them. A comment `<!-- through: FILTER -->` before a block passes its output
through a shell command, to shorten it. `<!-- picture: FROM TO -->` copies a file of the
folder to the checkout. A command that fails ends the run, except in a block after
`<!-- fails: CODE -->`.
"""

import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(?P<notes>(?:<!-- .*? -->\n)*)```console\n(?P<body>.*?)```\n", re.S)
NOTE = re.compile(r"<!-- (through|fails): (.*?) -->")
PICTURE = re.compile(r"<!-- picture: (\S+) (\S+) -->")
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


def refresh(document: Path, wanted: str = "") -> None:
    """Rewrite `document`, or its section called `wanted`, with the output of its commands."""
    sections = re.split(r"(?m)^(?=## )", document.read_text())
    names = [_anchor(section) for section in sections]
    if wanted and wanted not in names:
        raise SystemExit(f"{document} has no section {wanted}; it has {', '.join(names[1:])}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "slsgu_cli").symlink_to(ROOT / "slsgu_cli")
        for index, section in enumerate(sections):
            if wanted in ("", names[index]):
                sections[index] = BLOCK.sub(lambda found: _run_block(found, folder), section)
                for origin, target in PICTURE.findall(section):
                    shutil.copyfile(folder / origin, ROOT / target)
                document.write_text("".join(sections))


def _anchor(section: str) -> str:
    """Return what a link to a section calls it: its heading, in lower case, with hyphens."""
    heading = section.splitlines()[0].lstrip("#").strip().lower() if section else ""
    return re.sub(r"[^\w\- ]", "", heading).replace(" ", "-")


def _run_block(block: re.Match[str], folder: Path) -> str:
    notes = dict(NOTE.findall(block["notes"]))
    parts = []
    for command in _commands(block["body"]):
        start = time.monotonic()
        code, output = _run(command, folder)
        sys.stderr.write(f"{time.monotonic() - start:6.1f} s  {command.splitlines()[0]}\n")
        if code != int(notes.get("fails", 0)):
            raise SystemExit(f"exit code {code}:\n{output}")
        if "through" in notes:
            output = subprocess.run(
                ["bash", "-c", notes["through"]],
                input=output,
                text=True,
                capture_output=True,
                check=True,
            ).stdout
        parts.append("$ " + re.sub(r"\n(?=(.?))", _continued, command) + "\n" + output)
    return f"{block['notes']}```console\n{''.join(parts)}```\n"


def _continued(line_end: re.Match[str]) -> str:
    return "\n> " if line_end[1] else "\n>"


def _commands(body: str) -> list[str]:
    commands: list[str] = []
    for line in body.splitlines():
        if line.startswith("$ "):
            commands.append(line[2:])
        elif (line == ">" or line.startswith("> ")) and commands:
            commands[-1] += "\n" + line[2:]
    return commands


def _run(command: str, folder: Path) -> tuple[int, str]:
    """Return exit code and output of a command whose terminal is plain, with 80 columns."""
    terminal, end = pty.openpty()
    bin_folder = Path(sys.executable).parent
    environment = os.environ | {
        "TERM": "dumb",
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    environment.pop("SLSGU_STORE", None)
    process = subprocess.Popen(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=end,
        stderr=end,
    )
    os.close(end)
    chunks = []
    while True:
        try:
            chunk = os.read(terminal, 1 << 16)
        except OSError:  # how a pseudo-terminal says that its other end is closed
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(terminal)
    text = ESCAPES.sub("", b"".join(chunks).decode())
    text = text.replace(f"{folder.resolve()}/", "").replace(f"{folder}/", "")
    return process.wait(), "".join(f"{line.rstrip()}\n" for line in text.splitlines())


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        path, _, section = argument.partition("#")
        refresh(Path(path), section)
