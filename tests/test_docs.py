"""Names, links and commands in the documents exist, and the refresh script runs what it should."""

import importlib
import importlib.util
import re

import pytest
from places import ROOT

IMPORT = re.compile(r"^(?:> )?from (slsgu_cli[\w.]*) import (.+)$", re.M)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)]*))?\)")
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
DOCUMENTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PAGES}
FOLDERS = [path.parent for path in PAGES if path.name == "README.md" and path.parent != ROOT]
IMPORTS = sorted(
    {
        (module, name.strip())
        for text in DOCUMENTS.values()
        for module, names in IMPORT.findall(text)
        for name in names.split(",")
    }
)


@pytest.mark.parametrize(("module", "name"), IMPORTS)
def test_imports_of_examples_exist(module, name):
    assert hasattr(importlib.import_module(module), name)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_tests_and_scripts_that_documents_name_exist(document):
    text = DOCUMENTS[document]
    for name in re.findall(r"\b(?:test|bench)_\w+\.py", text):
        assert list(ROOT.glob(f"tests/**/{name}")), name
    defined = "\n".join(path.read_text() for path in ROOT.glob("tests/**/test_*.py"))
    for name in set(re.findall(r"`(test_\w+)`", text)) - {"test_fraction"}:
        assert f"def {name}(" in defined, name
    for name in re.findall(r"\bdocs/[\w./-]*\w", text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    for path, anchor in LINK.findall(DOCUMENTS[document]):
        target = _target(document, path)
        assert target.exists(), path
        if anchor:
            headings = re.findall(r"(?m)^#+ (.+)$", target.read_text())
            assert anchor in map(_anchor, headings), f"{path}#{anchor}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_page_is_no_longer_than_a_page(document):
    assert len(DOCUMENTS[document].splitlines()) <= 300


def test_links_lead_from_the_readme_to_every_page_and_picture():
    reached, ahead = set(), ["README.md"]
    while ahead:
        document = ahead.pop()
        if document not in reached:
            reached.add(document)
            targets = [_target(document, path) for path, _ in LINK.findall(DOCUMENTS[document])]
            names = [str(target.relative_to(ROOT)) for target in targets]
            reached.update(name for name in names if name not in DOCUMENTS)
            ahead += [name for name in names if name in DOCUMENTS]
    assert set(DOCUMENTS) <= reached
    pictures = {str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.png")}
    assert pictures <= reached


@pytest.mark.parametrize("document", DOCUMENTS)
def test_pictures_that_refreshing_writes_are_shown(document):
    for target in re.findall(r"<!-- picture: \S+ (\S+) -->", DOCUMENTS[document]):
        assert f"]({target})" in DOCUMENTS[document], target


@pytest.fixture(scope="module")
def refresh():
    spec = importlib.util.spec_from_file_location("refresh", ROOT / "docs" / "refresh.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_pages_come_after_the_pages_they_build_on(refresh, folder):
    order = refresh.reading_order(folder)
    assert sorted(order) == sorted(folder.glob("*.md"))
    for place, page in enumerate(order):
        assert set(refresh.pages_before(page)) <= set(order[:place]), page


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_page_that_needs_the_trained_models_says_so(refresh, document):
    blocks = re.findall(r"```console\n.*?```", DOCUMENTS[document], re.S)
    takes = "$SLSGU_TEST_MODELS" in "".join(blocks)
    assert takes == ("SLSGU_TEST_MODELS" in refresh.declared(ROOT / document, "needs"))


@pytest.fixture
def pages(tmp_path):
    """Three pages of a folder: two build on the first, and one of these needs models."""
    folder = tmp_path / "pages"
    folder.mkdir()
    texts = {
        "README.md": "# Pages\n[first](first.md) [models](models.md#models) [last](last.md)\n",
        "first.md": "# First\n```console\n$ echo made > file\nold\n```\n",
        "models.md": "<!-- after: first.md -->\n<!-- needs: SLSGU_TEST_MODELS -->\n"
        "# Models\n```console\n$ ls $SLSGU_TEST_MODELS\n```\n",
        "last.md": "<!-- after: first.md -->\n# Last\n## One\n```console\n$ cat file\nold\n"
        "$ echo one >> file\n```\n## Two\n```console\n$ cat \\\n>   file\nold\n```\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    return folder


def test_pages_of_a_folder_share_their_artifacts(refresh, pages, monkeypatch, capsys):
    monkeypatch.delenv("SLSGU_TEST_MODELS", raising=False)
    refresh.main([str(pages)])
    assert (pages / "first.md").read_text() == "# First\n```console\n$ echo made > file\n```\n"
    assert "$ cat \\\n>   file\nmade\none\n```" in (pages / "last.md").read_text()
    assert "models.md needs SLSGU_TEST_MODELS" in capsys.readouterr().err


def test_refreshing_one_section_runs_the_earlier_ones_unchanged(refresh, pages):
    refresh.main([f"{pages / 'last.md'}#two"])
    assert "old" in (pages / "first.md").read_text()
    text = (pages / "last.md").read_text()
    assert "$ cat file\nold\n" in text
    assert "file\nmade\none\n```" in text


def test_a_page_without_what_it_needs_runs_nothing(refresh, pages, monkeypatch, capsys):
    monkeypatch.setenv("SLSGU_TEST_MODELS", str(pages))
    before = (pages / "models.md").read_text()
    refresh.main([str(pages / "models.md")])
    assert (pages / "models.md").read_text() == before
    told = capsys.readouterr().err
    assert "left out" in told
    assert " s  " not in told


def test_a_missing_section_is_reported(refresh, pages):
    with pytest.raises(SystemExit, match="has no section three; it has one, two"):
        refresh.main([f"{pages / 'last.md'}#three"])


def _target(document, path):
    """Return the target of a document's link; a folder stands for its README.md."""
    target = (ROOT / document).parent / path if path else ROOT / document
    target = target.resolve()
    return target / "README.md" if target.is_dir() else target


def _anchor(heading):
    """Return a heading's anchor as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
