"""A copy of a model: what goes where, written whole or not at all."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from slsgu_cli import progress
from slsgu_cli.checkpoints.configurations import CONFIG, OPEN_CLIP
from slsgu_cli.checkpoints.destinations import require_nothing_lost
from slsgu_cli.checkpoints.edit_plan import FilePlan
from slsgu_cli.checkpoints.layouts import open_weights
from slsgu_cli.checkpoints.safetensors_file import NewTensor, write_safetensors
from slsgu_cli.checkpoints.stored_layer import LayerChange
from slsgu_cli.records.method import PromptReader
from slsgu_cli.records.options import ApplyOptions
from slsgu_cli.records.sets import LOCAL
from slsgu_cli.store.atomic import replacing
from slsgu_cli.store.copying import copy_file, link_file


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """An edited file of the result: its path, its size, what changed in it."""

    path: str
    nbytes: int
    changes: tuple[LayerChange, ...]


@dataclass(frozen=True, slots=True)
class AppliedResult:
    """What apply wrote, or with `dry_run` would write.

    `model` is the value for `--model`, if a check found that `client` loads the result.
    `readers` are the prompt readers of a pipeline, the edited ones marked.
    """

    out: str
    model: str | None
    files: tuple[WrittenFile, ...]
    reverted: bool
    dry_run: bool
    client: str = "open_clip"
    readers: tuple[PromptReader, ...] = ()


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """The content of a copy: `files` maps a name below `out` ("" is `out`) to its source.

    Files with a plan are edited, `texts` and files `made` of tensors are new, and all others are
    copied unchanged. `client` is the library that loads the result.
    """

    out: Path
    files: Mapping[str, Path]
    plans: Mapping[str, FilePlan]
    texts: Mapping[str, str] = field(default_factory=dict)
    made: Mapping[str, list[NewTensor]] = field(default_factory=dict)
    client: str = "open_clip"


# Takes a folder with open_clip's configuration, and returns why open_clip may not load it.
Check = Callable[[Path], str | None]


def write_copy(plan: CopyPlan, options: ApplyOptions, check: Check | None = None) -> AppliedResult:
    """Write a planned copy, all of it or nothing; a dry run writes nothing.

    Raises InputError if files at the destination would be lost.
    """
    require_nothing_lost(plan.out, [*plan.files, *plan.texts, *plan.made])
    is_model = OPEN_CLIP in plan.files or bool({OPEN_CLIP, CONFIG} & plan.texts.keys())
    out, model = str(plan.out), None
    with _scratch() if options.dry_run else replacing(plan.out) as copy:
        _write(plan, copy, options)
        if check and is_model:
            if why_not := check(copy):
                progress.warn(f"{plan.client} may not load {out}: {why_not}")
            else:
                model = out if CONFIG in plan.texts else f"{LOCAL}{out}"
        files = tuple(
            WrittenFile(str(plan.out / name), (copy / name).stat().st_size, tuple(file.changes))
            for name, file in sorted(plan.plans.items())
        )
    return AppliedResult(out, model, files, options.revert, options.dry_run, plan.client)


def _write(plan: CopyPlan, copy: Path, options: ApplyOptions) -> None:
    """Write the files of a plan; in a dry run, links and headers: edits do not change those."""
    for name in (*plan.files, *plan.made, *plan.texts):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
    for name, origin in plan.files.items():
        place = copy / name
        if options.dry_run:
            place.symlink_to(origin.absolute())
        elif name in plan.plans and plan.plans[name].values:
            open_weights(origin).write_copy(place, plan.plans[name].values)
        elif not (options.link and link_file(origin, place)):
            copy_file(origin, place)
    for name, tensors in plan.made.items():
        write_safetensors(copy / name, tensors, holes=options.dry_run)
    for name, text in plan.texts.items():
        # A model card may contain bytes that are not UTF-8.
        (copy / name).write_bytes(text.encode("utf-8", "surrogateescape"))


@contextmanager
def _scratch() -> Iterator[Path]:
    with TemporaryDirectory() as folder:
        yield Path(folder) / "copy"
