import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slsgu_cli.errors import InputError, MissingError
from slsgu_cli.records.options import BuildRequest
from slsgu_cli.records.sets import CollectRequest, Concept, ModelSpec
from slsgu_cli.sets import scan as scan_module
from slsgu_cli.sets.scan import priorities, scan_metadata
from slsgu_cli.sources.concept_index import GROUP, ConceptIndex, Prefilter
from slsgu_cli.sources.matching import matcher

LETTERS = "elonß ELΣσς&;ampé’'-\u2011ﬁK\u0130ı\u200b\xad™\u0301\u2028\0Ｅ½特İſẞ"
CAPTIONS = st.lists(st.none() | st.text(st.sampled_from(LETTERS), max_size=9), max_size=20)
PATTERNS = ["e", "elon", "o-n", "ss", "é", "i", "特", "o n", "fi", "'l", "ο", "σ", "&", "k"]


@settings(deadline=None)
@given(CAPTIONS, st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=4))
def test_the_prefilter_passes_every_caption_that_matches(captions, patterns):
    matches = matcher(patterns)
    found = set(Prefilter(patterns).candidates(pa.array(captions, pa.string())).tolist())
    assert found >= {n for n, text in enumerate(captions) if text and matches(text)}


@pytest.mark.parametrize(
    ("pattern", "caption"),
    [("strasse", "Die Straße"), ("at&t", "an AT&amp;T store"), ("café", "a caf&eacute; here")],
)
def test_the_prefilter_passes_other_notations(pattern, caption):
    assert matcher([pattern])(caption)
    assert Prefilter([pattern]).candidates(pa.array([caption])).tolist() == [0]


def test_the_prefilter_passes_little_else():
    captions = pa.array([f"a picture of number {n}" for n in range(500)] + ["Elon\u00a0Musk"])
    assert Prefilter(["elon musk"]).candidates(captions).tolist() == [500]


def test_more_names_than_one_expression_holds():
    names = [f"name{n}" for n in range(2 * GROUP + 1)]
    captions = pa.array(["none", "name3", "NAME801 too", "name800"])
    assert Prefilter(names).candidates(captions).tolist() == [1, 2, 3]


def rows():
    kinds = ("dog", "cat", "bird")
    return [{"URL": f"http://web/{n}", "TEXT": f"a {kinds[n % 3]} number {n}"} for n in range(90)]


def write(path, table, group=10):
    pq.write_table(
        pa.Table.from_pylist(table) if isinstance(table, list) else table,
        path,
        row_group_size=group,
    )
    return str(path)


def ask(*, concepts=None, url_column="URL", **options):
    """Return a request; without `retain_samples`, one that draws no retain rows."""
    options = options if "retain_samples" in options else {"retain_sources": ("x",), **options}
    concepts = concepts or (Concept("dog", ("dog",)), Concept("cat", ("cat",)))
    collect = CollectRequest(concepts=concepts, metadata=("unused",), url_column=url_column)
    return BuildRequest(name="x", model=ModelSpec("unused"), collect=collect, **options)


def scan(paths, request):
    index = ConceptIndex(request.collect.concepts, request.regex)
    return scan_metadata(paths, request, index, url_column=request.collect.url_column)


def test_rows_of_many_names_are_found_in_one_pass(tmp_path):
    table = rows()
    table[0]["TEXT"] = "a dog and a cat"
    table[3]["TEXT"] = None
    table[6]["URL"] = None
    table[9]["TEXT"] = "a dog that is excluded"
    paths = [write(tmp_path / "a.parquet", table[:45]), write(tmp_path / "b.parquet", table[45:])]
    concepts = (Concept("dog", ("dog",), ("excluded",)), Concept("cat", ("CAT",)))
    found = scan(paths, ask(concepts=concepts))
    assert found.seen == 90
    assert found.no_caption == 1
    assert dict(found.refused) == {(0, "excluded"): 1, (0, "no URL"): 1}
    dogs = [hit for hit in found.hits if 0 in hit.concepts]
    expected = [n for n in range(0, 90, 3) if n not in (3, 6, 9)]
    assert [hit.url for hit in dogs] == [f"http://web/{n}" for n in expected]
    assert {(hit.file, hit.row) for hit in dogs} == {(paths[n > 44], n % 45) for n in expected}
    assert found.hits[0].concepts == (0, 1)
    assert sum(1 in hit.concepts for hit in found.hits) == 31


def test_retain_rows_are_a_seeded_sample_of_the_other_rows(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", rows())
    request = ask(retain_samples=4, retain_exclude=("number 8",))
    found = scan([path], request)
    assert [hit.row for hit in found.retain] != sorted(hit.row for hit in found.retain)
    # All of 30 birds but number 8, for twice four and a thousand are wanted.
    assert sorted(hit.row for hit in found.retain) == [n for n in range(2, 90, 3) if n != 8]
    assert found.retain == scan([path], request).retain
    other = scan([path], ask(retain_samples=4, retain_exclude=("number 8",), seed=1))
    assert [hit.row for hit in other.retain] != [hit.row for hit in found.retain]
    monkeypatch.setattr(scan_module, "POOL", 1 / 1000)
    few = scan([path], ask(retain_samples=4))
    assert {hit.row // 10 for hit in few.retain} < set(range(9))


def test_priorities_are_spread_and_fixed_by_seed_file_and_row():
    first = priorities(0, "s3://b/meta/a.parquet", 0, 4000)
    assert np.array_equal(priorities(0, "/elsewhere/meta/a.parquet", 1000, 10), first[1000:1010])
    assert not np.array_equal(priorities(1, "meta/a.parquet", 0, 10), first[:10])
    assert len(np.unique(first)) == 4000
    assert 0.45 < (first < 2**63).mean() < 0.55


@pytest.mark.parametrize("kind", [pa.large_string(), pa.binary(), pa.dictionary("int32", "string")])
def test_captions_of_any_text_type(tmp_path, kind):
    table = pa.Table.from_pylist(rows())
    captions = pa.array(table["TEXT"].to_pylist(), pa.string())
    typed = captions.dictionary_encode() if pa.types.is_dictionary(kind) else captions.cast(kind)
    path = write(tmp_path / "a.parquet", table.set_column(1, "TEXT", typed))
    assert len(scan([path], ask()).hits) == 60


def test_metadata_on_other_file_systems():
    table = pa.Table.from_pylist(rows())
    with fsspec.open("memory://meta/a.parquet", "wb") as file:
        pq.write_table(table, file)
    assert len(scan(["memory://meta/a.parquet"], ask()).hits) == 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url_column": "link"}, "no column link; its columns are: URL, TEXT"),
        ({"caption_column": "alt"}, "no column alt"),
        ({"caption_column": "number"}, "holds int64, not text"),
    ],
)
def test_wrong_columns_are_errors(tmp_path, options, message):
    table = rows()
    if options.get("caption_column") == "number":
        table = [{**row, "number": 1} for row in table]
    path = write(tmp_path / "a.parquet", table)
    with pytest.raises(InputError, match=message):
        scan([path], ask(**options))


def test_damaged_and_missing_files_are_errors(tmp_path):
    with pytest.raises(MissingError, match="there is no"):
        scan([str(tmp_path / "a.parquet")], ask())
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="cannot be read as parquet"):
        scan([str(tmp_path / "a.parquet")], ask())
