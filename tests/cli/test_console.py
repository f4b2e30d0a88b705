import json
import os
import pty
import subprocess
import sys
from io import StringIO

import pytest
from rich.console import Console as RichConsole

from slsgu_cli.cli.console import Column, Console
from slsgu_cli.cli.console import text as shown_text
from slsgu_cli.errors import InputError
from slsgu_cli.records.figures import Accuracy, Figures
from slsgu_cli.records.method import Tower

COLUMNS = ["name", "figure"]
ODD = "a\tb\nc  [red]d[/red] :apple: \x1b[31mé"
FLAT = "a b c [red]d[/red] :apple: [31mé"

SHOW = f"""
import sys
from slsgu_cli.cli.console import Console
from slsgu_cli.errors import InputError
console = Console('made', verbosity=1, as_json="--json" in sys.argv)
console.note("noted [red]")
console.detail("detailed")
console.warn("warned")
with console.bar("working", 3) as ticker:
    ticker.advance(3)
console.table("rows", ["name", "figure"], [[{ODD!r}, 0.5], ["x", None]], title="[b]Title :apple:")
console.value("path", "out/clip")
console.error(InputError("wrong [bold]", hint="right :apple:"))
console.flush()
"""


def on_a_terminal(code, columns=100):
    """Run code with stdout on a pseudo-terminal; return what the terminal got."""
    master, slave = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm", "NO_COLOR": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=slave, stderr=subprocess.DEVNULL, env=environment
    )
    os.close(slave)
    chunks = []
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(master)
    assert process.wait(30) == 0
    return b"".join(chunks).decode()


def piped(*arguments):
    return subprocess.run(
        [sys.executable, "-c", SHOW, *arguments], capture_output=True, text=True, check=True
    )


def test_a_terminal_gets_a_table_with_cells_printed_literally():
    shown = on_a_terminal(SHOW)
    assert "───" in shown
    assert FLAT in shown
    assert "[b]Title :apple:" in shown
    assert "0.50" in shown
    assert "\x1b[31m" not in shown
    assert "noted" not in shown


def test_a_narrow_terminal_folds_cells_and_loses_nothing():
    code = (
        "from slsgu_cli.cli.console import Console\n"
        "Console().table('t', ['a', 'b'], [['x' * 50, 'y' * 50]])"
    )
    shown = on_a_terminal(code, columns=30)
    assert shown.count("x") == shown.count("y") == 50


def test_a_pipe_gets_tab_separated_results_and_nothing_else():
    done = piped()
    assert done.stdout == f"name\tfigure\n{FLAT}\t0.5\nx\t-\nout/clip\n"
    for text in ("noted [red]", "detailed", "warning: warned", "error: wrong [bold]"):
        assert text in done.stderr
    assert "try: right :apple:" in done.stderr


def test_json_is_one_document_and_nothing_else():
    done = piped("--json")
    document = json.loads(done.stdout)
    assert list(document) == ["schema", "command", "rows", "path"]
    assert (document["schema"], document["command"]) == (1, "made")
    assert document["rows"] == [{"name": ODD, "figure": 0.5}, {"name": "x", "figure": None}]
    assert document["path"] == "out/clip"


def test_json_output_replaces_rows_and_text(capsys):
    console = Console(as_json=True)
    console.table("t", COLUMNS, [["x", 1]], data={"brands": Accuracy(1.0, 2.0, 3)})
    console.value("v", "shown", data=[Tower.TEXT])
    assert capsys.readouterr().out == ""
    console.flush()
    assert json.loads(capsys.readouterr().out) == {
        "schema": 1,
        "command": None,
        "t": {
            "brands": {"top1": 1.0, "top5": 2.0, "rows": 3, "is_test": False, "of_prompts": False}
        },
        "v": ["text"],
    }


def test_json_keys_are_not_data(capsys):
    console = Console("made", as_json=True)
    columns = [
        "layer",
        Column("TA@1 brands", of=("utility", "brands", "TA@1")),
        Column("TA@5 brands", of=("utility", "brands", "TA@5")),
        Column("TA@1 key", of=("utility", "key", "TA@1")),
    ]
    console.table("t", columns, [["a", 1, 2, 3]])
    console.value("v", "shown", data=Figures(Accuracy(1, 2, 3), {"brands": Accuracy(4, 5, 6)}))
    for name in ("one", "other"):
        console.row("rows", name, {"model": name})
        with console.part("parts"):
            console.value("name", name)
    console.flush()
    document = json.loads(capsys.readouterr().out)
    assert document["t"] == [
        {
            "layer": "a",
            "utility": [{"name": "brands", "TA@1": 1, "TA@5": 2}, {"name": "key", "TA@1": 3}],
        }
    ]
    assert document["v"]["utility"] == [
        {"name": "brands", "top1": 4, "top5": 5, "rows": 6, "is_test": False, "of_prompts": False}
    ]
    assert document["rows"] == [{"model": "one"}, {"model": "other"}]
    assert document["parts"] == [{"name": "one"}, {"name": "other"}]


def test_json_has_null_where_a_figure_is_not_finite(capsys):
    console = Console(as_json=True)
    console.table("t", ["a"], [[float("nan")], [float("inf")], [1.5]])
    console.flush()
    out = capsys.readouterr().out
    document = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert document["t"] == [{"a": None}, {"a": None}, {"a": 1.5}]


def test_an_empty_table_still_names_its_columns(capsys):
    Console().table("t", COLUMNS, [])
    assert capsys.readouterr().out == "name\tfigure\n"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"),
        (True, "yes"),
        (False, ""),
        (0, "0"),
        (12345, "12345"),
        (0.0, "0"),
        (0.00012345, "0.0001234"),
        (-0.5, "-0.50"),
        (99.994, "99.99"),
        (123456.0, "1.235e+05"),
        (Tower.VISION, "vision"),
        ("  spread \u2028 out ", "spread out"),
    ],
)
def test_values_are_formatted_for_reading(value, shown):
    assert shown_text(value) == shown


def test_a_pipe_gets_figures_in_full(capsys):
    Console().table("t", ["a"], [[96.96969696969697], [0.00333047961], [123456.0], [0.0], [True]])
    assert capsys.readouterr().out == "a\n96.96969697\n0.00333047961\n123456\n0\nyes\n"


def test_tables_in_a_pipe_are_separated(capsys):
    console = Console()
    console.table("t", ["a"], [[1]])
    console.table("u", ["b"], [[2]])
    assert capsys.readouterr().out == "a\n1\n\nb\n2\n"


def test_a_terminal_shows_labels_units_and_no_empty_column():
    code = (
        "from slsgu_cli.cli.console import Console\n"
        "from slsgu_cli.cli.console import Column\n"
        "columns = [Column('bytes', shown=lambda b: f'{b} B', label='size'), 'nothing', 'zero',\n"
        "           Column('path', on_terminal=False)]\n"
        "Console().table('t', columns, [[5, None, 0, 'a/b'], [None, '', 0, 'c/d']])"
    )
    shown = on_a_terminal(code)
    header, _, first, second = (line.split() for line in shown.strip().splitlines())
    assert header == ["size", "zero"]
    assert (first, second) == (["5", "B", "0"], ["-", "0"])


def test_text_from_data_does_not_control_the_terminal(capsys):
    Console().note("key \x1b[2Jgone\rback")
    assert capsys.readouterr().err == "key  [2Jgone back\n"


REORDERING = [*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C]


@pytest.mark.parametrize("code", REORDERING)
def test_text_from_data_does_not_run_backwards(code, capsys):
    name = f"mouse{chr(code)}gnp.exe"
    console = Console()
    console.warn(name)
    console.table("t", ["name"], [[name]])
    console.value("v", f"v\t{name}")
    console.error(InputError(name, hint=name))
    told = capsys.readouterr()
    assert chr(code) not in told.out + told.err
    assert told.out == "name\nmouse\ufffdgnp.exe\nv\tmouse\ufffdgnp.exe\n"


def test_verbosity_decides_what_stderr_gets(capsys):
    heard = {}
    for verbosity in (-1, 0, 1):
        console = Console(verbosity=verbosity)
        console.note("note")
        console.detail("detail")
        console.warn("warn")
        console.error(InputError("error"))
        captured = capsys.readouterr()
        assert captured.out == ""
        heard[verbosity] = captured.err.split()
    always = ["warning:", "warn", "error:", "error"]
    assert heard == {-1: always, 0: ["note", *always], 1: ["note", "detail", *always]}


def test_a_long_message_is_one_line_and_keeps_its_brackets(capsys):
    text = "path/[brackets]/" + "x" * 300
    Console().error(InputError(text))
    assert capsys.readouterr().err == f"error: {text}\n"


class Screen(StringIO):
    """A terminal that keeps what it got."""

    def isatty(self):
        return True


def with_stderr_on(screen, **options):
    stderr = RichConsole(file=screen, width=100, force_terminal=screen.isatty(), highlight=False)
    return Console(_stderr=stderr, **options)


def test_bars_are_for_terminals_without_other_output():
    quiet = with_stderr_on(Screen(), verbosity=-1)
    piped = with_stderr_on(StringIO())
    lines = with_stderr_on(Screen(), streams=True, _stdout=Screen())
    for console in (quiet, piped, lines):
        with console.bar("pairs", 2) as ticker:
            ticker.advance()
        assert console._stderr.file.getvalue() == ""
    shown = with_stderr_on(Screen(), streams=True, _stdout=StringIO())
    with shown.bar("pairs", 2) as ticker:
        ticker.advance()
    assert "pairs" in shown._stderr.file.getvalue()
