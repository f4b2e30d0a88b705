"""Try what might better the whitened direction, on the text layers of some concepts' fronts.

    python tests/bench/direction_variants.py --each 3 --store STORE

With the store of `directions.py`, its sets, gradients and moments are used again. For
each variant, every layer of the concept's text front is searched to FA@5 = 0, and the
layer that keeps most counts.

- gradient, whitened: the two directions of the tool, on the same layers; other ridges
- projected: whitened, less its part along the retain loss's own whitened gradient
- both factors: whitened on the side of the outputs too, by the sum of R R^T over the
  retain loss's gradients R of mini-batches
- rank R: the R largest singular directions of the whitened direction
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence

import torch
from directions import draw, features_known, grade
from torch import Tensor

from slsgu_cli.batches import pixel_normalizer, text_features, to_tokens
from slsgu_cli.console import Console
from slsgu_cli.demonstration import RETAIN_SAMPLES
from slsgu_cli.directions import RIDGE, ensure_moments
from slsgu_cli.evaluation import Evaluation, prepare
from slsgu_cli.gradients import load_graded
from slsgu_cli.layout import gradient_path, read_manifest, read_pointer
from slsgu_cli.losses import contrastive
from slsgu_cli.models import tokenizer
from slsgu_cli.ranking import RankOptions, rank
from slsgu_cli.records import Direction, LayerScore, SetManifest, Steer, Tower
from slsgu_cli.sets import DataBlock
from slsgu_cli.stepsize import first_step, left_to_forget, next_step
from slsgu_cli.store import Store
from slsgu_cli.trial import Probe, UtilityMeter
from slsgu_cli.whitening import RetainMetric

RANKS = (1, 2, 4, 8, 16)
RIDGES = (1.0, 0.1, 0.001)
PAIRS = 512
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


def output_moments(
    model: torch.nn.Module,
    evaluation: Evaluation,
    manifest: SetManifest,
    store: Store,
    layers: Sequence[str],
) -> dict[str, Tensor]:
    """Return for each layer the sum of R R^T over the retain loss's mini-batch gradients R."""
    block = DataBlock.open(store, manifest.retain)
    rows = min(PAIRS, block.rows)
    images = pixel_normalizer(manifest.input, "cpu")(block.images(0, rows))
    ids = to_tokens(block.tokens[:rows], "cpu")
    with torch.no_grad():
        v = evaluation.vision.features(images, images)
    weights = [model.get_parameter(layer) for layer in layers]
    sums = [torch.zeros(()).double() for _ in layers]
    for start in range(0, rows, 16):
        part = slice(start, start + 16)
        t = text_features(evaluation.text, ids[part], 16, "cpu")
        loss = contrastive(model.logit_scale.exp())(v[part], t, len(t)).sum()
        for index, gradient in enumerate(torch.autograd.grad(loss, weights)):
            rows_out = gradient.double()
            sums[index] = sums[index] + rows_out @ rows_out.T
    return dict(zip(layers, sums, strict=True))


def cost(
    evaluation: Evaluation, score: LayerScore, direction: Tensor
) -> tuple[float, float] | None:
    """Return the losses on brands and objects at the shortest step tried with FA@5 = 0."""
    probe = Probe(evaluation, score, direction.float().contiguous())
    tried: list[tuple[float, float]] = []
    for _ in range(STEPS):
        step = next_step(tried, first_step(score.weight_norm, probe.norm))
        tried.append((step, left_to_forget(probe.trial(step), Steer.FA5, None)))
    enough = [step for step, left in tried if left == 0]
    if not enough:
        return None
    found = UtilityMeter(evaluation).measure(probe, min(enough), beat=float("-inf")) or {}
    base = {name: group.base_accuracy().top1 for name, group in evaluation.utility.items()}
    return base["brands"] - found["brands"].top1, base["objects"] - found["objects"].top1


def tried(store: Store, concept: str, console: Console) -> dict[str, tuple[float, float] | None]:
    """Return each variant's losses for a concept, at the layer where they are least."""
    options = RankOptions(direction=Direction.WHITENED, tower=Tower.TEXT)
    ranking = rank(store, concept, options=options, console=console)
    scores = [s for s in ranking.scores if s.front and s.layer.endswith("weight")]
    scores = [score for score in scores if len(score.shape) == 2]
    layers = [score.layer for score in scores]
    manifest = read_manifest(store, concept)
    pointer = read_pointer(store, manifest)
    moments = ensure_moments(store, manifest, pointer, layers, device="cpu", console=console)
    resolved, model = load_graded(manifest, pointer, "cpu")
    evaluation = prepare(store, manifest, model, tokenize=tokenizer(resolved), device="cpu")
    evaluation.base_pass(layers, cache_bytes=1 << 30, console=console)
    outputs = output_moments(model, evaluation, manifest, store, layers)
    best: dict[str, tuple[float, float] | None] = {}
    with torch.no_grad():
        for score in scores:
            f, r = (
                torch.from_numpy(store.read_tensors(gradient_path(d), [score.layer])[score.layer])
                for d in (pointer.forget, pointer.retain)
            )
            metric = moments.metric(score.layer, RIDGE)
            for label, direction in variants(f, r, metric, outputs[score.layer]):
                found, known = cost(evaluation, score, direction), best.get(label)
                if found is None or (known is not None and sum(known) <= sum(found)):
                    best.setdefault(label, None)
                else:
                    best[label] = found
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--each", type=int, default=2, help="brands, and as many objects")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--retain", type=int, default=RETAIN_SAMPLES)
    parser.add_argument("--store", help="keep sets, gradients and moments here")
    args = parser.parse_args()
    drawn = draw(args.seed, 5)
    kinds = sorted(set(drawn.values()))
    concepts = [c for kind in kinds for c in [c for c in drawn if drawn[c] == kind][: args.each]]
    with tempfile.TemporaryDirectory() as folder:
        store, console = Store(args.store or f"{folder}/store"), Console(verbosity=-1)
        results = []
        with features_known():
            for concept in concepts:
                grade(store, concept, list(drawn), args.retain, console)
                results.append(tried(store, concept, console))
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
