"""`baseline`: the model as it is."""

from slsgu_cli.records.verification import Check, Settings, Variant
from slsgu_cli.verification.model import ModelUnderTest
from slsgu_cli.verification.registry import CheckSpec, register


def baseline(model: ModelUnderTest, _settings: Settings) -> list[Variant]:
    """Measure forget accuracy and utility."""
    groups = model.evaluation.utility.items()
    utility = {name: group.base_accuracy() for name, group in groups}
    return [Variant("as it is", model.evaluation.forget.base_accuracy(), utility)]


register(
    CheckSpec(
        check=Check.BASELINE,
        run=baseline,
        fills="variants",
        settings=("rows", "seed"),
        effort="asking the model {}",
    )
)
