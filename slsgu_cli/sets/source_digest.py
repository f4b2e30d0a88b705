"""Digests of everything that a set is built from."""

from dataclasses import replace
from typing import Any

from slsgu_cli.records.codec import digest, encode
from slsgu_cli.records.options import BuildRequest
from slsgu_cli.sources.opening import open_sources
from slsgu_cli.sources.prompts import read_classes, read_templates
from slsgu_cli.sources.reader import Columns


def source_digest(request: BuildRequest, identities: dict[Any, Any]) -> str:
    """Return a digest of a set's source files, class names and prompts.

    `identities` caches the identities of files between calls. Raises MissingError or
    InputError for unreadable files.
    """
    columns = Columns(
        image=request.image_column, caption=request.caption_column, label=request.label_column
    )
    texts = {*request.sources, *request.retain_sources}
    texts |= {*request.evals.values(), *request.tests.values()}
    classes = {name: encode(read_classes(text)) for name, text in request.classes.items()}
    prompts = {name: list(read_templates(text)) for name, text in request.templates.items()}
    files = []
    for reader in open_sources(sorted(texts), columns):
        key = repr(replace(reader, filters={}))
        if key not in identities:
            identities[key] = reader.identity()
        files.append(identities[key])
    return digest([digest(files), classes, prompts])
