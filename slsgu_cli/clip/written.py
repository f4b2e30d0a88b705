"""Folders that are written for others: their tokenizer and card, and whether open_clip loads them.

What is looked at for that: its configuration, the names and shapes of its weights by their
header, and its tokenizer.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import slsgu_cli
from slsgu_cli import progress
from slsgu_cli.checkpoints.edits import Edit
from slsgu_cli.checkpoints.layouts import clip_shapes
from slsgu_cli.checkpoints.targets import CONFIG, PIPELINE, read_config
from slsgu_cli.checkpoints.tensor_file import canonical_name
from slsgu_cli.checkpoints.transformers_clip import FETCH_ERRORS, HUB
from slsgu_cli.checkpoints.weights import open_weights
from slsgu_cli.clip.models import (
    LOCAL,
    ResolvedModel,
    built_shapes,
    probe_tokens,
    resolve,
    save_tokenizer,
)
from slsgu_cli.errors import SlsguError, first_lines
from slsgu_cli.records.codec import digest
from slsgu_cli.records.method import EditHeader
from slsgu_cli.records.options import ApplyRequest
from slsgu_cli.records.sets import ModelSpec

# What transformers reads a tokenizer from, whatever its kind.
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    TOKENIZER_CONFIG, "tokenizer.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tokenizer.model",
)  # fmt: skip
# A buffer of older checkpoints, which open_clip leaves out.
POSITIONS = "position_ids"
# What open_clip adds to a checkpoint that has none.
BIAS = "logit_bias"


def hub_tokenizer(model: ResolvedModel) -> str | None:
    """Return the name of the Hugging Face tokenizer of a model; None of CLIP's own."""
    name = model.config["text_cfg"].get("hf_tokenizer_name")
    return str(name) if name else None


def tokenizer_files(model: ResolvedModel, scratch: Path) -> dict[str, Path]:
    """Return the files that a folder of a model needs for its tokenizer, by their names there.

    They are those that the model's tokenizer was loaded from, or, where these do not say by
    themselves which tokenizer they are of, saved anew in the empty folder `scratch`. CLIP's
    own tokenizer is part of open_clip and needs none. Raises MissingError or InputError.
    """
    name = hub_tokenizer(model)
    if name is None:
        return {}
    source = _tokenizer_folder(name)
    if source is None or "tokenizer_class" not in _said(source / TOKENIZER_CONFIG):
        save_tokenizer(model, scratch)
        return {path.name: path for path in sorted(scratch.iterdir())}
    return {name: source / name for name in TOKENIZER_FILES if (source / name).is_file()}


def tokenizer_beside(model: ResolvedModel | None, scratch: Path) -> dict[str, Path]:
    """Return `tokenizer_files` of a model that is no folder; warn where they cannot be had."""
    if model is None or model.folder is not None:
        return {}
    try:
        return tokenizer_files(model, scratch)
    except SlsguError as error:
        progress.warn(f"the tokenizer of {model.spec} cannot be written: {error.message}")
        return {}


def _tokenizer_folder(name: str) -> Path | None:
    """Return the folder that a tokenizer is loaded from: a local one, or one of the hub."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(TOKENIZER_FILES)))
    except FETCH_ERRORS:
        return None


def _said(path: Path) -> Mapping[str, object]:
    return read_config(path) if path.is_file() else {}


def why_not_loaded(folder: Path, original: ResolvedModel | None) -> str | None:
    """Return why it is not certain that open_clip loads a folder; None where it is.

    Its tokenizer must give the ids that `original`'s gives, of the model that it was made from.
    """
    try:
        model = resolve(ModelSpec(f"{LOCAL}{folder}"))
        return _other_weights(model) or _other_tokenizer(model, original)
    except SlsguError as error:
        return first_lines(error).replace(f"{folder}/", "")


def _other_weights(model: ResolvedModel) -> str | None:
    """Return how the header of a model's weights differs from what its configuration builds."""
    wanted = clip_shapes(model.config) or built_shapes(model)
    file = open_weights(model.weights)
    held = {canonical_name(name): file.entry(name).shape for name in file.names()}
    if "positional_embedding" in held and "positional_embedding" not in wanted:
        # A text tower of its own is loaded from the names of one without as well.
        wanted = {name.removeprefix("text."): shape for name, shape in wanted.items()}
    missing = sorted(wanted.keys() - held.keys() - {BIAS})
    more = sorted(name for name in held.keys() - wanted.keys() if POSITIONS not in name)
    other = sorted(name for name in wanted.keys() & held.keys() if wanted[name] != held[name])
    for names, what in (
        (missing, "its weights lack"),
        (more, "its configuration has no place for"),
        (other, "its configuration has another shape for"),
    ):
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            return f"{what} {names[0]}{others}"
    return None


def _other_tokenizer(model: ResolvedModel, original: ResolvedModel | None) -> str | None:
    """Return in what the tokenizer of a folder is not that of the model it was made from."""
    name = hub_tokenizer(model)
    by_name = original is not None and "siglip" in original.identifier.lower()
    if name is None and not by_name:
        return None
    ids = probe_tokens(model)
    if original is not None and original.folder is None and ids != probe_tokens(original):
        return f"its tokenizer gives other ids than that of {original.spec}"
    return None


# What tells a card of ours, and where in it the base model's begins.
OURS, THEIRS = "<!-- slsgu: edited -->", "<!-- slsgu: the card of the base model -->\n"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
LICENSE = re.compile(r"^license: *([\w.-]+) *$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What the card of an edited model says; `earlier` edits were in it before.

    `base` is what the base model is called, `hub_id` what the hub calls it. `whole` tells
    whether the edits are in it as they were searched for, or scaled or cut.
    """

    edits: Sequence[EditHeader]
    earlier: Sequence[EditHeader]
    base: str
    hub_id: str | None
    whole: bool

    @classmethod
    def of(
        cls, edits: Sequence[Edit], earlier: Sequence[Edit], *,
        base: ResolvedModel | Path, options: ApplyRequest,
    ) -> "ModelCard":  # fmt: skip
        """Return the card of edits in a model, or in a target at a path, applied by `options`.

        Where the base model is known by its path alone, its last part is told.
        """
        spec = base.spec if isinstance(base, ResolvedModel) else None
        place = (base.folder or base.weights) if isinstance(base, ResolvedModel) else base
        known = _hub_id(spec, place)
        name = place.resolve().name
        if spec is not None and spec.pretrained:
            name = f"{Path(spec.name).stem} ({Path(spec.pretrained).name})"
        whole = options.scale == 1 and options.rank is None and options.step is None
        now, before = ([edit.header for edit in each] for each in (edits, earlier))
        return cls(now, before, known or name, known, whole)

    def over(self, present: str | None) -> str:
        """Return the card, and behind it the one that is `present` in the base model's folder."""
        theirs = base_card(present)
        told = LICENSE.search(theirs.partition("\n---")[0]) if theirs else None
        front = ["---", "tags:", "- clip", "- machine-unlearning"]
        front += [f"base_model: {self.hub_id}"] if self.hub_id else []
        front += [f"license: {told[1]}"] if told else []
        parts = ["\n".join([*front, "---"]), OURS, *self._sections(licensed=told is not None)]
        text = "\n\n".join(parts) + "\n"
        return text if theirs is None else f"{text}\n{THEIRS}{theirs}"

    def _sections(self, *, licensed: bool) -> list[str]:
        every = [*self.edits, *self.earlier]
        concepts = ", ".join(dict.fromkeys(_code(edit.concept) for edit in every))
        edits = "edits" if len(every) > 1 else "edit"
        licence = (
            "" if licensed else " The licence of the base model holds; slsgu does not know it."
        )
        return [
            f"# {_code(self.hub_id or self.base)} without {concepts}",
            f"This is {_code(self.base)} with the {edits} below, made to forget {concepts} by "
            f"[slsgu](https://arxiv.org/abs/2407.11867) {slsgu_cli.__version__}.{licence}",
            "## Figures",
            self._figures(every),
            "## Edits",
            _table(
                ("edit", "layer", "moved by", "digest", "of the model"),
                [
                    (_code(e.name), _code(e.layer), f"{100 * e.share:.3g}%", digest(e),
                     e.model_fingerprint)
                    for e in every
                ],
            ),
            f"`slsgu check . --edit {every[0].name}` tells whether an edit is in these weights, "
            "and `slsgu apply --revert` takes it out.",
        ]  # fmt: skip

    def _figures(self, edits: Sequence[EditHeader]) -> str:
        """Return what each edit forgets and keeps, by what was measured when it was made."""
        rows = []
        for edit in edits:
            forget = [("FA", "", edit.baseline_forget, edit.forget)]
            before = edit.baseline_utility or {}
            kept = [("TA", n, before.get(n), after) for n, after in (edit.utility or {}).items()]
            for kind, name, was, now in (*forget, *kept):
                if was is not None and now is not None:
                    seen = "nothing was chosen by" if now.unseen else "it was chosen by"
                    for k, one, other in ((1, was.top1, now.top1), (5, was.top5, now.top5)):
                        rows.append(
                            (_code(edit.name), f"{kind}@{k} {name}".strip(), f"{one:.2f}%",
                             f"{other:.2f}%", f"{now.rows} images that {seen}")
                        )  # fmt: skip
        if not rows:
            return "Nothing was measured."
        told = "FA is the accuracy on the concept, TA that on everything else."
        if not self.whole:
            told += " They are of the whole edits: these weights hold them scaled or cut."
        elif len(edits) > 1:
            told += " They are those of each edit as it was made."
        return f"{_table(('edit', 'figure', 'base', 'edited', 'of'), rows)}\n\n{told}"


def base_card(present: str | None) -> str | None:
    """Return the base model's card of one that is present: what stands behind ours, if it is."""
    if present is None or OURS not in present:
        return present
    _, found, theirs = present.partition(THEIRS)
    return theirs if found else None


def _hub_id(spec: ModelSpec | None, place: Path) -> str | None:
    """Return what the Hugging Face hub calls a model, as far as its name or its files tell."""
    if spec is not None and spec.name.startswith(HUB):
        return spec.name.removeprefix(HUB)
    if spec is not None and spec.pretrained:
        return None if Path(spec.pretrained).is_file() else _of_tag(spec.name, spec.pretrained)
    if match := SNAPSHOT.search(str(place)):
        return f"{match[1]}/{match[2]}"
    for config in (place / PIPELINE, place / CONFIG):
        name = str(_said(config).get("_name_or_path", ""))
        if HUB_ID.fullmatch(name) and not Path(name).exists():
            return name
    return None


def _of_tag(name: str, tag: str) -> str | None:
    """Return the repository that open_clip fetches a pretrained tag from."""
    import open_clip

    place = (open_clip.get_pretrained_cfg(name, tag) or {}).get("hf_hub") or ""
    return "/".join(place.split("/")[:2]) or None


def _code(text: str) -> str:
    """Return words of strangers as Markdown's code, which is not marked up."""
    return f"`{' '.join(text.replace('`', ' ').replace('|', ' ').split())}`"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
