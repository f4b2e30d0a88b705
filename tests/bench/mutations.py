"""How many wrong lines the tests notice: forty lines are changed, one at a time.

    python tests/bench/mutations.py
    python tests/bench/mutations.py --keep-coverage /tmp/mutations.coverage --only store

All happens in a temporary copy of the tracked files. The tests that are not slow run there
once, to learn which of them run which line. Then each line is changed in turn, and of the
tests that run it those are run that run least else, --most at most, as many as take a
minute. A line is found by what stands in it, wherever in the package that is. Printed are
the area, the line, `caught` or `survived`, and the test that caught it, a tab between them.
With --keep-coverage, what the first run told is kept in that file and one beside it, and
taken from there when they exist; remove them when a line has changed its place.
"""

import argparse
import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path

from coverage import CoverageData

ROOT = Path(__file__).parents[2]
PACKAGE = "slsgu_cli"
SECONDS_OF_TESTS = 60
SECONDS = 180
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0")

# Areas, what stands in a line of the package and nowhere else, and what is put in its place.
MUTATIONS = r"""
# losses
- return (1 - (images * texts).sum(dim=-1)).mean(dim=-1)
+ return (1 + (images * texts).sum(dim=-1)).mean(dim=-1)
- return -F.logsigmoid(truth * logits).sum(dim=(-2, -1)) / images.shape[-2]
+ return -F.logsigmoid(truth * logits).sum(dim=(-2, -1))
- losses.append(loss(images[full:], texts[full:])[None])
+ losses.append(loss(images[full:], images[full:])[None])
# scoring
- sqrt(_dot(a, a)) * sqrt(_dot(b, b))
+ sqrt(_dot(a, a)) * sqrt(_dot(a, a))
- return cosine if signed else abs(cosine)
+ return cosine
- points[index][1] <= least_above
+ points[index][1] < least_above
- np.multiply(a[i : i + chunk], b[i : i + chunk], dtype=np.float64).sum()
+ np.multiply(a[i : i + chunk], b[i : i + chunk]).sum()
# steps
- step = 2 * tried_step if high is None else (low + high) / 2
+ step = 2 * tried_step if high is None else high / 2
- key=lambda i: (candidates[i][0], -candidates[i][1], i)
+ key=lambda i: (candidates[i][0], candidates[i][1], i)
- self._too_short[name] = max(known, self.steps[name])
+ self._too_short[name] = min(known, self.steps[name])
- least = (1 + CLOSE) * self._too_short.get(name, 0.0)
+ least = (1 - CLOSE) * self._too_short.get(name, 0.0)
# whitening
- return self.damping * float(_diagonal(self.covariance).double().mean())
+ return self.damping * float(_diagonal(self.covariance).double().sum())
- torch.cholesky_solve(rows.mT, self._factor).mT.reshape(gradient.shape)
+ torch.cholesky_solve(rows.mT, self._factor).reshape(gradient.shape)
- x = x[self._valid]
+ x = x[:]
- return positions < self.lengths(inputs).unsqueeze(1)
+ return positions <= self.lengths(inputs).unsqueeze(1)
# matching
- return r"\s+".join(map(re.escape, parts)) + after
+ return r"\s+".join(map(re.escape, parts))
- or any(test(caption) for test in self._excluded)
+ or False
- may_match = ~_flags(pc.string_is_ascii(captions), True)
+ may_match = np.zeros(len(captions), dtype=bool)
- return ["|".join([*group, ENTITY]) for group in groups]
+ return ["|".join(group) for group in groups]
# edits
- return max((edit.before() for edit in edits)
+ return min((edit.before() for edit in edits)
- if not math.isfinite(share):
+ if math.isnan(share):
- made_for.get(coarse) == made_for.get("fp32") == layer_digest(values, coarse)
+ made_for.get(coarse) == layer_digest(values, coarse)
- return dataclasses.replace(self, factor=self.factor * factor)
+ return dataclasses.replace(self, factor=factor)
- ((u[:, :rank] * s[:rank]) @ v[:rank])
+ (u[:, :rank] @ v[:rank])
# archive
- if count > 1 and stride <= reach:
+ if count > 1 and stride < reach:
- if max(offset + nbytes, tensor.storage.nbytes) > record.info.file_size and not empty:
+ if tensor.storage.nbytes > record.info.file_size and not empty:
- places.append(record.end + (4 if signed else 0))
+ places.append(record.end + 4)
- after = zlib.crc32(new, after)
+ after = zlib.crc32(new)
- return type(value) is int and 0 <= value < 1 << 62
+ return type(value) is int and value < 1 << 62
# store
- aside = path.with_name(partial_name(path.name))
+ aside = path
- files.discard(partial)
+ pass
- if max(ends, default=0) != size - base:
+ if max(ends, default=0) > size - base:
- self._pixels += written.result()
+ written.result()
- if array.size and array.nchunks_initialized != array.nchunks:
+ if array.size and array.nchunks_initialized > array.nchunks:
# metrics
- ((logits == truth) & (columns < labels.unsqueeze(1)))
+ ((logits == truth) & (columns > labels.unsqueeze(1)))
- others.topk(min(TOP, logits.shape[1] - 1), dim=1)
+ others.topk(min(TOP, logits.shape[1]), dim=1)
- (rows - mean) / (len(rows) - 1) ** 0.5
+ (rows - mean) / len(rows) ** 0.5
# draw
- if self.size is None or len(self._heap) < self.size:
+ if self.size is None or len(self._heap) <= self.size:
- hashlib.blake2b(data, digest_size=8, key=salt)
+ hashlib.blake2b(data, digest_size=8)
- return f"{tail(file)}\0{row}"
+ return f"{file}\0{row}"
"""


def mutations() -> list[tuple[str, str, str]]:
    """Return area, fragment and replacement of each mutation."""
    lines, area, table = iter(MUTATIONS.strip().splitlines()), "", []
    for line in lines:
        if line.startswith("# "):
            area = line[2:]
        else:
            table.append((area, line[2:], next(lines)[2:]))
    return table


def place_of(fragment: str) -> tuple[Path, range]:
    """Return the file that holds a fragment, from the root on, and the lines of its statement."""
    files = {path: path.read_text("utf-8") for path in sorted((ROOT / PACKAGE).rglob("*.py"))}
    places = [path for path, text in files.items() for _ in range(text.count(fragment))]
    if len(places) != 1:
        raise SystemExit(f"{fragment!r} stands in {len(places)} lines, not in one")
    text = files[places[0]]
    line = text[: text.index(fragment)].count("\n") + 1
    around = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.stmt) and node.lineno <= line <= node.end_lineno
    ]
    inner = max(around, key=lambda node: node.lineno)
    last = inner.body[0].lineno - 1 if hasattr(inner, "body") else inner.end_lineno
    return places[0].relative_to(ROOT), range(inner.lineno, max(inner.lineno, last) + 1)


def run_tests(copy: Path, arguments: list, **more) -> tuple[int | None, str]:
    """Return the exit code of pytest in the copy, None where it took too long, and its output."""
    own = {"PYTHONPATH": str(copy)}
    seconds = more.pop("seconds", None)
    process = subprocess.Popen(
        [*PYTEST, *arguments],
        cwd=copy,
        env=os.environ | own | more,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]
    return process.returncode, output


def tests_by_line(copy: Path, kept: Path) -> tuple[dict, dict]:
    """Return the tests of each (file, line), those that run least first, and their seconds."""
    times = kept.with_name(f"{kept.name}-times.xml")
    if not (kept.exists() and times.exists()):
        # Python's newer way to trace lines knows no contexts.
        settings = {"COVERAGE_FILE": str(kept), "COVERAGE_CORE": "ctrace"}
        options = ["-m", "not slow", "--cov", "--cov-context=test", "--cov-report="]
        code, output = run_tests(copy, [*options, f"--junitxml={times}"], **settings)
        print("\n".join(output.splitlines()[-5:]), file=sys.stderr)
        if code not in (0, 1):
            raise SystemExit("the tests did not run to their end")
    seconds, unfit = defaultdict(float), set()
    for case in ET.parse(times).iter("testcase"):
        test = f"{case.get('classname').replace('.', '/')}.py::{case.get('name').split('[')[0]}"
        seconds[test] += float(case.get("time"))
        if case.find("failure") is not None or case.find("error") is not None:
            unfit.add(test)
    data = CoverageData(basename=str(kept))
    data.read()
    by_line, size = {}, defaultdict(int)
    for name in data.measured_files():
        inside = name[name.rindex(f"/{PACKAGE}/") + 1 :]
        for line, contexts in data.contexts_by_lineno(name).items():
            own = {re.split(r"[\[|]", context)[0] for context in contexts} & set(seconds)
            by_line[inside, line] = own - unfit
            for test in own:
                size[test] += 1
    ordered = {
        place: sorted(own, key=lambda test: (size[test], test)) for place, own in by_line.items()
    }
    return ordered, seconds


def chosen(tests: list[str], seconds: dict[str, float], most: int) -> list[str]:
    """Return the first tests that take a minute together, or the first alone."""
    taken, spent = [], 0.0
    for test in tests[:most]:
        spent += seconds[test]
        if spent <= SECONDS_OF_TESTS or not taken:
            taken.append(test)
    return taken


def verdict(copy: Path, path: Path, mutated: str, tests: list[str]) -> tuple[str, str]:
    """Return `caught` and the test that did, or `survived` and how many ran, of a changed file."""
    if not tests:
        return "survived", "no test runs it"
    original = (copy / path).read_text("utf-8")
    (copy / path).write_text(mutated, "utf-8")
    try:
        code, output = run_tests(copy, ["-x", "--no-cov", *tests], seconds=SECONDS)
    finally:
        (copy / path).write_text(original, "utf-8")
    if code is not None and code > 2:
        raise SystemExit(f"{output}\nthe tests of {path} could not be run")
    if code == 0:
        return "survived", f"{len(tests)} tests"
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    return "caught", failed[1] if failed else "time-out" if code is None else f"exit code {code}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep-coverage", type=Path, metavar="FILE")
    parser.add_argument("--only", choices=sorted({area for area, _, _ in mutations()}))
    parser.add_argument("--most", type=int, default=60, help="tests to run of each line")
    args = parser.parse_args()
    # In the background of a shell an interrupt is ignored, and the tests' processes inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    table = [(*entry, *place_of(entry[1])) for entry in mutations()]
    table = [entry for entry in table if args.only in (None, entry[0])]
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder).resolve() / "copy"
        for name in filter(None, listed.stdout.decode().split("\0")):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
        kept = args.keep_coverage or Path(folder, "coverage")
        by_line, seconds = tests_by_line(copy, kept.resolve())
        caught = 0
        for area, fragment, replacement, path, lines in table:
            tests = {test: None for n in lines for test in by_line.get((str(path), n), ())}
            mutated = (copy / path).read_text("utf-8").replace(fragment, replacement)
            picked = chosen(list(tests), seconds, args.most)
            outcome = verdict(copy, path, mutated, picked)
            caught += outcome[0] == "caught"
            print(area, fragment, *outcome, sep="\t", flush=True)
    print(f"caught {caught} of {len(table)}")


if __name__ == "__main__":
    main()
