from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slsgu_cli.report.sections import Column, Table, absent, codes, figures, tables, texts


class Seen(HTMLParser):
    """The tags that a parser finds in some markup."""

    def __init__(self, markup):
        super().__init__(convert_charrefs=True)
        self.tags = []
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_no_text_opens_a_tag_and_all_have_an_encoding(value):
    markup = tables(Table(value, texts(value), [(value,)]))
    tags = ["div", "table", "caption", "thead", "tr", "th", "tbody", "tr", "th"]
    assert Seen(markup.encode().decode()).tags == tags


@pytest.mark.parametrize("kind", ["", "figure", "code", "link"])
def test_every_kind_of_cell_is_escaped(kind):
    table = Table("caption", [*texts("name"), Column("value", kind)], [("a", "<b>"), ("b", None)])
    markup = tables(table)
    assert "&lt;b&gt;" in markup and "<b>" not in markup
    assert "–" in markup


def test_characters_that_reorder_text_are_replaced():
    markup = absent("title", "a\x07b\u202ec\u2066d\u200fe \ud800", "run").content
    assert "a b\ufffdc\ufffdd\ufffde \\ud800" in markup


def test_a_table_has_a_caption_heads_with_scope_and_figures_on_the_right():
    rows = [("a", "1", ("x", "y")), ("c", None, "z")]
    columns = [*texts("name"), *figures("count"), *codes("digest")]
    markup = tables(Table("numbers", columns, rows, marked=[1]))
    assert "<caption>numbers</caption>" in markup
    assert markup.count('scope="col"') == 3
    assert markup.count('scope="row"') == 2
    assert '<td class="fig">1</td>' in markup
    assert '<td class="fig">–</td>' in markup
    assert '<span class="line"><code>x</code></span>' in markup
    assert markup.count('class="marked"') == 1


def test_a_row_of_another_length_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        tables(Table("", figures("a", "b"), [("1", "2", "3")]))
