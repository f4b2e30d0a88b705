"""The card of a model with edits, in front of the card of its base model.

The front matter lists the edits and their figures. A later `apply` reads them there, adds or
removes its own, and writes the card again.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import slsgu_cli
from slsgu_cli.checkpoints.configurations import CONFIG, PIPELINE, config_of
from slsgu_cli.checkpoints.destinations import OURS
from slsgu_cli.checkpoints.hub import HUB
from slsgu_cli.records.codec import digest
from slsgu_cli.records.method import EditHeader
from slsgu_cli.records.options import ApplyRequest
from slsgu_cli.records.sets import ModelSpec

# The base model's card follows this line.
THEIRS = "<!-- slsgu: the card of the base model -->\n"
BODY = """\
{{ mark }}

# {{ base | code }} without {{ concepts | map("code") | join(", ") }}

This is {{ base | code }} with the edits below, made by slsgu {{ version }} \
([SLUG](https://arxiv.org/abs/2407.11867)).\
{{ "" if licensed else " Its licence is that of the base model, which is unknown here." }}

## Figures

{% if measured %}
| edit | figure | base | edited | images |
| --- | --- | --- | --- | --- |
{% for name, edit in edits.items() %}
{% for row in edit.figures %}
| {{ name | code }} | {{ row | join(" | ") }} |
{% endfor %}
{% endfor %}
{% else %}
Nothing was measured.
{% endif %}

FA is the accuracy on the concept, TA the accuracy on everything else. \
Each edit was measured alone on the base model.

## Edits

| edit | forgets | layer | moved by | strength | digest | base model |
| --- | --- | --- | --- | --- | --- | --- |
{% for name, edit in edits.items() %}
| {{ name | code }} | {{ edit.forgets | code }} | {{ edit.layer | code }} \
| {{ edit["moved by"] }} | {{ edit.strength }} | {{ edit.digest }} | {{ edit["base model"] }} |
{% endfor %}

`slsgu check . --edit NAME` reports whether these weights contain an edit, and \
`slsgu apply --revert` takes it out.
"""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def edited_card(
    present: str | None,
    edits: Sequence[EditHeader],
    earlier: Sequence[EditHeader],
    *,
    spec: ModelSpec | None,
    place: Path,
    options: ApplyRequest,
    library: str | None = None,
) -> str | None:
    """Return the card of a model with `edits`, applied (or undone) on top of `earlier` ones.

    The card `present` is the base model's, or an earlier one, whose other edits stay on it. If no
    edit is left, the result is the base model's card. The base model is named by its repository,
    its `spec`, or the last part of its path, `place`. `library` loads the model.
    """
    from huggingface_hub import ModelCardData

    theirs = base_card(present)
    old = {} if present is None or present == theirs else _front_matter(present)
    scale = None if options.scale == 1 else options.scale
    given = (("scale", scale), ("rank", options.rank), ("step", options.step))
    strength = " ".join(f"{word} {value:g}" for word, value in given if value is not None)
    rows: dict[str, Any] = {**old.get("slsgu", {}).get("edits", {})}
    for edit in edits if options.revert else [*edits, *earlier]:
        rows.pop(edit.name, None)
        if not options.revert:
            rows[edit.name] = {
                "forgets": edit.concept,
                "layer": edit.layer,
                "moved by": f"{100 * edit.share:.3g}%",
                "strength": strength if strength and edit in edits else "whole",
                "digest": digest(edit),
                "base model": edit.model_fingerprint,
                "figures": _figures(edit),
            }
    if not rows:
        return theirs
    rows = dict(sorted(rows.items()))
    if old:
        base, repository = old["slsgu"]["base"], old.get("base_model")
    else:
        repository = hub_id(spec, place)
        base = repository or _name(spec, place)
    data = ModelCardData(
        tags=["clip", "machine-unlearning"],
        library_name=library,
        base_model=repository,
        license=_front_matter(theirs or "").get("license"),
        slsgu={"base": base, "edits": rows},
    )
    body = _body(base, rows, licensed=data.license is not None)
    text = f"---\n{data.to_yaml()}\n---\n\n{body}"
    return text if theirs is None else f"{text}\n{THEIRS}{theirs}"


def _name(spec: ModelSpec | None, place: Path) -> str:
    if spec is not None and spec.pretrained:
        return f"{Path(spec.name).stem} ({Path(spec.pretrained).name})"
    return place.resolve().name


def base_card(present: str | None) -> str | None:
    """Return the base model's card: the part behind ours, if the card is of an edited model."""
    if present is None or OURS not in present:
        return present
    _, marker, theirs = present.partition(THEIRS)
    return theirs if marker else None


def _front_matter(card: str) -> dict[str, Any]:
    """Return the front matter of a card; nothing if it has none, or one that cannot be read."""
    import yaml
    from huggingface_hub import ModelCard
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    if not REGEX_YAML_BLOCK.search(card):
        return {}  # ModelCard would log a warning.
    try:
        data: Any = ModelCard(card, ignore_metadata_errors=True).data
        return dict(data.to_dict())
    except (yaml.YAMLError, ValueError, TypeError):
        return {}


def _figures(edit: EditHeader) -> list[list[str]]:
    """Return the accuracies before and after an edit, as measured when it was made."""
    before = edit.baseline_utility or {}
    utility = [("TA", n, before.get(n), now) for n, now in (edit.utility or {}).items()]
    rows = []
    for kind, name, was, now in (("FA", "", edit.baseline_forget, edit.forget), *utility):
        if was is None or now is None:
            continue
        images = f"{now.rows} {'test' if now.is_test else 'validation'} {now.measured_on}"
        for k, one, other in ((1, was.top1, now.top1), (5, was.top5, now.top5)):
            rows.append([f"{kind}@{k} {name}".strip(), f"{one:.2f}%", f"{other:.2f}%", images])
    return rows


def _body(base: str, edits: Mapping[str, Mapping[str, Any]], *, licensed: bool) -> str:
    from jinja2 import Environment

    environment = Environment(trim_blocks=True, keep_trailing_newline=True)
    environment.filters["code"] = _code
    return environment.from_string(BODY).render(
        mark=OURS,
        base=base,
        concepts=dict.fromkeys(edit["forgets"] for edit in edits.values()),
        licensed=licensed,
        version=slsgu_cli.__version__,
        edits=edits,
        measured=any(edit["figures"] for edit in edits.values()),
    )


def hub_id(spec: ModelSpec | None, place: Path) -> str | None:
    """Return a model's repository on the Hugging Face hub, as its name or its files give it."""
    if spec is not None and spec.name.startswith(HUB):
        return spec.name.removeprefix(HUB)
    if spec is not None and spec.pretrained:
        return None if Path(spec.pretrained).is_file() else _of_tag(spec.name, spec.pretrained)
    # A snapshot in the hub's cache: models--ORG--NAME/snapshots/REVISION.
    for part in place.parts:
        if part.startswith("models--") and part.count("--") == 2:
            return "/".join(part.split("--")[1:])
    for config in (place / PIPELINE, place / CONFIG):
        name = str(config_of(config).get("_name_or_path", ""))
        if HUB_ID.fullmatch(name) and not Path(name).exists():
            return name
    return None


def _of_tag(name: str, tag: str) -> str | None:
    """Return the repository of a pretrained tag of open_clip."""
    import open_clip

    place = (open_clip.get_pretrained_cfg(name, tag) or {}).get("hf_hub") or ""
    return "/".join(place.split("/")[:2]) or None


def _code(text: str) -> str:
    """Return text that may hold Markdown as inline code, in one cell of a table."""
    return f"`{' '.join(text.replace('`', ' ').replace('|', ' ').split())}`"
