"""`finetune`: training on the retain set, in which the concept does not occur."""

from collections.abc import Iterator

from slsgu_cli.records.figures import Accuracy
from slsgu_cli.records.verification import OWN, Curve, Finding, Settings
from slsgu_cli.verification.model import ModelUnderTest
from slsgu_cli.verification.registry import CheckSpec
from slsgu_cli.verification.training import SETTINGS, cycled, pairs, trained
from slsgu_cli.verification.verdicts import VerdictRow, verdict


def rows(before: Finding, after: Finding) -> Iterator[VerdictRow]:
    """Yield the line of the step with the highest FA@1."""
    was, now = before.curves[0], after.curves[0]
    place = max(range(len(now.points)), key=lambda index: now.points[index].forget.top1)
    first, second = was.points[place].forget, now.points[place].forget
    variant, note = f"{now.points[-1].step} steps", f"most at step {now.points[place].step}"
    word, utilities = verdict(first, second), (was.utility, now.utility)
    yield VerdictRow(after.check, variant, first, second, word, note, *utilities)


def finetune(model: ModelUnderTest, settings: Settings) -> list[Curve]:
    """Train on the retain set."""
    order = cycled(model.retain.rows, settings.batch_size, seed=settings.seed)
    batches = (pairs(model.retain, some) for some in order)

    def measure() -> Accuracy:
        return model.accuracy_now(model.evaluation.forget)

    points, utility = trained(model, batches, settings, name="", measure=measure, utility=True)
    return [Curve(OWN, model.name, points, utility)]


SPEC = CheckSpec(
    run=finetune,
    fills="curves",
    settings=SETTINGS,
    rows=rows,
    effort="training on other images ({})",
)
