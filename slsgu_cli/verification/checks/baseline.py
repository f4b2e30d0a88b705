"""`baseline`: the model as it is."""

from slsgu_cli.records.verification import Settings, Variant
from slsgu_cli.verification.model import ModelUnderTest
from slsgu_cli.verification.registry import CheckSpec


def baseline(model: ModelUnderTest, _settings: Settings) -> list[Variant]:
    """Measure forget accuracy and utility."""
    groups = model.evaluation.utility.items()
    utility = {name: group.base_accuracy() for name, group in groups}
    return [Variant("as it is", model.evaluation.forget.base_accuracy(), utility)]


SPEC = CheckSpec(
    run=baseline,
    fills="variants",
    settings=("rows", "seed"),
    effort="asking the model {}",
)
