"""A store with every record of a concept with a hostile name, and no model."""

import json
from dataclasses import replace

import numpy as np

from slsgu_cli.checkpoints.edits import make_edit, write_edit
from slsgu_cli.checkpoints.number_formats import layer_digests
from slsgu_cli.engine.examples import BeforeAfter
from slsgu_cli.figures.pictures import Example
from slsgu_cli.records.codec import sealed
from slsgu_cli.records.comparison import ClipComparison, ClipOutcome, Method
from slsgu_cli.records.directions import FALLBACK, Direction
from slsgu_cli.records.figures import Accuracy, TextStructure
from slsgu_cli.records.method import (
    Alignment,
    Criterion,
    EditHeader,
    GradientHeader,
    GradientPointer,
    LayerScore,
    ParameterNorm,
    Precision,
    Ranking,
    Tower,
    Trial,
    Trials,
)
from slsgu_cli.records.sets import DataRef, InputSpec, ModelSpec, SetManifest
from slsgu_cli.records.studies import (
    JointMove,
    JointSearch,
    JointTrial,
    Sweep,
    SweepRow,
)
from slsgu_cli.records.verification import (
    NEW,
    Attempt,
    Check,
    ClassifierScore,
    Curve,
    Finding,
    Guess,
    KnownClass,
    MembershipScore,
    NearName,
    Neighbourhood,
    Point,
    Retrieval,
    Retrieved,
    Shift,
    Variant,
    Verification,
    VerifiedModel,
)
from slsgu_cli.report.gather import SetRecords, gather
from slsgu_cli.report.image_sections import cosines, examples
from slsgu_cli.report.page import all_sections, page
from slsgu_cli.report.sections import Section
from slsgu_cli.store.artifacts import joint_label
from slsgu_cli.store.catalog import Catalog
from slsgu_cli.store.store import Store

NAME = "mouse"
HOSTILE = "<script>alert('m')</script> & \"mouse\"\u202e\x07"
MODEL = ModelSpec("local-dir:clip")
INPUT = InputSpec(8, 8, (0.5,) * 3, (0.5,) * 3, "bicubic", "shortest", 0, "tokenizer", 16)
LAYERS = tuple(
    f"{start}transformer.resblocks.{block}.{part}.weight"
    for start in ("visual.", "")
    for block in range(12)
    for part in ("attn.out_proj", "mlp.c_fc", "mlp.c_proj")
)
CHOSEN = "transformer.resblocks.3.mlp.c_proj.weight"
FRONT = (LAYERS[2], LAYERS[19], LAYERS[35], CHOSEN, LAYERS[60])
TITLES = (
    "Result",
    "Request",
    "Example images",
    "Cosine similarities",
    "Verification",
    "Pareto front of layers",
    "Step search",
    "Trajectories",
    "Comparison with other methods",
    "Model and gradients",
    "Edit",
    "How to repeat it",
    "Records behind this page",
)
BEFORE, KEPT = Accuracy(96.97, 100.0, 33), Accuracy(94.73, 97.63, 1138)


def fill(store: Store, concept: str = HOSTILE, name: str = NAME) -> None:
    """Write every record of one concept, all consistent."""
    evals = {
        "brands": _block(store, "all", "brands"),
        "objects <b>": _block(store, "all", "others"),
    }
    manifest = SetManifest(
        name=name,
        concept=concept,
        patterns=(concept, "a.*b"),
        model=MODEL,
        input=INPUT,
        forget=_block(store, name, "forget"),
        retain=_block(store, name, "retain"),
        evals=evals,
        forget_eval="brands",
        seed=0,
        command=("slsgu", "build-sets", name, "--concept", concept, "--source", "a b.parquet"),
        version="0.1.0",
    )
    store.write_record(f"sets/{name}.json", manifest)
    weights = {layer: ParameterNorm((4, 6), 8.0) for layer in LAYERS}
    for role, loss in (("forget", "cosine"), ("retain", "contrastive")):
        header = GradientHeader(
            loss, "+grad", 0.484, 6, 16, 96, "fp32", "model", f"{name}-{role}", weights, "0.1.0"
        )
        store.write_tensors(f"gradients/{name}-{role}.safetensors", {}, header)
    roles = (f"{name}-forget", f"{name}-retain")
    pointer = GradientPointer(name, MODEL, "model", *roles, *roles, 16, "fp32", "0.1.0")
    store.write_record(f"gradients/{name}.json", pointer)
    ranking = Ranking(name, *roles, Alignment.ABS, (FALLBACK,), tuple(map(score, LAYERS)), "0.1.0")
    store.write_record(f"rankings/{name}.json", ranking)
    trials = [trial for layer in FRONT for trial in _trials(layer, set(evals))]
    shown = {known: ref.fingerprint for known, ref in evals.items()}
    recorded = Trials(
        name,
        roles[0],
        (Direction.GRADIENT,),
        None,
        "model",
        shown,
        Precision.FP32,
        Criterion.FA1,
        None,
        BEFORE,
        dict.fromkeys(evals, KEPT),
        tuple(trials),
        "0.1.0",
    )
    store.write_record(f"trials/{name}.json", recorded)
    walked = (replace(t, utility=dict.fromkeys(evals, Accuracy(90.0, 97.0, 9))) for t in trials)
    store.write_record(f"trajectories/{name}.json", replace(recorded, trials=tuple(walked)))
    _write_edit(store, name, concept, next(t for t in trials if t.layer == CHOSEN and t.utility))


def fill_several(store: Store, *names: str) -> None:
    """Write a joint search and a sweep over concepts of the store."""
    first = store.read_record(f"trials/{names[0]}.json", Trials)
    gone = next(trial for trial in first.trials if trial.utility)
    move = (gone.layer, gone.tower, FALLBACK, gone.step, gone.share)
    moves = [JointMove(name, *move) for name in names]
    stages = [
        JointTrial(
            tuple(moves[:count]),
            dict.fromkeys(names[:count], gone.forget),
            dict.fromkeys(names[:count], 0.1),
            gone.utility,
        )
        for count in range(1, len(names) + 1)
    ]
    joint = JointSearch(
        names=names,
        concepts=tuple(HOSTILE for _ in names),
        gradients={name: f"{name}-forget" for name in names},
        retain_data={},
        model=MODEL,
        model_fingerprint="model",
        evals=first.evals,
        precision=Precision.FP32,
        criterion=Criterion.FA1,
        margin=None,
        baseline_forget=dict.fromkeys(names, BEFORE),
        baseline_utility=first.baseline_utility,
        stages=tuple(stages),
        trials=tuple(stages),
        version="0.1.0",
    )
    store.write_record(f"joint/{joint_label(names)}.json", joint)
    rows = [
        SweepRow(
            name,
            f"{name}-forget",
            f"{name}-retain",
            gone.layer,
            gone.tower,
            FALLBACK,
            gone.step,
            gone.share,
            BEFORE,
            first.baseline_utility,
            gone.forget,
            gone.utility or {},
            True,
        )
        for name in names
    ]
    sweep = Sweep("all", "recipe", names, MODEL, "model", Criterion.FA1, tuple(rows), "0.1.0")
    store.write_record("sweeps/all.json", sweep)


def fill_verification(store: Store, name: str = NAME) -> None:
    """Write a verification of a concept's edit."""
    edit = store.read_header(f"edits/{name}.safetensors", EditHeader)
    manifest = store.read_record(f"sets/{name}.json", SetManifest)
    subjects = []
    for label, header, top1 in (("original", None, 96.0), ("edit", edit, 3.0)):
        gone = Accuracy(top1, top1, 33)
        back = tuple(
            Point(step, Accuracy(min(96.0, top1 + 12 * step), 97.0, 33)) for step in range(9)
        )
        curves = (Curve("its name", HOSTILE, back, None), Curve(NEW, "zorp", back[:5], None))
        near = Neighbourhood((NearName(HOSTILE, 0.5),), (Guess("castle", 12),), 33)
        classes = {"brands <b>": (KnownClass("<i>ubuntu</i>", 30, top1, 0.4),)}
        like = {
            "look-alikes: <b>": (KnownClass("<i>debian</i>", 30, top1, 0.6),),
            "random classes: <b>": (KnownClass("castle", 30, 90.0, 0.1),),
        }
        structure = {
            what: TextStructure(3745, spread, 62.5)
            for what, spread in (("the edit", 71.0), ("a random change", 99.0))
            if header
        }
        score = ClassifierScore("linear probe", "the concept", 90, 98.0, top1, 33, 900)
        found = Retrieved("its name", "the model's own", top1, 50.0, 60.0, 70.0, 4, 900)
        index = Retrieval((found,), (Shift("its images", 33, 0, 33, 0.25, 0.5),))
        attack = MembershipScore("loss", "retain", 71.0, 2.0, 96, 96)
        findings = (
            Finding(Check.BASELINE, "k", {}, variants=(Variant("as it is", gone, kept_figures()),)),
            Finding(Check.AUGMENT, "k", {}, variants=(Variant("<b>flip</b>", gone),)),
            Finding(Check.DESCRIPTION, "k", {}, variants=(Variant("<b>a mouse</b>", gone),)),
            Finding(Check.RELEARN, "k", {"shots": "8"}, curves=curves),
            Finding(Check.NEIGHBOURS, "k", {}, neighbourhood=near),
            Finding(Check.NEAREST, "k", {}, classes=classes),
            Finding(Check.LOOK_ALIKES, "k", {}, classes=like),
            Finding(Check.NEUTRAL_PROMPTS, "k", {}, structure=structure),
            Finding(Check.PROBE, "k", {}, classifiers=(score,)),
            Finding(Check.RETRIEVAL, "k", {}, retrieval=index),
            Finding(Check.MEMBERSHIP, "k", {}, membership=(attack,)),
            Finding(
                Check.RING_A_BELL,
                "k",
                {},
                attempts=(
                    Attempt("its name", HOSTILE, 0.4, gone),
                    Attempt("another word", "wool", 0.3, gone),
                    Attempt("its name", "a worse text", 0.5, gone),
                ),
            ),
            Finding(Check.PREFIX, "k", {}, skipped="its text tower is run as a whole"),
        )
        subjects.append(VerifiedModel(label, label, MODEL, "model", header, findings))
    data = {role: ref.fingerprint for role, ref in manifest.blocks().items()}
    record = Verification(name, manifest.concept, data, tuple(subjects), "0.1.0")
    store.write_record(f"verifications/{name}.json", record)


def kept_figures() -> dict[str, Accuracy]:
    """Return utility figures by evaluation set."""
    return {"brands": KEPT, "objects <b>": KEPT}


def fill_comparison(store: Store, name: str = NAME) -> None:
    """Write a comparison with other methods."""
    trials = store.read_record(f"trials/{name}.json", Trials)
    outcomes = [
        ClipOutcome(
            method=method,
            setting=setting,
            plan=None,
            edit=None,
            epoch=None,
            forget=Accuracy(left, left, 33),
            utility=trials.baseline_utility,
            seconds=seconds,
            forget_passes=1.0,
            retain_passes=1.0,
            where="<cpu>",
        )
        for method, setting, left, seconds in (
            (Method.ORIGINAL, None, 97.0, 0.0),
            (Method.GA, 1e-6, 30.0, 60.0),
            (Method.OURS, None, 0.0, 20.0),
        )
    ]
    made_from = (trials.forget, f"{name}-retain")
    record = ClipComparison(
        name=name,
        model_fingerprint="model",
        forget=made_from[0],
        retain=made_from[1],
        evals=trials.evals,
        passes={},
        outcomes=tuple(outcomes),
        version="0.1.0",
    )
    store.write_record(f"comparisons/{name}.json", record)


def guesses(concept: str = HOSTILE, names: int = 10) -> BeforeAfter:
    """Return guesses of a model for some images."""
    rng = np.random.default_rng(0)
    others = ["castle", "a very long name of a class, indeed", *(f"name {n}" for n in range(8))]
    called = (concept, *others[: names - 1])
    images = rng.integers(0, 255, (names, 64, 64, 3), np.uint8)
    before = tuple(
        (name, p) for name, p in zip(called, (0.9, 0.05, 0.02, 0.01, 0.01), strict=False)
    )
    examples = [Example(images[i], called[i], before, before[::-1]) for i in range(5)]
    was = rng.normal(0.1, 0.04, (names, names)) + 0.2 * np.eye(names)
    now = was.copy()
    now[0, 0] = -0.06
    return BeforeAfter(tuple(examples), called, (33,) * names, images, was, now)


def _block(store: Store, name: str, role: str) -> DataRef:
    path, print_ = f"data/{name}-{role}.zarr", f"{name}-{role}"
    attributes = sealed({"rows": 96, "fingerprint": print_, "complete": True})
    store.write_bytes(f"{path}/zarr.json", json.dumps({"attributes": attributes}).encode())
    refused = {"about <i>the</i> concept": 12, "broken image": 3}
    sources = (f"../icons/<{role}>.parquet?kind=brand",)
    return DataRef(path, print_, 96, 17689, refused, sources)


def score(layer: str) -> LayerScore:
    place = LAYERS.index(layer)
    front = layer in FRONT
    importance = 0.03 * 0.93**place * (3 if front else 1)
    alignment = 0.2 * 0.9 ** (place * 7 % 36) / (20 if front else 1)
    tower = Tower.VISION if layer.startswith("visual.") else Tower.TEXT
    return LayerScore(layer, tower, (4, 6), importance, alignment, 0.2, 0.3, 8.0, front)


def _trials(layer: str, evals: set[str]) -> list[Trial]:
    tower = Tower.VISION if layer.startswith("visual.") else Tower.TEXT
    found = []
    for share in (0.1, 0.2, 0.15, 0.125, 0.1125):
        gone = max(0.0, 97 - 1000 * max(0.0, share - 0.02))
        forget = Accuracy(gone, min(100.0, gone + 33), 33)
        kept = Accuracy(94.73 - 20 * share, 97.0, 1138)
        utility = dict.fromkeys(sorted(evals), kept) if gone == 0 and share < 0.18 else None
        found.append(Trial(layer, tower, FALLBACK, 12 * share, share, forget, 0.0, utility))
    return found


def _write_edit(store: Store, name: str, concept: str, chosen: Trial) -> None:
    before = np.linspace(-1, 1, 24, dtype=np.float32).reshape(4, 6)
    header = EditHeader(
        name=name,
        concept=concept,
        layer=chosen.layer,
        tower=chosen.tower,
        step=chosen.step,
        share=chosen.share,
        model=MODEL,
        model_fingerprint="model",
        digests=layer_digests(before),
        gradient=f"{name}-forget",
        direction=FALLBACK,
        retain_data=None,
        criterion=Criterion.FA1,
        margin=None,
        forgotten=True,
        joint=None,
        baseline_forget=BEFORE,
        baseline_utility=dict.fromkeys(chosen.utility or {}, KEPT),
        forget=chosen.forget,
        utility=chosen.utility,
        version="0.1.0",
    )
    write_edit(store, make_edit(header, delta=0.1 * before**2, before=before))


def sections(store: Store, name: str = NAME) -> tuple[SetRecords, list[Section]]:
    """Return the gathered records of a name, and every section of its page."""
    records = gather(Catalog(store), name)
    images = [examples(guesses()), cosines(guesses())]
    return records, all_sections(records, images, store.url)


def html(store: Store, *names: str) -> str:
    """Return the page of some names."""
    found = [sections(store, name) for name in names or (NAME,)]
    return page([records for records, _ in found], {d.name: parts for d, parts in found})
