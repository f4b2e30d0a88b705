"""Models built on CLIP as the libraries that run them load them, from local folders only."""

import contextlib
import importlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slsgu_cli.errors import InputError, MissingError, UsageError
from slsgu_cli.records import digest
from slsgu_cli.targets.reach import Family
from slsgu_cli.targets.target import Target, read_target
from slsgu_cli.weights import fingerprint, weight_files

INSTALL = "pip install 'slsgu[targets]'"
PIPELINES = (Family.SD1, Family.SD2, Family.SDXL)


def require_family(path: Path, *, answers: bool) -> Target:
    """Return the target at `path`: a vision-language model, or else a diffusion pipeline.

    Raises MissingError, InputError, and UsageError for a model of the other kind.
    """
    target = read_target(path)
    if answers != (target.family is Family.LLAVA):
        wanted = "a LLaVA" if answers else "a diffusion pipeline"
        other = "generate" if answers else "ask"
        fits = target.family in PIPELINES or target.family is Family.LLAVA
        raise UsageError(
            f"{path} is {target.family}, not {wanted}", hint=f"slsgu {other}" if fits else None
        )
    if target.path.is_file():
        raise UsageError(
            f"{path} is one file of weights, which does not say how it is run",
            hint="convert it to a folder: diffusers' from_single_file(...).save_pretrained(...)",
        )
    return target


def library(name: str) -> Any:
    """Import a library that is not needed elsewhere. Raises MissingError naming its extra."""
    try:
        with quiet():
            module = importlib.import_module(name)
            # Both libraries draw bars of their own while they load.
            importlib.import_module("transformers").utils.logging.disable_progress_bar()
            importlib.import_module(f"{name}.utils.logging").disable_progress_bar()
            return module
    except ImportError as error:
        raise MissingError(
            f"running this model needs the package {name}: {error}", hint=INSTALL
        ) from error


def folder_fingerprint(folder: Path) -> str:
    """Return a digest of all the weights in a model's folder and the folders in it."""
    folders = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    files = [path for inner in folders for path in weight_files(inner)]
    return digest({str(path.relative_to(folder)): fingerprint(path) for path in files})


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what the libraries log and warn of while loading off the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn a library's failure to load the model at `path` into one message."""
    try:
        yield
    except ImportError as error:
        raise MissingError(f"{path} needs a package: {error}", hint=INSTALL) from error
    except Exception as error:  # each library raises kinds of its own here
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        what = lines[0][:300] if lines else type(error).__name__
        raise InputError(f"cannot load {path}: {what}", hint="check that it is complete") from error
