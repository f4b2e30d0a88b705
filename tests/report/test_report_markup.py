from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slsgu_cli.figures.html import Html, element, joined, lines, numeric, table, terms, text


class Seen(HTMLParser):
    """What a parser makes of some markup: its tags, its texts, its attributes."""

    def __init__(self, markup):
        super().__init__(convert_charrefs=True)
        self.tags, self.texts, self.attributes = [], [], []
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.texts.append(data)


@given(st.text(st.characters(exclude_categories=["Cc", "Cs", "Cf"]), min_size=1))
def test_any_text_comes_back_as_text_and_as_an_attribute(value):
    seen = Seen(element("p", value, title=value))
    assert seen.tags == ["p"]
    assert "".join(seen.texts) == value
    assert seen.attributes == [("title", value)]


@settings(max_examples=50)
@given(st.text())
def test_whatever_is_in_a_text_it_opens_no_tag_and_has_an_encoding(value):
    markup = element("td", value, class_=value)
    assert Seen(markup.encode().decode()).tags == ["td"]


def test_what_steers_terminals_or_reorders_text_is_replaced():
    assert text("a\x07b\u202ec\u2066d\u200fe") == "a b\ufffdc\ufffdd\ufffde"
    assert text("\ud800") == "\\ud800"


def test_attributes_are_named_as_html_has_them_and_may_be_left_out():
    assert element("a", "x", class_="c", aria_label="l", href=None, hidden=True) == (
        '<a class="c" aria-label="l" hidden>x</a>'
    )
    assert element("img", alt="") == '<img alt="">'
    assert joined(["<", Html("<br>"), None, ""]) == "&lt;<br>"


def test_a_table_has_a_caption_heads_with_scope_and_figures_on_the_right():
    rows = [("<b>", "1"), ("c", None)]
    markup = table(("name", *numeric("count")), rows, caption="what", marked=[1])
    assert "<caption>what</caption>" in markup
    assert markup.count('scope="col"') == 2
    assert markup.count('scope="row"') == 2
    assert '<td class="fig">1</td>' in markup
    assert '<td class="fig">–</td>' in markup
    assert '<th scope="row">&lt;b&gt;</th>' in markup
    assert markup.count('class="marked"') == 1


def test_a_row_of_another_length_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        table(numeric("a", "b"), [("1", "2", "3")], caption="")


def test_terms_without_a_value_are_left_out():
    markup = terms({"kept": lines(["a", "b"]), "gone": None})
    assert Seen(markup).texts == ["kept", "a", "b"]
