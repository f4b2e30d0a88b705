"""What the documents name is there."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
IMPORT = re.compile(r"^(?:> )?from (slsgu_cli[\w.]*) import (.+)$", re.M)
DOCUMENTS = {path.name: path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
IMPORTS = sorted(
    {(module, name.strip())
     for text in DOCUMENTS.values() for module, names in IMPORT.findall(text)
     for name in names.split(",")}
)  # fmt: skip


@pytest.mark.parametrize(("module", "name"), IMPORTS)
def test_imports_of_examples_exist(module, name):
    assert hasattr(importlib.import_module(module), name)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_tests_and_scripts_that_documents_name_exist(document):
    text = DOCUMENTS[document]
    for name in re.findall(r"\b(?:test|bench)_\w+\.py", text):
        assert list(ROOT.glob(f"tests/**/{name}")), name
    defined = "\n".join(path.read_text() for path in ROOT.glob("tests/test_*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in defined, name


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    here = ROOT if document == "README.md" else ROOT / "docs"
    for path, anchor in re.findall(
        r"\]\((?!https?:)([^)#\s]*)(?:#([^)]*))?\)", DOCUMENTS[document]
    ):
        target = here / path if path else here / document
        assert target.exists(), path
        if anchor:
            headings = re.findall(r"(?m)^#+ (.+)$", target.read_text())
            assert anchor in map(_anchor, headings), f"{path}#{anchor}"


def _anchor(heading):
    """Return a heading's anchor as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
