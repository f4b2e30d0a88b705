"""The recipe that `slsgu init` writes."""

import json
from pathlib import Path

import slsgu_cli
from slsgu_cli.records.sets import LOCAL

DEMO = Path(slsgu_cli.__file__).parent / "demo"

HEAD = """\
# Which concepts to remove from which model, how to measure the result, and what to write.
# `slsgu run {file} --plan` shows the stages, `slsgu run {file}` runs them.
# Keys are the options of the commands: `slsgu build-sets --help` lists those of [sets].
# Paths are relative to the folder that the command runs in.

model = {model}
# pretrained = "laion2b_s34b_b79k"  # weights of a model name
# together = "joint"                # "sum": each alone, "after": each on top of the others
bounds = ["fa1 <= 0"{bounds}]  # of every request; exit code 5 if one does not hold

[sets]
sources = [{source}]  # {{}} stands for the concept
{retain}
[evaluation.brands]  # labelled images to measure on; half of each class are test images
source = {rows}
{templates}
[search]
criterion = "fa5"  # or "fa1"

[outputs]
checkpoint = {checkpoint}
edits = {edits}
report = {report}
"""
REQUEST = """
[[request]]
name = {name}
# aliases = ["other words"]       # other words for the concept in captions
# exclusions = ["other things"]   # skip captions with these words
# id = "R-17"
received = 2026-11-01
# reference = "the requester's own reference"
# bounds = ["loss.brands <= 1"]
"""


def recipe_text(path: Path, *, demo: bool) -> str:
    """Return a recipe to fill in, or one that runs on the embedded model."""
    places = {
        "model": f"{LOCAL}my-clip",
        "source": "my-pairs/*.tar",
        "rows": "my-brands.parquet",
        "checkpoint": "my-clip-without-them",
        "edits": "edits",
        "report": "report.html",
    }
    names, retain, templates, bounds = ["facebook"], "# retain_samples = 8000\n", "", ""
    if demo:
        train = str(DEMO / "train.parquet")
        places = {
            "model": f"{LOCAL}{DEMO / 'clip'}",
            "source": f"{train}?concept={{}}",
            "rows": f"{DEMO / 'heldout.parquet'}?kind=brand",
            "checkpoint": f"{path.stem}/checkpoint",
            "edits": f"{path.stem}/edits",
            "report": f"{path.stem}/report.html",
        }
        names, bounds = ["facebook", "spotify", "github"], ', "loss.brands <= 2"'
        retain = f"retain_sources = [{json.dumps(train)}]\nretain_samples = 800\n"
        templates = f"templates = {json.dumps(str(DEMO / 'templates.txt'))}\n"
    quoted = {key: json.dumps(place) for key, place in places.items()}
    text = HEAD.format(file=path, retain=retain, templates=templates, bounds=bounds, **quoted)
    return text + "".join(REQUEST.format(name=json.dumps(name)) for name in names)
