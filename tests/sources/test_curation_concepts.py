import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slsgu_cli.errors import InputError
from slsgu_cli.records.sets import Concept, read_names
from slsgu_cli.sources.concept_index import ConceptIndex
from slsgu_cli.sources.matching import matcher

TEXT = st.text(st.sampled_from("abé ß'-+.特 Σσς&;\u200b™"), min_size=1, max_size=8)
PATTERN = TEXT.filter(lambda text: text.strip("\u200b ™"))


@settings(deadline=None)
@given(st.lists(PATTERN, min_size=1, max_size=6), TEXT)
def test_the_index_finds_what_every_matcher_alone_finds(patterns, caption):
    index = ConceptIndex([Concept(str(n), (p,)) for n, p in enumerate(patterns)])
    alone = [n for n, pattern in enumerate(patterns) if matcher([pattern])(caption)]
    assert index.about(caption) == alone


def test_aliases_and_exclusions():
    mouse = Concept("Mickey Mouse", ("Mickey Mouse", "mickey"), ("mouse pad",))
    index = ConceptIndex([Concept("Donald", ("donald",)), mouse])
    assert index.about("MICKEY and Donald") == [0, 1]
    assert index.excluded(1, "a Mickey mouse pad")
    assert not index.excluded(0, "a Donald mouse pad")
    assert index.mentions_any("any mouse pad")
    assert not index.mentions_any("a mouse")


def test_regular_expressions_are_asked_of_every_caption():
    index = ConceptIndex([Concept("book", ("face.?book",))], regex=True)
    assert index.about("Facebooks") == [0]


def test_names_come_from_a_file(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("# people\nAda Lovelace\tCountess of Lovelace\t!crater\n\nBob\n")
    assert read_names(str(path)) == [
        Concept("Ada Lovelace", ("Ada Lovelace", "Countess of Lovelace"), ("crater",)),
        Concept("Bob", ("Bob",)),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no names"),
        ("Ada\nAda\n", "Ada twice"),
        ("../x\n", "line 1: '../x' cannot name a set"),
        ("Ada\t!\n", "exclusion is blank"),
        (None, "cannot read the names"),
    ],
)
def test_malformed_files_of_names_are_refused(tmp_path, content, message):
    path = tmp_path / "names.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_names(str(path))
