"""`paraphrase`: templates that the set does not use."""

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from slsgu_cli.errors import UsageError
from slsgu_cli.records.sets import SetManifest
from slsgu_cli.records.verification import Finding, Settings, Variant
from slsgu_cli.sources.prompts import read_templates
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.store import Store
from slsgu_cli.verification.model import ModelUnderTest
from slsgu_cli.verification.registry import CheckSpec
from slsgu_cli.verification.verdicts import VerdictRow, variant_rows

# They suit people, brands and objects; none has an article.
TEMPLATES = (
    "a photo of {}",
    "a drawing of {}",
    "a sketch of {}",
    "a simple {} symbol",
    "the {} logo",
    "a close-up of {}",
    "an image showing {}",
    "this is {}",
    "a picture with {} in it",
    "what everybody knows as {}",
    "the one and only {}",
    "{}, as seen on the web",
)
TOGETHER = "all templates"
TEMPLATE = "template: "


def unused_templates(store: Store, manifest: SetManifest, wanted: str | None) -> tuple[str, ...]:
    """Return the templates, built-in or of a file, that a set does not use.

    Raises UsageError if the set uses all of them, MissingError and InputError.
    """
    refs = manifest.evals.values()
    known = {template for ref in refs for template in DataBlock.open(store, ref).templates}
    offered = TEMPLATES if wanted is None else read_templates(wanted)
    unused = tuple(template for template in dict.fromkeys(offered) if template not in known)
    if not unused:
        raise UsageError(
            f"{manifest.name} is already measured with every template of --templates {wanted}",
            hint="give templates that the set does not use",
        )
    return unused


def rows(before: Finding, after: Finding) -> Iterator[VerdictRow]:
    """Yield a line for each variant; of single templates, all but the worst are detail."""
    lines = list(variant_rows(before, after))
    single = [line for line in lines if line.variant.startswith(TEMPLATE)]
    worst = max(single, key=lambda line: line.after.top1, default=None)
    for line in lines:
        yield replace(line, detail=line in single and line is not worst)


def paraphrase(model: ModelUnderTest, settings: Settings) -> list[Variant]:
    """Measure with all unused templates together, and with each alone."""
    sets = model.evaluation.utility
    all_names = {model.names, *(group.names for group in sets.values())}
    single = {
        names: torch.stack([model.classes(names, (template,)) for template in settings.templates])
        for names in sorted(all_names)
    }
    together: dict[tuple[str, ...], Tensor] = {
        names: F.normalize(each.sum(dim=0), dim=-1) for names, each in single.items()
    }
    utility = {
        name: group.accuracy(group.images.features, together[group.names])
        for name, group in sets.items()
    }
    variants = [Variant(TOGETHER, model.forget_accuracy(together[model.names]), utility)]
    for template, embeddings in zip(settings.templates, single[model.names], strict=True):
        variants.append(Variant(TEMPLATE + template, model.forget_accuracy(embeddings)))
    return variants


SPEC = CheckSpec(
    run=paraphrase,
    fills="variants",
    settings=("templates", "rows", "seed"),
    rows=rows,
    effort="other words ({})",
)
