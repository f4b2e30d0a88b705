"""Whether a model's files can be loaded, and what a folder that is written holds beside weights.

What is looked at: the configuration, the names and shapes of the weights by their header, and
the tokenizer. A folder that is written has a tokenizer and a card.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import slsgu_cli
from slsgu_cli import progress
from slsgu_cli.checkpoints.apply import OURS
from slsgu_cli.checkpoints.edits import Edit
from slsgu_cli.checkpoints.layouts import clip_shapes
from slsgu_cli.checkpoints.targets import CONFIG, PIPELINE, read_config
from slsgu_cli.checkpoints.transformers_clip import FETCH_ERRORS, HUB
from slsgu_cli.clip.models import (
    TOKENIZER_CONFIG,
    ResolvedModel,
    built_shapes,
    contents,
    is_read_by_open_clip,
    load,
    probe_tokens,
    resolve,
    save_tokenizer,
)
from slsgu_cli.errors import SlsguError, first_lines
from slsgu_cli.records.codec import digest
from slsgu_cli.records.method import EditHeader
from slsgu_cli.records.options import ApplyRequest
from slsgu_cli.records.sets import LOCAL, ModelSpec

# What a tokenizer of transformers consists of, whatever its kind.
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
    if source is None or "tokenizer_class" not in _config_of(source / TOKENIZER_CONFIG):
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


def _config_of(path: Path) -> Mapping[str, object]:
    return read_config(path) if path.is_file() else {}


def why_not_loaded(folder: Path, original: ResolvedModel | None) -> str | None:
    """Return why it is not certain that open_clip loads a folder; None where it is.

    Its tokenizer must give the ids that `original`'s gives, of the model that it was made from.
    """
    try:
        model = resolve(ModelSpec(f"{LOCAL}{folder}"))
        if not is_read_by_open_clip(model):
            return f"it does not read {model.weights.name}, TorchScript or of a compiled model"
        return _other_weights(model) or _other_tokenizer(model, original)
    except SlsguError as error:
        return first_lines(error).replace(f"{folder}/", "")


def require_weights(model: ResolvedModel) -> None:
    """Raise InputError or MissingError unless a model's weights can be loaded.

    Their header tells so of most. Where it differs from what the configuration builds, as
    weights do that open_clip converts, they are loaded.
    """
    if _other_weights(model) is not None:
        load(model)


def _other_weights(model: ResolvedModel) -> str | None:
    """Return how the header of a model's weights differs from what its configuration builds."""
    wanted = clip_shapes(model.config) or built_shapes(model)
    held, _ = contents(model)
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


# Where the base model's card begins in one of ours.
THEIRS = "<!-- slsgu: the card of the base model -->\n"
EDITS = ("edit", "forgets", "layer", "moved by", "strength", "digest", "of the model")
FIGURES = ("edit", "figure", "base", "edited", "of")
WHOLE = "whole"
ROW = re.compile(r"^\| `.* \|$", re.MULTILINE)
BASE = re.compile(r"^# (`[^`\n]*`) without ", re.MULTILINE)
BASE_ID = re.compile(r"^base_model: (\S+)$", re.MULTILINE)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
LICENSE = re.compile(r"^license: *([\w.-]+) *$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What the card of an edited model says; `earlier` edits were in it before.

    `base` is what the base model is called, `hub_id` what the hub calls it. `strength` tells
    whether the edits are in it as they were searched for, or scaled or cut; with `revert` they
    are taken out.
    """

    edits: Sequence[EditHeader]
    earlier: Sequence[EditHeader]
    base: str
    hub_id: str | None
    strength: str = WHOLE
    revert: bool = False

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
        strength = "" if options.scale == 1 else f"scale {options.scale:g}"
        strength += "" if options.rank is None else f" rank {options.rank}"
        strength += "" if options.step is None else f" step {options.step:g}"
        now, before = ([edit.header for edit in each] for each in (edits, earlier))
        return cls(now, before, known or name, known, strength.strip() or WHOLE, options.revert)

    def over(self, present: str | None) -> str | None:
        """Return the card where one is `present`: the base model's, or ours of what it was.

        What ours says of other edits stays, and the base model's card stands behind. Without
        any edit left, it stands alone.
        """
        theirs = base_card(present)
        ours = "" if present is None or present == theirs else present.partition(THEIRS)[0]
        every = [*self.edits] if self.revert else [*self.edits, *self.earlier]
        names = {_code(edit.name) for edit in every}
        there = [row for row in ROW.findall(ours) if row.split(" | ")[0][2:] not in names]
        edits = [row for row in there if row.count(" | ") == len(EDITS) - 1]
        figures = [row for row in there if row.count(" | ") == len(FIGURES) - 1]
        if not self.revert:
            edits += [_row(self._edit(edit)) for edit in every]
            figures += [_row(cells) for edit in every for cells in _figures(edit)]
        if not edits:
            return theirs
        base, known = BASE.search(ours), BASE_ID.search(ours)
        return _rendered(
            _code(self.base) if base is None else base[1],
            (None if base is not None else self.hub_id) if known is None else known[1],
            sorted(edits, key=_first), sorted(figures, key=_first), theirs,
        )  # fmt: skip

    def _edit(self, edit: EditHeader) -> tuple[str, ...]:
        strength = self.strength if edit in self.edits else WHOLE
        share = f"{100 * edit.share:.3g}%"
        name, concept, layer = _code(edit.name), _code(edit.concept), _code(edit.layer)
        return name, concept, layer, share, strength, digest(edit), edit.model_fingerprint


def _first(row: str) -> str:
    return row.split(" | ")[0]


def _figures(edit: EditHeader) -> list[tuple[str, ...]]:
    """Return what an edit forgets and keeps, as it was measured when it was made."""
    before = edit.baseline_utility or {}
    kept = [("TA", n, before.get(n), now) for n, now in (edit.utility or {}).items()]
    rows: list[tuple[str, ...]] = []
    for kind, name, was, now in (("FA", "", edit.baseline_forget, edit.forget), *kept):
        if was is None or now is None:
            continue
        seen = "nothing was chosen by" if now.unseen else "it was chosen by"
        of = f"{now.rows} images that {seen}"
        for k, one, other in ((1, was.top1, now.top1), (5, was.top5, now.top5)):
            figure = f"{kind}@{k} {name}".strip()
            rows.append((_code(edit.name), figure, f"{one:.2f}%", f"{other:.2f}%", of))
    return rows


def _rendered(
    base: str, known: str | None, edits: Sequence[str], figures: Sequence[str], theirs: str | None
) -> str:
    """Return the card of rows of edits and of figures; `theirs` is the base model's."""
    licensed = LICENSE.search(theirs.partition("\n---")[0]) if theirs else None
    front = ["---", "tags:", "- clip", "- machine-unlearning"]
    front += [f"base_model: {known}"] if known else []
    front += [f"license: {licensed[1]}"] if licensed else []
    concepts = ", ".join(dict.fromkeys(row.split(" | ")[1] for row in edits))
    licence = "" if licensed else " Its licence is that of the base model, not known here."
    parts = [
        "\n".join([*front, "---"]),
        OURS,
        f"# {base} without {concepts}",
        f"This is {base} with the edits below, made by slsgu {slsgu_cli.__version__} "
        f"([SLUG](https://arxiv.org/abs/2407.11867)).{licence}",
        "## Figures",
        _table(FIGURES, figures) if figures else "Nothing was measured.",
        "FA is the accuracy on the concept, TA that on everything else, of the base model with "
        "each edit as it was made.",
        "## Edits",
        _table(EDITS, edits),
        "`slsgu check . --edit NAME` tells whether an edit is in these weights, and "
        "`slsgu apply --revert` takes it out.",
    ]
    text = "\n\n".join(parts) + "\n"
    return text if theirs is None else f"{text}\n{THEIRS}{theirs}"


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
        name = str(_config_of(config).get("_name_or_path", ""))
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


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _table(columns: Sequence[str], rows: Sequence[str]) -> str:
    return "\n".join([_row(columns), _row(["---"] * len(columns)), *rows])
