"""The job for GitHub Actions in the guide: its shell steps run as they stand there."""

import json
import os
import socket
import subprocess
import sys
import threading

import pytest
import yaml
from icons import write_few
from places import ROOT
from processes import inside

# Stands for the program on the PATH: it asks the tests to run the command, where PyTorch is
# loaded already, and tells what they answer.
PROGRAM = """\
#!{python} -S
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as tests:
    tests.connect({address!r})
    own = {{key: value for key, value in os.environ.items() if key.startswith("SLSGU_")}}
    tests.sendall(json.dumps([os.getcwd(), own, sys.argv[1:]]).encode())
    tests.shutdown(socket.SHUT_WR)
    code, out, told = json.loads(b"".join(iter(lambda: tests.recv(1 << 16), b"")))
sys.stdout.write(out)
sys.stderr.write(told)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def job():
    text = (ROOT / "docs" / "guide" / "automation.md").read_text()
    (block,) = [part.partition("```")[0] for part in text.split("```yaml\n")[1:]]
    (job,) = yaml.safe_load(block)["jobs"].values()
    return job


@pytest.fixture
def run(job, tmp_path, vocabulary):
    """`run(script)` runs a step as Actions do: bash, and the first failure ends it."""
    write_few(tmp_path / job["env"]["DATA"], "facebook")
    address = str(tmp_path / "tests.socket")
    program = tmp_path / "bin" / "slsgu"
    program.parent.mkdir()
    program.write_text(PROGRAM.format(python=sys.executable, address=address))
    program.chmod(0o755)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen()
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    # Fewer layers than by default, along one direction: what is tested is the steps.
    fewer = {"SLSGU_TOWER": "text", "SLSGU_DIRECTION": "whitened"}
    environment = os.environ | job["env"] | fewer | {"PATH": path}

    def script(text):
        words = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", text]
        step = subprocess.Popen(words, cwd=tmp_path, env=environment, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
        ended = threading.Thread(target=_tell_when_ended, args=(step, address))
        ended.start()
        while _answer(listening):
            pass
        ended.join()
        return step.returncode, step.stdout.read(), step.stderr.read()

    yield script
    listening.close()


def _tell_when_ended(step, address):
    step.wait()
    with socket.socket(socket.AF_UNIX) as tests:
        tests.connect(address)


def _answer(listening):
    """Run the command that is asked for next; return whether one was."""
    with listening.accept()[0] as asking:
        asked = b"".join(iter(lambda: asking.recv(1 << 16), b""))
        if not asked:
            return False
        folder, variables, words = json.loads(asked)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            done = inside(*words, env=variables)
        asking.sendall(json.dumps([int(done.exit_code), done.stdout, done.stderr]).encode())
    return True


def test_the_steps_of_the_example(job, run, tmp_path):
    steps = [step for step in job["steps"] if "slsgu " in step.get("run", "")]
    assert [step["name"] for step in steps] == ["Forget", "Check", "Report"]
    for step in steps:
        code, out, told = run(step["run"])
        assert code == 0, told
        if step["name"] == "Check":
            assert "fa1<=0\t0\tholds" in out
    (upload,) = [step["with"] for step in job["steps"] if "upload" in step.get("uses", "")]
    for path in upload["path"].split():
        assert (tmp_path / path).exists(), path
    assert json.loads((tmp_path / "search.json").read_text())["schema"] == 1
    (check,) = [step["run"] for step in steps if step["name"] == "Check"]
    failed, out, told = run(check.replace("fa1<=0", "fa1>0"))
    assert failed == 5
    assert "1 of 2 assertions fail: fa1>0 is 0" in told
    # The first failure ended the step.
    assert "spelling" not in out
