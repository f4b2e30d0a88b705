"""The page as a whole, on a store whose names are markup."""

import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure
from reports import (
    CHOSEN,
    HOSTILE,
    NAME,
    TITLES,
    fill,
    fill_comparison,
    fill_several,
    fill_verification,
    html,
)

from slsgu_cli.checkpoints.edits import load_edit, write_edit
from slsgu_cli.records.method import GradientPointer
from slsgu_cli.records.sets import SetManifest
from slsgu_cli.store.store import Store

VOID = frozenset({"br", "col", "hr", "img", "meta"})


class Outline(HTMLParser):
    """A page's elements with their attributes, its headings and ids; tags must match."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.headings = [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), tag
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings.append((self.open[-1], data))

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = Store(str(tmp_path_factory.mktemp("report") / "store"))
    fill(store)
    fill(store, concept="castle", name="castle")
    return store


@pytest.fixture(scope="module")
def alone(store, undrawn):
    """The page with its charts; other pages of this module have none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", undrawn)
        return html(store)


def test_names_stay_text_and_no_resource_is_external(alone):
    outline = Outline(alone)
    tags = {tag for tag, _ in outline.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "form", "b", "i" * 2}
    assert HOSTILE not in alone
    assert "<script" not in alone
    for tag, attributes in outline.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,"))
    assert "@import" not in alone
    assert alone.count("url(") == alone.count("url(#") > 0
    policy = [meta for meta in outline.all("meta") if "http-equiv" in meta]
    assert policy[0]["content"].startswith("default-src 'none'")


@pytest.mark.usefixtures("drawing")
def test_the_same_inputs_give_the_same_bytes(store, alone):
    assert html(store) == alone
    assert not re.search(r"20\d\d-\d\d-\d\d", alone)


def test_sections_are_headed_linked_and_in_order(alone):
    outline = Outline(alone)
    assert [text for tag, text in outline.headings if tag == "h3"] == list(TITLES)
    assert [tag for tag, _ in outline.headings][:2] == ["h1", "h2"]
    ids = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [link["href"].removeprefix("#") for link in outline.all("a")]
    assert set(targets) <= set(ids)
    for section in outline.all("section"):
        assert section["aria-labelledby"] in ids


def test_the_page_is_accessible_to_screen_readers(alone):
    outline = Outline(alone)
    assert outline.all("html") == [{"lang": "en"}]
    assert all("alt" in image for image in outline.all("img"))
    assert all(head.get("scope") in ("row", "col") for head in outline.all("th"))
    charts = outline.all("svg")
    assert charts
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in charts)
    tables = [tag for tag, _ in outline.elements if tag in ("table", "caption")]
    assert tables == ["table", "caption"] * (len(tables) // 2)


def test_the_page_shows_figures_and_records(alone):
    text = re.sub(r"<[^>]+>", " ", alone)
    assert "the model recognised 96.97% before the edit" in text
    assert "0.0 to 10.6%" in text
    assert CHOSEN in text
    for word in ("mouse-forget", "a.*b", "17,689", "export SLSGU_STORE=", "slsgu grad mouse"):
        assert word in text
    assert "(95% upper bound: " in text


def test_a_missing_record_is_one_line_with_its_command(store, tmp_path):
    shutil.copytree(store.root, tmp_path / "store")
    fewer = Store(str(tmp_path / "store"))
    fewer.remove(f"trials/{NAME}.json")
    fewer.remove(f"edits/{NAME}.safetensors")
    page = html(fewer)
    assert page.count("There is no search yet. To add it: <code>slsgu search mouse</code>") == 1
    assert page.count("There is no edit yet. To add it: <code>slsgu search mouse</code>") == 2
    assert "among other such images" not in page


def test_figures_on_rows_that_may_have_changed_come_with_a_notice(store, tmp_path):
    shutil.copytree(store.root, tmp_path / "store")
    rebuilt = Store(str(tmp_path / "store"))
    path = f"sets/{NAME}.json"
    manifest = rebuilt.read_record(path, SetManifest)
    brands = replace(manifest.evals["brands"], path="data/new.zarr", fingerprint="new")
    told = '{"attributes": {"rows": 9, "fingerprint": "new", "complete": true}}'
    rebuilt.write_bytes("data/new.zarr/zarr.json", told.encode())
    evals = manifest.evals | {"brands": brands}
    rebuilt.write_record(path, replace(manifest, evals=evals))
    page = html(rebuilt)
    assert "These figures were recorded when the edit was made." in page
    assert "The search is stale: the evaluation set brands has been rebuilt since." in page
    assert "The best trial of each layer" not in page


def test_several_names_have_a_summary_and_an_article_each(store):
    page = html(store, NAME, "castle")
    outline = Outline(page)
    assert [text for tag, text in outline.headings if tag == "h2"][1] == "castle"
    assert len(outline.all("article")) - 2 == 10  # the rest are example images
    assert "All edits on this page" in page


def test_joint_searches_and_sweeps_are_on_the_pages_of_their_concepts(store, tmp_path):
    shutil.copytree(store.root, tmp_path / "store")
    more = Store(str(tmp_path / "store"))
    fill(more, concept="dog", name="dog")
    fill_several(more, NAME, "castle")
    assert "Forgotten together" not in html(more, "dog")
    page = html(more)
    headings = [text for tag, text in Outline(page).headings if tag == "h3"]
    assert headings[8:10] == ["Forgotten together: mouse+castle", "Sweep: all"]
    assert "All edits in place, each concept on its own images" in page
    assert re.search(r'<tr class="marked"><th scope="row">mouse</th>', page)
    assert HOSTILE not in page
    pointer = more.read_record("gradients/castle.json", GradientPointer)
    more.write_record("gradients/castle.json", replace(pointer, forget=pointer.retain))
    page = html(more)
    assert "The sweep all is stale: the forget gradient of castle has been recomputed" in page
    assert "All edits in place" not in page


def test_verification_and_comparison_are_shown_with_their_verdicts(store, tmp_path):
    page = html(store)
    assert "There is no verification yet. To add it: <code>slsgu verify mouse</code>" in page
    assert "There is no comparison yet. To add it: <code>slsgu compare mouse</code>" in page
    shutil.copytree(store.root, tmp_path / "store")
    more = Store(str(tmp_path / "store"))
    fill_verification(more)
    fill_comparison(more)
    page = html(more)
    for word in (
        "stays forgotten 5",
        "&lt;b&gt;flip&lt;/b&gt;",
        "Where the concept went",
        "castle 36%",
        "Trained on images of the concept again",
        "No other method is at least as good",
        "lr 1e-06",
        "beyond chance. Strongest: ",
        "&lt;i&gt;ubuntu&lt;/i&gt;",
        "100% of its own",
        "its meaning adds +0.0 points",
        "Texts found in place of the name",
        "&lt;b&gt;a mouse&lt;/b&gt;",
        "Classes like the concept",
        "&lt;i&gt;debian&lt;/i&gt; 93.00",
        "Text embeddings of neutral prompts, compared with the original",
        "62.50%",
        "a random change of the same size: 99.0%",
        "<code>wool</code>",
        "Skipped: prefix: its text tower is run as a whole.",
    ):
        assert word in page, word
    assert "a worse text" not in page
    edit = load_edit(more, NAME)
    write_edit(more, replace(edit, header=replace(edit.header, step=0.5)))
    page = html(more)
    assert "The verification is stale: the edit has been remade since." in page
    assert "Where the concept went" not in page


def test_the_style_has_rules_for_print_phones_and_dark_themes(alone):
    for rule in ("@media print", "@page", "prefers-color-scheme: dark", "max-width: 40rem"):
        assert rule in alone
    assert 'name="viewport"' in alone


def channels(colour):
    return [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]


def mixed(one, other, share):
    return [share * a + (1 - share) * b for a, b in zip(one, other, strict=True)]


def luminance(colour):
    """Return the relative luminance as WCAG 2 defines it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_has_contrast_on_every_background(alone):
    style = alone.partition("<style>")[2].partition("</style>")[0]
    for theme in re.findall(r":root \{(.*?)\}", style, re.S)[:2]:
        colours = {name: channels(c) for name, c in re.findall(r"--(\w+): (#\w{6})", theme)}
        grounds = {name: colours[name] for name in ("paper", "faint")}
        strength = float(re.search(r"--strength: ([\d.]+)", theme)[1])
        # The darkest cell of a cosine table.
        cell = mixed(colours["accent"], colours["faint"], strength)
        assert contrast(colours["ink"], cell) >= 4.5
        for ink in ("ink", "muted", "accent"):
            for ground in grounds.values():
                assert contrast(colours[ink], ground) >= 4.5
