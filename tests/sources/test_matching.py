import re
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slsgu_cli.errors import UsageError
from slsgu_cli.sources.matching import before_names, folded, matcher

WORDS = st.text(st.sampled_from("ab C+.#é1"), min_size=1, max_size=6).map(str.strip).filter(bool)
GLUE = st.sampled_from([" ", "  ", ", ", "-", "!", "", "x", "_", "\n", "9"])


def word_character(text: str) -> bool:
    return bool(re.fullmatch(r"\w", text))


def stands_alone(caption: str, word: str) -> bool:
    """Whole-word search spelled out by hand."""
    low, wanted = caption.lower(), word.lower()
    for start in range(len(low) - len(wanted) + 1):
        end = start + len(wanted)
        before, after = low[start - 1 : start], low[end : end + 1]
        if low[start:end] == wanted and not word_character(before) and not word_character(after):
            return True
    return False


@given(st.lists(st.tuples(GLUE, WORDS), min_size=1, max_size=5), GLUE, WORDS.filter(str.split))
def test_whole_words_agree_with_a_search_by_hand(parts, tail, word):
    caption = unicodedata.normalize("NFC", "".join(glue + text for glue, text in parts) + tail)
    word = " ".join(word.split())
    squeezed = " ".join(caption.split())
    if " " not in word:
        assert matcher([word])(caption) == stands_alone(caption, word)
    elif stands_alone(squeezed, word):
        assert matcher([word])(squeezed)


NAMES = st.sampled_from(["cat", "cats", "a cat", "c++", "特斯", "特斯拉", "at", "é"])


@given(st.lists(NAMES, min_size=2, max_size=5), st.lists(st.tuples(GLUE, NAMES), max_size=4))
def test_many_names_match_if_one_of_them_does(names, parts):
    caption = "".join(glue + text for glue, text in parts)
    assert matcher(names)(caption) == any(matcher([name])(caption) for name in names)


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("cat", "A CAT, sitting", "a category"),
        ("c++", "learn C++ today", "abc++"),
        (".net", "the .NET runtime", "asp.net"),
        ("google play", "Google  Play store", "googleplay"),
        ("a.b", "an a.b thing", "an axb thing"),
        ("beyoncé", "BEYONCE\u0301 on stage", "beyonce"),
        ("straße", "the STRASSE at night", "a strasbourg street"),
        ("google", "the ＧＯＯＧＬＥ logo", "ｇｏｏｇｌｅｐｌａｙ"),
        ("google", "Google™ and Google\u00ae", "googletm"),
        ("google", "goo\u00adgle maps", "goo-gle maps"),
        ("at&t", "an AT&amp;T store, AT&amp;amp;T", "at t"),
        ("mcdonald's", "a McDONALD\u2019S sign", "mcdonalds"),
        ("spider-man", "Spider\u2011Man, spider\u2013man", "spiderman"),
        ("ΣΊΣΥΦΟΣ", "ο σίσυφος", "σίσυφοι"),
        ("特斯拉", "一辆特斯拉汽车", "特斯"),
        ("tesla", "新款Tesla汽车", "teslacoil"),
        ("राम", "राम का घर", "रामायण"),
    ],
)
def test_names_with_odd_edges_match(pattern, yes, no):
    test = matcher([pattern])
    assert test(yes)
    assert not test(no)


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Mn", "Mc"]), max_size=12))
def test_folding_twice_changes_nothing(text):
    # Entities aside: resolving them may make new ones.
    text = text.replace("&", "")
    assert folded(folded(text)) == folded(text)


def test_regular_expressions_see_readable_text():
    assert matcher([r"caf\u00e9s?\b"], regex=True)("ＣＡＦＥ\u0301S &amp; bars")
    assert matcher(["(?-i:Apple)"], regex=True)("an Apple")
    assert not matcher(["(?-i:Apple)"], regex=True)("an apple")


def test_any_pattern_is_enough_and_none_matches_nothing():
    assert matcher(["dog", "cat"])("one cat")
    assert not matcher([])("anything")


def test_regex_matches_parts_of_words_whatever_the_case():
    assert matcher(["face.?book"], regex=True)("FaceBooks")
    assert matcher(["(a)\\1", "(b)\\1"], regex=True)("xbb")


def test_bad_patterns_are_usage_errors():
    with pytest.raises(UsageError, match="not a regular expression"):
        matcher(["("], regex=True)
    with pytest.raises(UsageError, match="blank"):
        matcher(["  "])
    with pytest.raises(UsageError, match="blank"):
        matcher(["\u00ad"])


def test_prefixes_stand_before_the_name_in_turn():
    captions = ["An icon of GitHub", "githubs and github", "no name", "\u0130 of github"]
    found = before_names(captions, ["github", "git hub"], ["x y", "z"], shift=1)
    # What folding makes longer has no place that is the caption's own.
    assert found == [
        "An icon of z GitHub",
        "githubs and x y github",
        "no z name",
        "\u0130 of x y github",
    ]
    assert before_names(["one", ""], ["github"], ["z"]) == ["z one", "z "]
