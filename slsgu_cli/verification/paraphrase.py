"""Other words: templates that the set does not measure with, and other names of the concept."""

import torch
import torch.nn.functional as F
from torch import Tensor

from slsgu_cli.errors import UsageError
from slsgu_cli.evalsets import read_templates
from slsgu_cli.evaluation import accuracy
from slsgu_cli.layout import read_manifest
from slsgu_cli.sets import DataBlock
from slsgu_cli.store import Store
from slsgu_cli.verification.bench import Bench
from slsgu_cli.verification.records import Probe, Settings

# For people, brands and objects alike; none takes an article.
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
ALIAS = "alias: "


def unseen_templates(store: Store, name: str, wanted: str | None) -> tuple[str, ...]:
    """Return the built-in templates, or those of a file, that the set `name` does not have.

    Raises UsageError where none is left, MissingError and InputError.
    """
    refs = read_manifest(store, name).evals.values()
    own = {template for ref in refs for template in DataBlock.open(store, ref).templates}
    offered = TEMPLATES if wanted is None else read_templates(wanted)
    unseen = tuple(template for template in dict.fromkeys(offered) if template not in own)
    if not unseen:
        raise UsageError(
            f"every template of --templates {wanted} is one that {name} is measured with",
            hint="give templates that the set does not have",
        )
    return unseen


def paraphrase(bench: Bench, settings: Settings) -> list[Probe]:
    """Measure with all unseen templates together, with each alone, and by each alias."""
    sets = bench.evaluation.utility
    everything = {bench.names, *(group.names for group in sets.values())}
    alone = {names: _alone(bench, names, settings.templates) for names in sorted(everything)}
    together = {names: F.normalize(each.sum(dim=0), dim=-1) for names, each in alone.items()}
    utility = {
        name: accuracy(group.ranks(group.images.features, together[group.names]))
        for name, group in sets.items()
    }
    probes = [Probe(TOGETHER, bench.forget_accuracy(together[bench.names]), utility)]
    for template, embeddings in zip(settings.templates, alone[bench.names], strict=True):
        probes.append(Probe(TEMPLATE + template, bench.forget_accuracy(embeddings)))
    for alias in settings.aliases:
        embeddings = bench.classes(bench.renamed(alias), bench.templates)
        probes.append(Probe(ALIAS + alias, bench.forget_accuracy(embeddings)))
    return probes


def _alone(bench: Bench, names: tuple[str, ...], templates: tuple[str, ...]) -> Tensor:
    """Return the class embeddings by each template alone, (templates, classes, width)."""
    return torch.stack([bench.classes(names, (template,)) for template in templates])
