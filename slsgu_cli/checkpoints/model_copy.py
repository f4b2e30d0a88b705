"""A copy of a model: what goes where, written whole or not at all."""

from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from slsgu_cli import progress
from slsgu_cli.checkpoints.configurations import CONFIG, OPEN_CLIP
from slsgu_cli.checkpoints.destinations import require_nothing_lost
from slsgu_cli.checkpoints.edits import (
    LayerChange,
)
from slsgu_cli.checkpoints.layouts import open_weights
from slsgu_cli.checkpoints.number_formats import Raw
from slsgu_cli.checkpoints.safetensors_file import NewTensor, safetensors_size, write_safetensors
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
class FilePlan:
    """New values of a file's tensors, by name and as it stores them, and what that changes."""

    values: Mapping[str, Raw]
    changes: tuple[LayerChange, ...]


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """The content of a copy: `files` maps a name below `out` ("" is `out`) to its source.

    Files with a plan are edited, `texts` and files `made` of tensors are new, and all others are
    copied unchanged. `client` is the library that loads the result.
    """

    out: Path
    files: dict[str, Path]
    plans: dict[str, FilePlan]
    texts: dict[str, str] = field(default_factory=dict)
    made: dict[str, list[NewTensor]] = field(default_factory=dict)
    client: str = "open_clip"

    @property
    def is_model(self) -> bool:
        """Whether the result is a folder with the configuration of a client that loads it."""
        return OPEN_CLIP in self.files or bool({OPEN_CLIP, CONFIG} & self.texts.keys())

    def nbytes(self, name: str) -> int:
        """Return the size of a file."""
        if name in self.made:
            return safetensors_size(self.made[name])
        return self.files[name].stat().st_size


# Takes the number formats of the edited tensors, and returns a remark on their model.
Compare = Callable[[Collection[str]], str | None]

# Takes a folder with open_clip's configuration, and returns why open_clip may not load it.
Check = Callable[[Path], str | None]


def write_copy(
    plan: CopyPlan,
    options: ApplyOptions,
    compare: Compare | None = None,
    check: Check | None = None,
) -> AppliedResult:
    """Write a planned copy, all of it or nothing; a dry run writes nothing.

    Raises InputError if files at the destination would be lost.
    """
    require_nothing_lost(plan.out, [*plan.files, *plan.texts, *plan.made])
    formats = {change.dtype for file in plan.plans.values() for change in file.changes}
    loads = False
    with ThreadPoolExecutor(1) as pool:
        remark = pool.submit(compare, formats) if compare else None

        def look(folder: Path) -> None:
            nonlocal loads
            if check and plan.is_model:
                why_not = check(folder)
                loads = why_not is None
                if why_not:
                    progress.warn(f"{plan.client} may not load {plan.out}: {why_not}")
            if remark and (text := remark.result()):
                progress.note(text)

        if options.dry_run:
            with _rehearsed(plan) as folder:
                look(folder)
        else:
            _write(plan, link=options.link, last=look)
    files = tuple(
        WrittenFile(
            str(plan.out / name),
            plan.nbytes(name) if options.dry_run else (plan.out / name).stat().st_size,
            file.changes,
        )
        for name, file in sorted(plan.plans.items())
    )
    out = str(plan.out)
    model = out if CONFIG in plan.texts else f"{LOCAL}{out}"
    return AppliedResult(
        out, model if loads else None, files, options.revert, options.dry_run, plan.client
    )


def _write(plan: CopyPlan, *, link: bool, last: Callable[[Path], None]) -> None:
    """Build a copy, call `last` on it, and move it into place."""
    with replacing(plan.out) as partial:
        for name, origin in plan.files.items():
            place = partial / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if name in plan.plans and plan.plans[name].values:
                open_weights(origin).write_copy(place, plan.plans[name].values)
            elif not (link and link_file(origin, place)):
                copy_file(origin, place)
        for name, tensors in plan.made.items():
            place = partial / name
            place.parent.mkdir(parents=True, exist_ok=True)
            write_safetensors(place, tensors)
        _write_texts(partial, plan)
        last(partial)


def _write_texts(folder: Path, plan: CopyPlan) -> None:
    """Write the texts of a plan; a model card may contain bytes that are not UTF-8."""
    for name, text in plan.texts.items():
        (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))


@contextmanager
def _rehearsed(plan: CopyPlan) -> Iterator[Path]:
    """Yield a folder of links to the files of a plan: edits do not change headers."""
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, origin in plan.files.items():
            if name:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).symlink_to(origin.absolute())
        for name, tensors in plan.made.items():
            write_safetensors(folder / (name or "file"), tensors, holes=True)
        _write_texts(folder, plan)
        yield folder
