"""Where to begin on a target: the step at which CLIP's own forget accuracy is 0.

It takes no generation, and is a lower bound in practice: a target still shows a concept
that CLIP no longer puts first.
"""

from collections.abc import Sequence

from slsgu_cli.evaluation import Evaluation, prepare
from slsgu_cli.generation.vectors import Ray
from slsgu_cli.gradients import load_graded
from slsgu_cli.memory import spare
from slsgu_cli.models import pick_device, tokenizer
from slsgu_cli.naming import tower_of
from slsgu_cli.records import GradientPointer, LayerScore, SetManifest, Tower
from slsgu_cli.stepsize import next_step
from slsgu_cli.store import Store
from slsgu_cli.trial import Probe

STEPS = 7


def clip_starts(
    store: Store, manifest: SetManifest, pointer: GradientPointer, rays: Sequence[Ray], device: str
) -> dict[str, float]:
    """Return for each layer the shortest step met at which CLIP's FA@1 is 0, where one is."""
    device = pick_device(device)
    resolved, module = load_graded(manifest, pointer, device)
    whole = prepare(store, manifest, module, tokenize=tokenizer(resolved), device=device)
    few = Evaluation(whole.model, whole.vision, whole.text, whole.forget, {})
    few.base_pass((ray.layer for ray in rays), cache_bytes=spare(device))
    starts = {}
    for ray in rays:
        probe = Probe(few, _score(ray), ray.direction.to(device))
        tried: list[tuple[float, float]] = []
        for _ in range(STEPS):
            step = next_step(tried, 0.1 / ray.share(1.0))
            tried.append((step, probe.trial(step).forget.top1))
        enough = [step for step, left in tried if left == 0]
        if enough:
            starts[ray.layer] = min(enough)
    return starts


def _score(ray: Ray) -> LayerScore:
    return LayerScore(
        layer=ray.layer,
        tower=tower_of(ray.layer) or Tower.TEXT,
        shape=tuple(ray.weight.shape),
        importance=ray.importance,
        alignment=0.0,
        forget_norm=0.0,
        retain_norm=0.0,
        weight_norm=float(ray.weight.norm()),
        front=True,
    )
