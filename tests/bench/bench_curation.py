"""Compare filtering captions and reading tar shards with plain loops, side by side.

    python tests/bench/bench_curation.py --millions 1 50 --shards 8

Captions: parquet files of generated captions of 4 to 14 words (3 in 100 not ASCII) are
filtered for two names by slsgu and by a loop over pyarrow.compute, which only counts the
matches of a regular expression. Each runs in its own process, start-up not counted; peak
memory is shown. Shards: tars of 2,000 images of 20 kB, read by slsgu, which extracts the
samples of a name, and by tarfile, which only reads the captions. The goal: at least 0.8 times
the plain rate, and constant memory.
"""

import argparse
import io
import subprocess
import sys
import tarfile
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[2]
MILLION = 1_000_000
VOCABULARY = """a the of photo in red blue house car dog cat vintage poster wall art canvas print
shirt men women kids new sale free shipping rocket deer stock image vector illustration and
background wedding kitchen recipe best 2019 hotel map design logo black white"""
COMMON = """
    import sys, time
    from pathlib import Path

    def done(start, rows, found):
        seconds = time.perf_counter() - start
        status = Path("/proc/self/status").read_text()
        peak = int(status.partition("VmHWM:")[2].split()[0])
        print(rows, seconds, found, peak)
"""
PLAIN_CAPTIONS = """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    start, rows, found = time.perf_counter(), 0, 0
    pattern = r"(?i)\\b(elon\\s+musk|ada\\s+lovelace)\\b"
    for path in sorted(Path(sys.argv[1]).glob("*.parquet")):
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(65536, columns=["TEXT"]):
                hits = pc.match_substring_regex(batch.column(0), pattern)
                rows, found = rows + len(batch), found + (pc.sum(hits).as_py() or 0)
    done(start, rows, found)
"""
OUR_CAPTIONS = """
    from slsgu_cli.sources.concept_index import ConceptIndex
    from slsgu_cli.sets.scan import scan_metadata
    from slsgu_cli.records.options import BuildRequest
    from slsgu_cli.records.sets import Concept, ModelSpec

    concepts = (Concept("elon musk", ("elon musk",)), Concept("ada lovelace", ("ada lovelace",)))
    paths = sorted(map(str, Path(sys.argv[1]).glob("*.parquet")))
    request = BuildRequest(name="x", model=ModelSpec("unused"), retain_sources=("elsewhere",))
    start = time.perf_counter()
    result = scan_metadata(paths, request, ConceptIndex(concepts), url_column="URL")
    done(start, result.seen, len(result.hits))
"""
PLAIN_SHARDS = """
    import tarfile

    start, rows, found = time.perf_counter(), 0, 0
    for path in sorted(Path(sys.argv[1]).glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".txt"):
                    rows += 1
                    text = b" ".join(tar.extractfile(member).read().lower().split())
                    found += b"elon musk" in text
    done(start, rows, found)
"""
OUR_SHARDS = """
    import shutil
    from slsgu_cli.sets.collection import collect
    from slsgu_cli.records.options import BuildRequest
    from slsgu_cli.records.sets import CollectRequest, Concept, ModelSpec
    from slsgu_cli.store.store import Store

    if __name__ == "__main__":
        wanted = CollectRequest(
            concepts=(Concept("elon musk", ("elon musk",)),), sources=(sys.argv[1],)
        )
        request = BuildRequest(name="x", model=ModelSpec("unused"), retain_sources=("elsewhere",))
        start = time.perf_counter()
        store = Store(sys.argv[1] + "-store")
        record = collect(store, request, wanted).record
        done(start, record.seen, record.concepts["elon musk"].rows)
        shutil.rmtree(store.root)
"""


def captions(count: int, generator: np.random.Generator) -> list[str]:
    """Generate captions; one in 50,000 mentions Elon Musk."""
    vocabulary = np.asarray(VOCABULARY.split())
    lengths = generator.integers(4, 15, count)
    words = vocabulary[generator.integers(0, len(vocabulary), lengths.sum())]
    ends = np.cumsum(lengths)
    made = [" ".join(words[end - n : end]) for end, n in zip(ends, lengths, strict=True)]
    made[::33] = [f"{text} café" for text in made[::33]]
    made[17::50_000] = [f"{text} with Elon  Musk" for text in made[17::50_000]]
    return made


def write_metadata(folder: Path, millions: int) -> None:
    """Make as many files of a million rows: one file, and links to it."""
    texts = captions(MILLION, np.random.default_rng(0))
    urls = [f"https://images.example.com/{number:08}/photo.jpg" for number in range(MILLION)]
    first = folder / "00000.parquet"
    pq.write_table(pa.table({"URL": urls, "TEXT": texts}), first, row_group_size=MILLION // 4)
    _link(first, millions)


def write_shards(folder: Path, count: int) -> None:
    """Make tar shards of 2,000 samples in img2dataset's layout: one file, and links to it."""
    generator = np.random.default_rng(0)
    image, texts = generator.bytes(20_000), captions(2000, generator)
    first = folder / "00000.tar"
    with tarfile.open(first, "w") as tar:
        for number, text in enumerate(texts):
            for suffix, data in (
                ("jpg", image),
                ("txt", text.encode()),
                ("json", b'{"status": "success"}'),
            ):
                member = tarfile.TarInfo(f"{number:09}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    _link(first, count)


def _link(first: Path, count: int) -> None:
    for number in range(1, count):
        first.with_stem(f"{number:05}").symlink_to(first)


def run(code: str, argument: Path) -> tuple[int, float, int, int]:
    """Run a script; return rows, seconds, rows found and peak memory in kB."""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(textwrap.dedent(COMMON) + textwrap.dedent(code))
        script.flush()
        output = subprocess.run(
            [sys.executable, script.name, str(argument)],
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    rows, seconds, found, peak = output.split()
    return int(rows), float(seconds), int(found), int(peak)


def compare(what: str, plain: str, ours: str, argument: Path, rounds: int) -> None:
    """Run both in turn and print the best of each, and the ratio."""
    results = [(run(plain, argument), run(ours, argument)) for _ in range(rounds)]
    best = [min(side, key=lambda result: result[1]) for side in zip(*results, strict=True)]
    rates = [rows / seconds for rows, seconds, _, _ in best]
    for name, (rows, seconds, found, peak), rate in zip(
        ("plain", "slsgu"), best, rates, strict=True
    ):
        print(
            f"{what:<22} {name}: {rows} rows in {seconds:.2f} s, {rate:,.0f} rows/s, "
            f"{found} found, peak {peak / 1024:.0f} MB"
        )
    print(f"{what:<22} ratio {rates[1] / rates[0]:.2f}")


def main() -> None:
    """Make the data, run both ways, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        for millions in options.millions:
            folder = Path(name, f"{millions}-million")
            folder.mkdir()
            write_metadata(folder, millions)
            what = f"captions, {millions} million"
            compare(what, PLAIN_CAPTIONS, OUR_CAPTIONS, folder, options.rounds)
        folder = Path(name, "shards")
        folder.mkdir()
        write_shards(folder, options.shards)
        compare("shards", PLAIN_SHARDS, OUR_SHARDS, folder, options.rounds)


if __name__ == "__main__":
    main()
