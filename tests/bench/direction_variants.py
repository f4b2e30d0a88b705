"""Try what might better the whitened direction, at the text layers that it chose.

    python tests/bench/directions.py --towers text --retain 1000 --store STORE
    python tests/bench/direction_variants.py STORE android mouse

Every variant is searched to FA@5 = 0 at the layer of the concept's whitened edit:

- gradient, whitened: the two directions of the tool on the same layer; other ridges
- projected: whitened, less its part along the retain loss's own whitened gradient
- both factors: whitened on the side of the outputs too, by the sum of R R^T over the
  retain loss's gradients R of mini-batches
- rank R: the R largest singular directions of the whitened direction

Before that, each edit is measured at its own step with few singular directions kept, as
`apply --rank` writes it.
"""

import argparse
import sys
from collections.abc import Iterator
from itertools import islice

import torch
from directions import features_known
from torch import Tensor

from slsgu_cli.checkpoints.edits import load_edit
from slsgu_cli.clip.evaluation import Evaluation, prepare
from slsgu_cli.clip.inputs import pixel_normalizer, text_features, to_tokens
from slsgu_cli.clip.models import tokenizer
from slsgu_cli.method.directions import ensure_moments
from slsgu_cli.method.gradient_pass import contrastive
from slsgu_cli.method.gradients import load_graded
from slsgu_cli.method.moments import RetainMetric
from slsgu_cli.method.ranking import rank
from slsgu_cli.method.scoring import left_to_forget
from slsgu_cli.method.search import bisection
from slsgu_cli.method.trial import Probe, UtilityMeter
from slsgu_cli.records.method import Direction, LayerScore, Steer, Trial
from slsgu_cli.records.options import RIDGE, RankOptions
from slsgu_cli.records.sets import SetManifest
from slsgu_cli.store.artifacts import Artifact, read_manifest, read_pointer
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.store import Store

RANKS = (1, 2, 4, 8, 16)
RIDGES = (1.0, 0.1, 0.001)
PAIRS = 256
STEPS = 10


def variants(
    forget: Tensor, retain: Tensor, metric: RetainMetric, outputs: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Yield the directions to try for one layer."""
    yield "gradient", forget.double()
    for ridge in RIDGES:
        yield f"ridge {ridge:g}", RetainMetric(metric.moment, metric.axis, ridge).whiten(forget)
    along, other = metric.whiten(forget), metric.whiten(retain)
    yield "whitened", along
    share = (along * retain).sum() / (other * retain).sum()
    yield "projected", along - share * other
    yield "both factors", RetainMetric(outputs, 0, metric.ridge).whiten(along)
    u, s, v = torch.linalg.svd(along, full_matrices=False)
    for count in RANKS:
        yield f"rank {count}", (u[:, :count] * s[:count]) @ v[:count]


def gradient_moment(
    model: torch.nn.Module, evaluation: Evaluation, manifest: SetManifest, store: Store, layer: str
) -> Tensor:
    """Return the sum of R R^T over gradients R of the layer, of the retain loss's mini-batches."""
    block = DataBlock.open(store, manifest.retain)
    rows = min(PAIRS, block.rows)
    images = pixel_normalizer(manifest.input, "cpu")(block.images(0, rows))
    ids = to_tokens(block.tokens[:rows], "cpu")
    with torch.no_grad():
        v = evaluation.vision.features(images, images)
    weight = model.get_parameter(layer)
    total = torch.zeros(weight.shape[0], weight.shape[0], dtype=torch.float64)
    for start in range(0, rows, 16):
        part = slice(start, start + 16)
        t = text_features(evaluation.text, ids[part], 16, "cpu")
        loss = contrastive(model.logit_scale.exp())(v[part], t, len(t)).sum()
        (gradient,) = torch.autograd.grad(loss, weight)
        total += gradient.double() @ gradient.double().T
    return total


def left_on_fa5(trial: Trial) -> float:
    return left_to_forget(trial, Steer.FA5, None)


def cost(
    evaluation: Evaluation, score: LayerScore, direction: Tensor
) -> tuple[float, float] | None:
    """Return the losses on brands and objects at the shortest step tried with FA@5 = 0."""
    probe = Probe(evaluation, score, direction.float().contiguous())
    trials = islice(bisection(probe.measure, left_on_fa5, probe.first), STEPS)
    enough = [trial.step for trial in trials if left_on_fa5(trial) == 0]
    if not enough:
        return None
    found = UtilityMeter(evaluation).measure(probe, min(enough), beat=float("-inf")).utility
    base = {name: group.base_accuracy().top1 for name, group in evaluation.utility.items()}
    return base["brands"] - found["brands"].top1, base["objects"] - found["objects"].top1


def tried(store: Store, concept: str) -> dict[str, tuple[float, float] | None]:
    """Return each variant's losses for a concept, at the layer of its whitened edit."""
    layer = load_edit(store, f"{concept}-{Direction.WHITENED}").header.layer
    manifest = read_manifest(store, concept)
    pointer = read_pointer(store, manifest)
    ranking = rank(
        store, concept, options=RankOptions(include=[layer], direction=Direction.WHITENED)
    )
    score = next(score for score in ranking.scores if score.layer == layer)
    moments = ensure_moments(store, manifest, pointer, [layer], device="cpu")
    resolved, model = load_graded(manifest, pointer, "cpu")
    evaluation = prepare(store, manifest, model, tokenize=tokenizer(resolved), device="cpu")
    evaluation.base_pass([layer], cache_bytes=1 << 30)
    outputs = gradient_moment(model, evaluation, manifest, store, layer)
    f, r = (
        torch.from_numpy(store.read_tensors(Artifact.GRADIENT.path(d), [layer])[layer])
        for d in (pointer.forget, pointer.retain)
    )
    directions = variants(f, r, moments.metric(layer, RIDGE), outputs)
    with torch.no_grad():
        return {label: cost(evaluation, score, along) for label, along in directions}


def truncated(store: Store, concept: str) -> Iterator[str]:
    """Yield what the whitened edit does at its own step when few singular directions are kept."""
    edit = load_edit(store, f"{concept}-{Direction.WHITENED}")
    layer, manifest = edit.header.layer, read_manifest(store, concept)
    resolved, model = load_graded(manifest, read_pointer(store, manifest), "cpu")
    evaluation = prepare(store, manifest, model, tokenize=tokenizer(resolved), device="cpu")
    evaluation.base_pass([layer], cache_bytes=1 << 30)
    ranking = rank(
        store, concept, options=RankOptions(include=[layer], direction=Direction.WHITENED)
    )
    base = {name: group.base_accuracy().top1 for name, group in evaluation.utility.items()}
    for count in (*RANKS, max(edit.delta().shape)):
        probe = Probe(evaluation, ranking.scores[0], torch.from_numpy(edit.of_rank(count).delta()))
        with torch.no_grad():
            forget = probe.measure(1.0).forget
            kept = UtilityMeter(evaluation).measure(probe, 1.0, beat=float("-inf")).utility
        lost = [f"{base[name] - kept[name].top1:.2f}" for name in ("brands", "objects")]
        yield "\t".join([concept, str(count), f"{forget.top1:.1f}", f"{forget.top5:.1f}", *lost])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", help="what `directions.py --store` kept")
    parser.add_argument("concepts", nargs="+", help="some of those it searched")
    args = parser.parse_args()
    store = Store(args.store)
    results = []
    with features_known():
        sys.stdout.write("concept\trank\tFA@1\tFA@5\tbrands lost\tobjects lost\n")
        for concept in args.concepts:
            sys.stdout.write("".join(f"{line}\n" for line in truncated(store, concept)))
            results.append(tried(store, concept))
            sys.stderr.write(f"{concept}: {results[-1]}\n")
    sys.stdout.write("direction\tforgotten\tbrands mean\tworst\tobjects mean\tworst\n")
    for label in results[0]:
        done = [found for result in results if (found := result[label]) is not None]
        words = [label, f"{len(done)} of {len(results)}"]
        for index in range(2):
            lost = [found[index] for found in done]
            words += [f"{sum(lost) / len(lost):.2f}", f"{max(lost):.2f}"] if lost else ["-", "-"]
        sys.stdout.write("\t".join(words) + "\n")


if __name__ == "__main__":
    main()
