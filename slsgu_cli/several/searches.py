"""Several searches one after another, on one model and one base pass where that is possible."""

from collections.abc import Iterator, Mapping, Sequence

import torch

from slsgu_cli.cases import Case, SearchOptions, read_case
from slsgu_cli.errors import InputError, UsageError
from slsgu_cli.evaluation import SharedEvaluation, prepare_shared
from slsgu_cli.gradients import load_graded
from slsgu_cli.gradpass import arithmetic
from slsgu_cli.models import tokenizer
from slsgu_cli.records import SetManifest, digest
from slsgu_cli.search import SearchResult, run_base_pass, search
from slsgu_cli.store import Store


def measured_on(manifest: SetManifest) -> str:
    """Return a digest of the evaluation rows of a set and of how they are taken in."""
    evals = {name: ref.fingerprint for name, ref in manifest.evals.items()}
    return digest([manifest.input, evals])


def require_alike(digests: Mapping[str, str]) -> None:
    """Raise InputError unless all sets have the same digest of what they are measured on."""
    first, *others = digests
    for name in others:
        if digests[name] != digests[first]:
            raise InputError(
                f"{first} and {name} are not measured on the same rows of the same model",
                hint="build both sets with the same --model, --eval, --classes and --templates",
            )


def require_distinct(names: Sequence[str]) -> None:
    """Raise UsageError where a set is named twice."""
    if len(set(names)) < len(names):
        raise UsageError("a set is named twice")


def read_cases(store: Store, names: Sequence[str], *, options: SearchOptions) -> list[Case]:
    """Return what to search of several sets. Raises what `read_case` does, and UsageError."""
    require_distinct(names)
    return [read_case(store, name, options=options) for name in names]


def shares(case: Case) -> str:
    """Return a digest that is equal for cases which can share a model and a base pass."""
    return digest([case.pointer.model_fingerprint, measured_on(case.manifest)])


def grouped(cases: Sequence[Case]) -> list[list[Case]]:
    """Return the cases in groups that can share a model and a base pass, in their order."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(shares(case), []).append(case)
    return list(groups.values())


def share_evaluation(store: Store, cases: Sequence[Case]) -> SharedEvaluation:
    """Load the model of a group of cases and run it once over what all of them measure on."""
    first = cases[0]
    device = first.options.device
    model, module = load_graded(first.manifest, first.pointer, device)
    manifests = [case.manifest for case in cases]
    shared = prepare_shared(store, manifests, module, tokenize=tokenizer(model), device=device)
    layers = [score for case in cases for score in case.layers]
    run_base_pass(shared, layers, first.options)
    return shared


def search_each(
    store: Store, names: Sequence[str], *, options: SearchOptions
) -> Iterator[SearchResult]:
    """Search the sets one after another, those that can on one model and one base pass."""
    for group in grouped(read_cases(store, names, options=options)):
        with torch.no_grad(), arithmetic(options.precision):
            shared = share_evaluation(store, group)
        for case in group:
            evaluation = shared.of(case.manifest)
            yield search(store, case.name, options=options, evaluation=evaluation)
