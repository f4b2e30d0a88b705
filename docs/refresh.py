"""Run the commands in documents and replace their output there.

    python docs/refresh.py README.md docs/guide       # a page; all pages of a folder
    python docs/refresh.py docs/guide/search.md       # one page of a folder
    python docs/refresh.py docs/guide/search.md#rank  # its section `## rank`

The ```console blocks of an argument run in order, in one new folder with a link to the checkout's
`slsgu_cli`. Lines that begin with `$ ` are commands; lines with `> ` continue them. A comment
`<!-- through: FILTER -->` before a block passes its output through a shell command, to shorten
it. `<!-- picture: FROM TO -->` copies a file of that folder to TO, next to the page. A command
that fails ends the run, except in a block after `<!-- fails: CODE -->`.

The pages of a folder run in the order of the links in its README.md and share their artifacts.
Before its heading, a page may have:

    <!-- after: PAGE ... -->   pages of its folder that it builds on. To refresh this page alone,
                               they run first and stay unchanged; so do the sections before a
                               single section.
    <!-- needs: NAME ... -->   things that a checkout lacks. Without them, the page and the pages
                               that build on it are skipped with a message.

`needs` knows these names:

- `SLSGU_TEST_MODELS`, an environment variable that names a folder with `sd/`, a small trained
  Stable Diffusion in the layout of diffusers, and `llava/`, a small LLaVA in that of
  transformers, both built on the CLIP in `slsgu_cli/demo/clip`. They are too large for the
  repository, and need `slsgu[targets]`.
- `img2dataset`, the program: next to the Python that runs this script, on the PATH, or as
  `SLSGU_IMG2DATASET` says. `make test` installs it in `.venv-img2dataset/bin`.
"""

import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(?P<notes>(?:<!-- .*? -->\n)*)```console\n(?P<body>.*?)```\n", re.S)
NOTE = re.compile(r"<!-- (through|fails): (.*?) -->")
PICTURE = re.compile(r"<!-- picture: (\S+) (\S+) -->")
HEAD = re.compile(r"<!-- (after|needs): (.*?) -->\n")
LINK = re.compile(r"\]\(([\w.-]+\.md)[)#]")
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


def main(arguments: Sequence[str]) -> None:
    """Refresh what each argument names: a page, `page#section`, or a folder of pages."""
    for argument in arguments:
        path, _, section = argument.partition("#")
        refresh(Path(path), section)


def refresh(path: Path, section: str = "") -> None:
    """Rewrite the page `path`, its `section`, or all pages of the folder, with new output."""
    wanted = reading_order(path) if path.is_dir() else [path]
    if section and section not in (known := _names(_sections(path))):
        raise SystemExit(f"{path} has no section {section}; it has {', '.join(known[1:])}")
    for page in wanted.copy():
        if lacking := missing(page):
            sys.stderr.write(f"left out: {page} needs {' and '.join(map(_told, lacking))}\n")
            wanted.remove(page)
    before = [] if path.is_dir() else [page for last in wanted for page in pages_before(last)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "slsgu_cli").symlink_to(ROOT / "slsgu_cli")
        for page in [*before, *wanted]:
            start = time.monotonic()
            _run_page(page, folder, rewritten=page in wanted, last=section)
            sys.stderr.write(f"{time.monotonic() - start:6.1f} s  in all, {page}\n")


def reading_order(folder: Path) -> list[Path]:
    """Return the pages of a folder: its README.md, then the pages that it links to, in order."""
    index = folder / "README.md"
    names = [name for name in LINK.findall(index.read_text()) if (folder / name).is_file()]
    return list(dict.fromkeys([index, *(folder / name for name in names)]))


def pages_before(page: Path) -> list[Path]:
    """Return the pages whose commands run before those of `page`, in order."""
    pages: list[Path] = []
    for name in declared(page, "after"):
        earlier = page.parent / name
        pages += [*pages_before(earlier), earlier]
    return list(dict.fromkeys(pages))


def missing(page: Path) -> list[str]:
    """Return what `page`, or a page before it, needs and this machine lacks."""
    needs = [need for each in [*pages_before(page), page] for need in declared(each, "needs")]
    return [need for need in dict.fromkeys(needs) if not _is_there(need)]


def declared(page: Path, key: str) -> list[str]:
    """Return the words that a comment before the page's heading gives for `key`."""
    before_heading = page.read_text().partition("# ")[0]
    return [
        word
        for kind, words in HEAD.findall(before_heading)
        if kind == key
        for word in words.split()
    ]


def _is_there(need: str) -> bool:
    if need == "SLSGU_TEST_MODELS":
        folder = Path(os.environ.get(need) or "/nowhere")
        return all(
            (folder / part).is_file() for part in ("sd/model_index.json", "llava/config.json")
        )
    named = os.environ.get(f"SLSGU_{need.upper()}")
    return bool(named or shutil.which(need, path=_search_path()))


def _told(need: str) -> str:
    if need == "SLSGU_TEST_MODELS":
        return "SLSGU_TEST_MODELS to name a folder with sd/ and llava/ (docs/contributing.md)"
    return f"{need}, on the PATH or named by SLSGU_{need.upper()}"


def _run_page(page: Path, folder: Path, *, rewritten: bool, last: str) -> None:
    """Run the page's sections; with `last`, up to that one, and rewrite only that one."""
    sections = _sections(page)
    for index, name in enumerate(_names(sections)):
        section = BLOCK.sub(lambda block: _run_block(block, folder), sections[index])
        if rewritten and last in ("", name):
            for origin, target in PICTURE.findall(section):
                shutil.copyfile(folder / origin, page.parent / target)
            sections[index] = section
            page.write_text("".join(sections))
        if rewritten and last and last == name:
            return


def _sections(page: Path) -> list[str]:
    return re.split(r"(?m)^(?=## )", page.read_text())


def _names(sections: Sequence[str]) -> list[str]:
    """Return the anchors of sections: their headings in lower case with hyphens."""
    headings = [section.partition("\n")[0].lstrip("#").strip().lower() for section in sections]
    return [re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings]


def _search_path() -> str:
    return f"{Path(sys.executable).parent}:{os.environ['PATH']}"


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
    """Return exit code and output of a command on a plain terminal of 80 columns."""
    terminal, end = pty.openpty()
    environment = os.environ | {"TERM": "dumb", "PATH": _search_path(), "PYTHONPATH": str(ROOT)}
    environment.pop("SLSGU_STORE", None)
    for variable in ("SLSGU_TEST_MODELS", "SLSGU_IMG2DATASET"):
        if (named := os.environ.get(variable)) and Path(named).exists():
            environment[variable] = str(Path(named).absolute())  # commands run elsewhere
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
        except OSError:  # Linux reports a closed terminal this way
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(terminal)
    text = ESCAPES.sub("", b"".join(chunks).decode())
    text = text.replace(f"{folder.resolve()}/", "").replace(f"{folder}/", "")
    return process.wait(), "".join(f"{line.rstrip()}\n" for line in text.splitlines())


if __name__ == "__main__":
    main(sys.argv[1:])
