"""A stand-in for img2dataset: the same command line and files, for file:// URLs only.

It fetches in reverse order, as downloads arrive in any order. Three environment variables
make it misbehave: FAKE_DIES (the number of shards after which it ends, with code 0 as the real
one may), FAKE_HANGS, and FAKE_LOG, a file that gets a line for every run.
"""

import ast
import hashlib
import io
import json
import os
import sys
import tarfile
import time
from pathlib import Path

import pyarrow.parquet as pq


def value(text):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def fetch(url):
    if not url.startswith("file://"):
        return None, "<urlopen error [Errno 111] Connection refused>"
    path = Path(url.removeprefix("file://"))
    return (path.read_bytes(), None) if path.exists() else (None, "HTTP Error 404: Not Found")


def shard(folder, number, rows, columns):
    told = []
    with tarfile.open(folder / f"{number:05}.tar", "w") as tar:
        for place, row in reversed(list(enumerate(rows))):
            data, error = fetch(row["url"])
            key = f"{number:05}{place:03}"
            fields = {name: row[name] for name in [*columns, "caption", "url"]}
            fields |= {"key": key, "status": "failed_to_download" if error else "success"}
            fields |= {"error_message": error}
            told.append(dict(fields))
            if error:
                continue
            fields["sha256"] = hashlib.sha256(data).hexdigest()
            caption = row["caption"].encode()
            for suffix, content in (
                ("jpg", data),
                ("txt", caption),
                ("json", json.dumps(fields).encode()),
            ):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    import pyarrow as pa

    pq.write_table(pa.Table.from_pylist(told), folder / f"{number:05}.parquet")
    (folder / f"{number:05}_stats.json").write_text(json.dumps({"count": len(rows)}))


def main():
    options = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[1:])
    options = {name: value(text) for name, text in options.items()}
    if "FAKE_LOG" in os.environ:
        with Path(os.environ["FAKE_LOG"]).open("a") as log:
            log.write(json.dumps(options) + "\n")
    print("Starting the downloading of this file")
    rows = pq.read_table(options["url_list"]).to_pylist()
    folder, size = Path(options["output_folder"]), options["number_sample_per_shard"]
    folder.mkdir(parents=True, exist_ok=True)
    dies = int(os.environ.get("FAKE_DIES", "-1"))
    for number in range(-(-len(rows) // size)):
        if (folder / f"{number:05}_stats.json").exists():
            continue
        if "FAKE_HANGS" in os.environ:
            time.sleep(600)
        if dies == 0:
            print("killed by something")
            return
        dies -= 1
        shard(
            folder,
            number,
            rows[number * size : (number + 1) * size],
            options["save_additional_columns"],
        )


main()
