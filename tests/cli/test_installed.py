"""The package that a wheel installs, away from its checkout; the jobs of the guide run there.

The shell steps of the jobs for GitHub and GitLab run as they stand in the guide.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
import yaml
from icons import write_few
from places import ROOT
from processes import slsgu

PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
ALONE = ("--no-deps", "--no-index")
# Runs commands of the installed package, one after another, in one process that has PyTorch.
SERVER = """\
import json, os, socket, sys
from typer.testing import CliRunner
import open_clip, torch
import slsgu_cli
from slsgu_cli.cli.app import app
listening = socket.socket(socket.AF_UNIX)
listening.bind(sys.argv[1])
listening.listen()
print(slsgu_cli.__file__, flush=True)
while True:
    with listening.accept()[0] as asking:
        asked = b"".join(iter(lambda: asking.recv(1 << 16), b""))
        folder, variables, words = json.loads(asked)
        os.chdir(folder)
        done = CliRunner().invoke(app, words, env=variables)
        asking.sendall(json.dumps([int(done.exit_code), done.stdout, done.stderr]).encode())
"""
# Stands for the program on the PATH: it asks the server, and tells what that answers.
PROGRAM = """\
#!{python} -S
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    own = {{key: value for key, value in os.environ.items() if key.startswith("SLSGU_")}}
    server.sendall(json.dumps([os.getcwd(), own, sys.argv[1:]]).encode())
    server.shutdown(socket.SHUT_WR)
    code, out, told = json.loads(b"".join(iter(lambda: server.recv(1 << 16), b"")))
sys.stdout.write(out)
sys.stderr.write(told)
sys.exit(code)
"""
RECIPE = """\
model = "local-dir:icons/clip"
bounds = ["fa1 <= 0", "ta1.brands >= {least}"]
request = [{{name = "facebook", received = 2026-11-02}}]
[sets]
sources = ["icons/train.parquet?concept={{}}"]
retain_sources = ["icons/train.parquet"]
retain_samples = 32
[evaluation.brands]
source = "icons/heldout.parquet?kind=brand"
templates = "icons/templates.txt"
[rank]
tower = "text"
direction = "whitened"
[search]
layers = ["transformer.resblocks.3.mlp.c_proj"]
[outputs]
checkpoint = "removals/checkpoint"
edits = "removals/edits"
report = "removals/report.html"
"""


@pytest.fixture(scope="module")
def jobs():
    text = (ROOT / "docs" / "guide" / "automation.md").read_text()
    blocks = [part.partition("```")[0] for part in text.split("```yaml\n")[1:]]
    github, gitlab = map(yaml.safe_load, blocks)
    return github["jobs"]["removals"], gitlab["removals"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of the package, alone in its folder."""
    pytest.importorskip("setuptools", minversion="77", reason="builds a wheel")
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    unwanted = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "slsgu_cli", source / "slsgu_cli", ignore=unwanted)
    build = [*PIP, "wheel", str(source), *ALONE, "--no-build-isolation", "-w", str(folder)]
    subprocess.run(build, check=True, capture_output=True)
    shutil.rmtree(source)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """The folder that the wheel is installed into, for a PYTHONPATH."""
    folder = tmp_path_factory.mktemp("site")
    words = [*PIP, "install", str(wheel), *ALONE, "--target", str(folder)]
    subprocess.run(words, check=True, capture_output=True)
    return folder


@pytest.fixture
def run(wheel, site, tmp_path):
    """`run(script, variables)` runs shell lines as runners do: the first failure ends them."""
    write_few(tmp_path / "icons", "facebook")
    shutil.copytree(wheel.parent, tmp_path / "wheels")
    address, program = str(tmp_path / "socket"), tmp_path / "bin" / "slsgu"
    program.parent.mkdir()
    program.write_text(PROGRAM.format(python=sys.executable, address=address))
    program.chmod(0o755)
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(site)}
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, address],
        cwd=tmp_path,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
    )
    assert server.stdout.readline().startswith(str(site))

    def script(text, variables):
        words = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", text]
        return subprocess.run(
            words, cwd=tmp_path, env=environment | variables, text=True, capture_output=True
        )

    yield script
    server.kill()
    server.communicate()


def test_a_wheel_holds_the_package_and_nothing_else(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    package = [path for path in (ROOT / "slsgu_cli").rglob("*") if path.is_file()]
    wanted = {str(path.relative_to(ROOT)) for path in package if path.suffix != ".pyc"}
    assert {name for name in held if name.startswith("slsgu_cli/")} == wanted
    assert {name.split("/")[0] for name in held} == {"slsgu_cli", f"{wheel.stem[:11]}.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in held)


def test_an_installed_package_has_its_program(site, tmp_path):
    installed = {"env": {"PYTHONPATH": str(site)}, "cwd": tmp_path}
    assert slsgu("--version", **installed).stdout.startswith("slsgu ")
    assert slsgu("ls", **installed).stdout.startswith("kind\t")
    program = (site / "bin" / "slsgu").read_text()
    assert "from slsgu_cli" in program


def test_the_ci_jobs_of_the_guide_fail_on_unmet_bounds(jobs, run, tmp_path):
    github, gitlab = jobs
    steps = {step["name"]: step["run"] for step in github["steps"] if "name" in step}
    assert [*steps] == ["Plan", "Remove", "List requests"]
    installs = [step["run"] for step in github["steps"] if "run" in step and "name" not in step]
    assert installs == gitlab["before_script"]
    assert list((tmp_path / "wheels").glob(installs[0].rpartition("/")[2]))
    recipe = tmp_path / "removals.toml"
    recipe.write_text(RECIPE.format(least=50))
    for name, script in steps.items():
        done = run(script, github["env"])
        assert done.returncode == 0, done.stderr
        if name == "Remove":
            assert "facebook\tfa1<=0\t0\tholds" in done.stdout
    (upload,) = [step["with"] for step in github["steps"] if "upload" in step.get("uses", "")]
    assert upload["path"].split() == gitlab["artifacts"]["paths"]
    for path in (*upload["path"].split(), "removals/checkpoint", "removals/report.html"):
        assert (tmp_path / path).exists(), path
    assert state(tmp_path) == "forgotten within bounds"

    # The next job has the store of the one before, and no outputs.
    shutil.rmtree(tmp_path / "removals")
    scripts = ["\n".join(gitlab[key]) for key in ("script", "after_script")]
    for script in scripts:
        done = run(script, gitlab["variables"])
        assert done.returncode == 0, done.stderr
    plan = [line.split("\t") for line in run(scripts[0], gitlab["variables"]).stdout.splitlines()]
    assert {row[3] for row in plan[1:] if row[0] in ("grad", "search", "apply")} == {"done"}
    assert (tmp_path / "removals" / "checkpoint").is_dir()

    recipe.write_text(RECIPE.format(least=101))
    assert run(steps["Plan"], github["env"]).returncode == 0
    for script, variables in ((steps["Remove"], github["env"]), (scripts[0], gitlab["variables"])):
        failed = run(script, variables)
        assert failed.returncode == 5
        assert "1 bounds are not met: ta1.brands>=101 of facebook" in failed.stderr
    assert run(scripts[1], gitlab["variables"]).returncode == 0
    assert state(tmp_path) == "out of bounds"


def state(folder):
    """Return what became of the request, as a job tells it."""
    (request,) = json.loads((folder / "requests.json").read_text())["requests"]
    return request["state"]
