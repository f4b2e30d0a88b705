"""Where each artifact of a set lies in the store, and how the ones in use are read."""

import re
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from slsgu_cli.errors import StaleError, UsageError
from slsgu_cli.records import GradientPointer, Ranking, SetManifest, digest
from slsgu_cli.store import Store, require

# File systems end names at 255 bytes; plots add the name of a layer.
LONGEST_LABEL = 100
_NAME = re.compile(r"[\w][\w .+@-]*")


def check_name(name: str) -> str:
    """Return `name` if it can name artifacts. Raises UsageError."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot name a set",
            hint="use letters, digits, spaces and . _ + @ -, starting with a letter or digit",
        )
    return name


def manifest_path(name: str) -> str:
    """Return where the set `name` is described."""
    return f"sets/{check_name(name)}.json"


def pointer_path(name: str) -> str:
    """Return where the gradients of the set `name` are named."""
    return f"gradients/{check_name(name)}.json"


def gradient_path(address: str) -> str:
    """Return where the gradient called `address`, a digest, lies."""
    return f"gradients/{address}.safetensors"


def moments_path(digest: str) -> str:
    """Return where the moments called `digest` lie."""
    return f"moments/{digest}.safetensors"


def squares_path(digest: str) -> str:
    """Return where the squared gradients lie that go with the gradient called `digest`."""
    return f"squares/{digest}.safetensors"


def ranking_path(name: str) -> str:
    """Return where the ranking of the set `name` lies."""
    return f"rankings/{check_name(name)}.json"


def trials_path(name: str) -> str:
    """Return where the search of the set `name` is recorded."""
    return f"trials/{check_name(name)}.json"


def joint_label(names: Sequence[str]) -> str:
    """Return what a joint search over several sets is called: their names, as far as they fit."""
    label = "+".join(names)
    if len(label) <= LONGEST_LABEL:
        return label
    return f"{names[0]}+{len(names) - 1}-{digest(list(names))[:8]}"


def joint_path(names: Sequence[str]) -> str:
    """Return where the joint search over several sets is recorded."""
    return f"joint/{check_name(joint_label(names))}.json"


def sweep_path(name: str) -> str:
    """Return where the sweep `name` is recorded."""
    return f"sweeps/{check_name(name)}.json"


def trajectory_path(name: str) -> str:
    """Return where the trajectories of the set `name` are recorded."""
    return f"trajectories/{check_name(name)}.json"


def comparison_path(name: str) -> str:
    """Return where the comparison of methods on the set `name` is recorded."""
    return f"comparisons/{check_name(name)}.json"


def target_edit(name: str, target: Path) -> str:
    """Return what the edit of the set `name` is called that was steered on `target`."""
    return check_name(f"{name}@{target.resolve().name}")


def set_of(edit: str) -> str:
    """Return the name of the set that an edit was made from, its target aside."""
    return edit.partition("@")[0] or edit


def target_trials_path(name: str, target: Path) -> str:
    """Return where the search of the set `name` that was steered on `target` is recorded."""
    return f"target-trials/{target_edit(name, target)}.json"


def target_comparison_path(name: str, target: Path) -> str:
    """Return where the comparison of methods on `target` for the set `name` is recorded."""
    return f"target-comparisons/{target_edit(name, target)}.json"


def edit_path(name: str) -> str:
    """Return where the edit of the set `name` lies."""
    return f"edits/{check_name(name)}.safetensors"


def verification_path(name: str) -> str:
    """Return where the verification of the set `name` is recorded."""
    return f"verifications/{check_name(name)}.json"


def collection_path(folder: str) -> str:
    """Return where the collection of samples in `folder` is described."""
    return f"{folder}.json"


def plot_path(name: str, kind: str) -> str:
    """Return where a plot of the set `name` lies."""
    return f"plots/{check_name(name)}-{kind}.png"


def read_manifest(store: Store, name: str) -> SetManifest:
    """Return the manifest of the set `name`. Raises MissingError."""
    path = manifest_path(name)
    known = [] if store.exists(path) else store.names("sets", ".json")
    what = f"set {name}" + (f"; it has {', '.join(known)}" if known else "")
    require(store, path, what=what, run=f"slsgu build-sets {quote(name)} --source ...")
    return store.read_record(manifest_path(name), SetManifest)


def read_pointer(store: Store, manifest: SetManifest) -> GradientPointer:
    """Return which gradients belong to a set as it is built now. Raises StaleError."""
    name = manifest.name
    run = f"slsgu grad {quote(name)}"
    require(store, pointer_path(name), what=f"gradients of {name}", run=run)
    pointer = store.read_record(pointer_path(name), GradientPointer)
    built = (manifest.forget.fingerprint, manifest.retain.fingerprint)
    if (pointer.forget_data, pointer.retain_data) != built:
        which = "forget" if pointer.forget_data != built[0] else "retain"
        raise StaleError(
            f"the gradients of {name} were computed before its {which} set was built anew",
            hint=f"run `{run}`",
        )
    for address in (pointer.forget, pointer.retain):
        require(store, gradient_path(address), what=f"gradient {address} of {name}", run=run)
    return pointer


def read_ranking(store: Store, pointer: GradientPointer) -> Ranking:
    """Return the ranking made from the gradients in use. Raises StaleError."""
    name = pointer.name
    run = f"slsgu rank {quote(name)}"
    require(store, ranking_path(name), what=f"ranking of {name}", run=run)
    ranking = store.read_record(ranking_path(name), Ranking)
    if (ranking.forget, ranking.retain) != (pointer.forget, pointer.retain):
        raise StaleError(
            f"the ranking of {name} was made from other gradients than the store has now",
            hint=f"run `{run}`",
        )
    return ranking
