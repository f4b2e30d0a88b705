"""The public interface of `import slsgu_cli`."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from icons import write_few

import slsgu_cli

ROOT = Path(slsgu_cli.__file__).resolve().parents[1]


@pytest.mark.parametrize("name", slsgu_cli._modules())
def test_every_name_is_there_and_documented(name):
    assert name in dir(slsgu_cli)
    assert getattr(slsgu_cli, name).__doc__


def test_no_other_public_name_exists():
    with pytest.raises(AttributeError, match="no attribute 'remember'"):
        _ = slsgu_cli.remember


def test_importing_it_imports_nothing_else():
    code = "import sys, slsgu_cli; print([m for m in sys.modules if m.startswith('slsgu_cli.')])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_no_public_function_takes_a_console():
    verbs = [getattr(slsgu_cli, name) for name in slsgu_cli._modules()]
    for verb in filter(inspect.isfunction, verbs):
        assert "console" not in inspect.signature(verb).parameters


@pytest.mark.slow
def test_the_guides_example_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "guide" / "automation.md").read_text()
    (program,) = re.findall(r"\$ cat > forget\.py << 'END'\n(.*?)\n> END\n", page, re.S)
    (shown,) = re.findall(r"\$ python forget\.py\n(.*?)```", page, re.S)
    program = re.sub(r"(?m)^> ?", "", program)
    assert re.findall("slsgu_cli.*", program)[0] == "slsgu_cli as slsgu"
    assert program.count("import") == 2
    write_few(tmp_path / "slsgu_cli" / "demo", "spotify")
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "forget.py", "exec"), {})
    out, err = capsys.readouterr()
    # The last digits depend on the machine; whether the concept is forgotten does not.
    assert out.split()[0] == shown.split()[0] == "True"
    assert err == ""
    assert (tmp_path / "clip-without-spotify" / "open_clip_config.json").is_file()
