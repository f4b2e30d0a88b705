"""What became of removal requests: what is told of each, by its name or by its reference.

Where names are confidential, each is replaced by the reference of its request before anything
is made of it.
"""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from slsgu_cli.errors import InputError, MissingError, UsageError, near
from slsgu_cli.records.codec import by_name, with_texts
from slsgu_cli.records.figures import Accuracy, Share
from slsgu_cli.records.recipe import (
    EvidenceRequest,
    Ledger,
    LedgerRow,
    Recipe,
    RequestState,
    read_recipe,
)
from slsgu_cli.records.sets import LOCAL, ModelSpec
from slsgu_cli.records.verification import CHECKS, KIND, Check, Verification, VerifiedModel
from slsgu_cli.report.gather import (
    SetRecords,
    WrittenModel,
    commands_again,
    gather,
    written_fingerprint,
    written_model,
)
from slsgu_cli.report.study_sections import verified_pair
from slsgu_cli.sets.evaluation_sets import sheet_of
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.catalog import Catalog
from slsgu_cli.store.store import Store

ALL = "all"
EDITS, SUMS = "edits", ".sha256"
IMAGES = 48


@dataclass(frozen=True, slots=True)
class RemovedRequest:
    """One request as the evidence tells it: its row in the ledger, and what the store knows.

    `pair` are the original and the model that was verified, nothing where none was; `sheet`
    is the contact sheet of what was taken for it.
    """

    name: str
    records: SetRecords
    ledger: Ledger | None
    row: LedgerRow | None
    pair: tuple[VerifiedModel, ...]
    sheet: bytes | None

    @property
    def forget(self) -> tuple[Accuracy, Accuracy] | None:
        """How well the original recognises it, and what was written, or else its edit."""
        edit, row = self.records.edit.record, self.row
        before, after = (edit.baseline_forget, edit.forget) if edit else (None, None)
        if row is not None and self.is_measured:
            before, after = row.before, row.after
        return (before, after) if before and after else None

    @property
    def is_measured(self) -> bool:
        """Whether what was written has been measured for it."""
        return self.row is not None and self.row.before is not None and self.row.after is not None


@dataclass(frozen=True, slots=True)
class RemovalEvidence:
    """All that is written: requests, the models without them, what makes and checks it again.

    `edits` are the files of edits, by name; none where names are confidential.
    """

    requests: tuple[RemovedRequest, ...]
    models: tuple[WrittenModel, ...]
    model: ModelSpec
    commands: tuple[str, ...]
    checks: tuple[str, ...]
    edits: dict[str, bytes]
    by_reference: bool


def gather_removals(
    store: Store, request: EvidenceRequest, recipe: Recipe | None = None
) -> RemovalEvidence:
    """Return what is told of the requests that are named. Raises UsageError, MissingError."""
    if recipe is None and request.recipe is not None:
        recipe = read_recipe(request.recipe)
    catalog = Catalog(store)
    ledger = _ledger(catalog, request, recipe)
    names = _names(catalog, request, ledger)
    rows = {row.name: row for row in ledger.rows} if ledger else {}
    hides = any(each and each.by_reference for each in (request, ledger, recipe))
    words = References.of(catalog, rows, names) if hides else References({})
    gathered = [gather(catalog, name) for name in names]
    model = _model(gathered)
    original = ledger.model if ledger else model
    models = _models(store, request, ledger, names=names, original=original)
    shown = tuple(words.model(each) for each in models)
    prints = [key for each in models if (key := written_fingerprint(original, each.place))]
    made_by = recipe or ledger
    file = request.recipe or (f"{made_by.name}.toml" if made_by else None)
    told_ledger = with_texts(ledger, words)
    requests = []
    for records in gathered:
        sheet = None if hides else _sheet(store, records)
        told = words.records(records) if hides else records
        row = with_texts(rows.get(records.name), words)
        verified = told.verification.record
        pair = verified_pair(verified, told.edit.record, prints) if verified else ()
        requests.append(RemovedRequest(told.name, told, told_ledger, row, tuple(pair), sheet))
    return RemovalEvidence(
        requests=tuple(requests),
        models=shown,
        model=with_texts(model, words),
        commands=tuple(map(words, commands_again(store, gathered, recipe=file))),
        checks=tuple(map(words, _checks(request, shown, [*map(words, names)], hides=hides))),
        edits={} if hides else _edits(store, models, names),
        by_reference=hides,
    )


def _ledger(catalog: Catalog, request: EvidenceRequest, recipe: Recipe | None) -> Ledger | None:
    """Return the ledger of a recipe, or else the one that has the requests, if one has."""
    if recipe is not None:
        ledger: Ledger | None = catalog.get(Artifact.LEDGER, recipe.name)
        if ledger is None:
            raise MissingError(
                f"{catalog.store.url} has no ledger of {recipe.name}",
                hint=f"slsgu run {request.recipe or f'{recipe.name}.toml'}",
            )
        return ledger
    ledgers = [
        each
        for each in catalog.readable(Artifact.LEDGER).values()
        if list(request.names) == [ALL] or {row.name for row in each.rows} & {*request.names}
    ]
    if len(ledgers) > 1:
        names = ", ".join(each.name for each in ledgers)
        raise UsageError(f"several recipes have such requests: {names}", hint="--recipe FILE")
    return ledgers[0] if ledgers else None


def _names(catalog: Catalog, request: EvidenceRequest, ledger: Ledger | None) -> list[str]:
    """Return the names of the requests. Raises UsageError where one has none."""
    names = list(request.names)
    rows = ledger.rows if ledger else ()
    if names == [ALL]:
        names = [row.name for row in rows if row.state is not RequestState.WITHDRAWN]
        if ledger is None:
            edits = catalog.readable(Artifact.EDIT)
            names = [name for name, header in edits.items() if header.target is None]
        if not names:
            raise MissingError("there is no request to tell of", hint="slsgu run RECIPE")
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"{twice[0]} is named twice")
    known = [row.name for row in rows]
    if ledger and (unknown := [name for name in names if name not in known]):
        raise UsageError(
            f"the recipe {ledger.name} never had a request {unknown[0]}",
            hint=near(unknown[0], known) or f"it has {', '.join(known)}",
        )
    return names


def _model(gathered: Sequence[SetRecords]) -> ModelSpec:
    manifest = next((each.manifest.record for each in gathered if each.manifest.record), None)
    if manifest is None:
        lacking = gathered[0].manifest
        raise InputError(lacking.trouble or "", hint=lacking.run)
    return manifest.model


def _models(
    store: Store,
    request: EvidenceRequest,
    ledger: Ledger | None,
    *,
    names: Sequence[str],
    original: ModelSpec,
) -> list[WrittenModel]:
    """Return the models that were written: those that are named, or the outputs of the ledger."""
    places: list[tuple[Path, ModelSpec | Path, Sequence[str], str | None]] = [
        (Path(str(place).removeprefix(LOCAL)), original, names, None) for place in request.models
    ]
    if ledger and not places:
        places = [
            (Path(s.place), Path(s.origin) if s.origin else original, s.names, s.made)
            for s in ledger.stages
            if s.place and s.made and s.stage.writes_model
        ]
    models: list[WrittenModel] = []
    for place, origin, held, made in places:
        label, taken = place.resolve().name, [each.label for each in models]
        label = f"{label}-{len(models) + 1}" if label in taken else label
        models.append(written_model(store, label, place, origin=origin, names=held, made=made))
    return models


def _sheet(store: Store, records: SetRecords) -> bytes | None:
    """Return the contact sheet of what was taken for a request, if its set can be read."""
    manifest = records.manifest.record
    if manifest is None:
        return None
    block = DataBlock.open(store, manifest.forget)
    shown = min(IMAGES, block.rows)
    return sheet_of(block, IMAGES, title=f"{records.name}: {shown} of {block.rows} images")


@dataclass(frozen=True, slots=True)
class References:
    """What stands for the words that are confidential; nothing where none are."""

    by: dict[str, str]

    @classmethod
    def of(cls, catalog: Catalog, rows: Mapping[str, LedgerRow], names: Sequence[str]) -> Self:
        """Return the references of all requests of a ledger. Raises UsageError without one."""
        by: dict[str, str] = {}
        for name in dict.fromkeys([*names, *rows]):
            row = rows.get(name)
            reference = (row.reference or row.id) if row else None
            manifest = catalog.get(Artifact.SET, name)
            patterns = manifest.patterns if manifest else ()
            confidential = [name, *([row.concept] if row else []), *patterns]
            if reference is None or _whole(*confidential).search(reference):
                raise UsageError(
                    f"the request {name} has no reference to be told by that leaves its name out",
                    hint="give it a `reference` or an `id` in the recipe, and `slsgu run` that",
                )
            by |= {
                form.casefold(): reference for word in confidential for form in (word, quote(word))
            }
        return cls(by)

    def __call__(self, text: str) -> str:
        """Return a text with references in place of words, the longest first."""
        words = sorted(self.by, key=len, reverse=True)
        if not words:
            return text
        return _whole(*words).sub(lambda found: self.by.get(found[0].casefold(), "–"), text)

    def records(self, records: SetRecords) -> SetRecords:
        """Return what is known of a set, without what images and near names tell of it."""
        shown = with_texts(records, self)
        manifest, edit, verification = shown.manifest, shown.edit, shown.verification
        if manifest.record:
            plain = replace(manifest.record, patterns=(), request={}, command=())
            manifest = replace(manifest, record=plain)
        if edit.record:
            edit = replace(edit, record=replace(edit.record, harmed=(), nearest=()))
        if verification.record:
            verification = replace(verification, record=_without_words(verification.record))
        return replace(
            shown,
            manifest=manifest,
            edit=edit,
            verification=verification,
            gradients=records.gradients,
            facts=records.facts,
        )

    def model(self, model: WrittenModel) -> WrittenModel:
        """Return a written model with references, its files under the names that they have."""
        shown = with_texts(model, self)
        return replace(shown, label=shown.label.replace("/", "-"), files=model.files)


def _whole(*words: str) -> re.Pattern[str]:
    """Return what finds words where no letter or digit goes on with them."""
    any_of = "|".join(map(re.escape, words))
    return re.compile(rf"(?<![^\W_])({any_of})(?![^\W_])", re.IGNORECASE)


def _without_words(record: Verification) -> Verification:
    """Return a verification without spellings, near names and texts of attacks."""
    subjects = []
    for subject in record.subjects:
        findings = []
        for finding in subject.findings:
            variants = tuple(
                replace(variant, name=f"{variant.name.partition(KIND)[0]} {number}")
                if finding.check is Check.TYPOS
                else variant
                for number, variant in enumerate(finding.variants, 1)
            )
            attempts = tuple(replace(each, text="–", tried=()) for each in finding.attempts)
            less = replace(
                finding, variants=variants, attempts=attempts, neighbourhood=None, classes=None
            )
            findings.append(less)
        edit = subject.edit and replace(subject.edit, harmed=(), nearest=())
        subjects.append(replace(subject, edit=edit, findings=tuple(findings)))
    return replace(record, subjects=tuple(subjects))


def _checks(
    request: EvidenceRequest, models: Sequence[WrittenModel], names: Sequence[str], *, hides: bool
) -> Iterator[str]:
    """Yield two commands for each model: whether the edits are in it, and its files' digests."""
    for model in models:
        paths = [f"{request.out / EDITS / name}.safetensors" for name in model.sharing(names)]
        edits = ["EDIT"] if hides else paths
        words = [word for edit in edits for word in ("--edit", edit)]
        yield shlex.join(["slsgu", "check", str(model.place), *words])
        sums = shlex.quote(str(request.out / f"{model.label}{SUMS}"))
        yield f"(cd {shlex.quote(str(model.root))} && sha256sum -c -) < {sums}"


def _edits(store: Store, models: Sequence[WrittenModel], names: Sequence[str]) -> dict[str, bytes]:
    """Return the files of the edits that the commands look for."""
    wanted = sorted({*names, *(name for model in models for name in model.sharing(names))})
    paths = {name: Artifact.EDIT.path(name) for name in wanted}
    return {name: store.read_bytes(path) for name, path in paths.items() if store.exists(path)}


def done_for(one: RemovedRequest) -> dict[str, Any]:
    """Return in short what was done for a request."""
    edit, row, facts = one.records.edit.record, one.row, one.records.facts
    return {
        "request": one.name,
        "id": row and row.id,
        "received": row and row.received,
        "reference": row and row.reference,
        "state": row and row.state,
        "layer": edit and edit.layer,
        "layer before": facts and facts.before["fp32"],
        "layer after": facts and facts.after["fp32"],
        "figures": figures_of(one),
        "bounds": row.checks if row else (),
        "verified": bool(one.pair),
    }


def figures_of(one: RemovedRequest) -> list[dict[str, Any]]:
    """Return figures with exact intervals: of what was written, or else of the edit."""
    return [
        {
            "figure": f"{kind}@{k} {name}".strip(),
            "before": getattr(was, top),
            "after": getattr(now, top),
            "images": now.rows,
            "unseen": now.unseen,
            "from": round(low, 4),
            "to": round(high, 4),
        }
        for kind, name, was, now in accuracies(one)
        for k, top in ((1, "top1"), (5, "top5"))
        for low, high in [Share.of(getattr(now, top), now.rows).interval]
    ]


def accuracies(one: RemovedRequest) -> Iterator[tuple[str, str, Accuracy, Accuracy]]:
    """Yield FA and the TA of each set, by its name: of the original, and of what was made."""
    ledger, edit = one.ledger, one.records.edit.record
    before, after = (edit.baseline_utility or {}, edit.utility or {}) if edit else ({}, {})
    if ledger and one.is_measured:
        before, after = ledger.kept_before, ledger.kept
    if one.forget:
        yield "FA", "", *one.forget
    for name in sorted(before.keys() & after.keys()):
        yield "TA", name, before[name], after[name]


def content_of(one: RemovedRequest) -> dict[str, Any]:
    """Return all that is told of a request."""
    manifest, row, edit = one.records.manifest.record, one.row, one.records.edit
    return {
        **done_for(one),
        "concept": one.records.concept,
        "note": row and row.note,
        "events": row.events if row else (),
        "captions with": manifest.patterns if manifest else (),
        "captions without": manifest.exclusions if manifest else [],
        "rows": by_name(manifest.blocks()) if manifest else [],
        "edit": edit.record,
        "edit sha256": edit.sha256,
        "measured on": "what was written" if one.is_measured else "the edit",
        "verification": verified(one) if one.pair else None,
    }


def verified(one: RemovedRequest) -> dict[str, Any]:
    """Return what verification found, in rows and in words, and what it did not try."""
    from slsgu_cli.verification.results import conclusion, rows

    original, other = one.pair
    tried = {finding.check for finding in other.findings if not finding.skipped}
    return {
        "model": other.label,
        "checks": [row for row in rows(original, other) if not row.detail],
        "conclusion": conclusion(one.records.concept, original, other).sentences,
        "not tried": [check for check in CHECKS if check not in tried],
    }
