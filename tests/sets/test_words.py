import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from places import DEMO
from tiny_images import sample, write_parquet

from slsgu_cli.errors import InputError, MissingError, NoImagesError, UsageError
from slsgu_cli.records.options import BuildRequest
from slsgu_cli.records.sets import PROMPTS, ModelSpec
from slsgu_cli.records.words import Word, read_words
from slsgu_cli.sets.build import build_sets, replay
from slsgu_cli.sources.neutral import neutral_prompts, neutral_words
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.store import Store

CLIP = ModelSpec(f"local-dir:{DEMO / 'clip'}")
CLASSES = ("dog", "cat", "castle", "rainbow", "git", "github", "heart", "umbrella")
TEMPLATES = ("an icon of {}", "a {} icon", "{}")

pytestmark = pytest.mark.usefixtures("one_tokenizer")


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "store"))


@pytest.fixture
def files(tmp_path):
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    (tmp_path / "templates.txt").write_text("\n".join(TEMPLATES))
    return {
        "classes": {PROMPTS: str(tmp_path / "classes.txt")},
        "templates": {PROMPTS: str(tmp_path / "templates.txt")},
    }


def request(*words, **options):
    return BuildRequest(name="set", model=CLIP, words=words, **options)


def written(tmp_path, text):
    path = tmp_path / "words.txt"
    path.write_text(text)
    return str(path)


def test_a_file_has_words_aliases_and_descriptions(tmp_path):
    path = written(tmp_path, "dog\thound\tpuppy\n\n# description\na barking pet\n# words\ncat\n")
    found = read_words([path, "castle"])
    assert found.words == (Word("dog", ("hound", "puppy")), Word("cat"), Word("castle"))
    assert found.patterns == ("dog", "hound", "puppy", "cat", "castle")
    assert found.descriptions == ("a barking pet",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no words"),
        ("# description\na pet\n", "has no words"),
        ("dog\n\thound\n", "word 2 is blank"),
        ("dog\ncat\tDog\n", "'dog' twice"),
    ],
)
def test_a_file_without_usable_words_is_refused(text, message, tmp_path):
    with pytest.raises(InputError, match=message):
        read_words([written(tmp_path, text)])


def test_a_missing_file_of_words_is_no_word(tmp_path):
    with pytest.raises(MissingError, match="there is no file"):
        read_words([str(tmp_path / "absent.txt")])


def test_rows_of_words_hold_stand_ins(store, files):
    manifest = build_sets(store, request("dog", "cat", **files))
    forget, retain = (DataBlock.open(store, ref) for ref in (manifest.forget, manifest.retain))
    prompts = DataBlock.open(store, manifest.evals[PROMPTS])
    assert forget.captions == [t.replace("{}", n) for n in ("dog", "cat") for t in TEMPLATES]
    others = [t.replace("{}", n) for n in CLASSES[2:] for t in TEMPLATES]
    assert sorted(retain.captions) == sorted(others)
    assert manifest.retain.refused == {"about the concept": 2 * len(TEMPLATES)}
    assert prompts.class_names == CLASSES
    assert [prompts.class_names[label] for label in prompts.labels[::3]] == list(CLASSES)
    assert manifest.words == ("dog", "cat") and manifest.forget_eval == PROMPTS

    # The plain computation, by open_clip alone.
    model = open_clip.create_model(CLIP.name).eval()
    tokenize = open_clip.get_tokenizer(CLIP.name)
    with torch.no_grad():
        kept = F.normalize(model.encode_text(tokenize(retain.captions)), dim=-1)
        for block in (forget, retain, prompts):
            texts = F.normalize(model.encode_text(tokenize(block.captions)), dim=-1)
            expected = F.normalize(texts - kept.mean(dim=0), dim=-1).numpy()
            np.testing.assert_allclose(block.content_of(0, block.rows), expected, atol=1e-5)


def test_rows_of_words_have_no_images(store, files):
    manifest = build_sets(store, request("dog", **files))
    block = DataBlock.open(store, manifest.forget)
    block.verify()
    assert not block.has_images
    for read in (lambda: block.images(0, 1), lambda: block.take([0])):
        with pytest.raises(NoImagesError, match="made from words and has no images"):
            read()


def test_a_set_from_words_is_rebuilt_alike(store, files):
    before = build_sets(store, request("dog", **files))
    assert set(replay(store, "set").same.values()) == {True}
    assert build_sets(store, request("dog", **files)).forget == before.forget


def test_descriptions_are_captions_as_they_are(store, files, tmp_path):
    path = written(tmp_path, "dog\thound\n# descriptions\na barking pet\n")
    manifest = build_sets(store, request(path, **files))
    captions = DataBlock.open(store, manifest.forget).captions
    assert len(captions) == 2 * len(TEMPLATES) + 1 and captions[-1] == "a barking pet"
    fewer = build_sets(store, request(path, max_forget=3, **files))
    assert fewer.forget.rows == 3
    assert fewer.forget.refused == {"beyond --max-forget": len(captions) - 3}
    assert set(DataBlock.open(store, fewer.forget).captions) < set(captions)


def test_neutral_prompts_are_retained_by_default(store, files):
    manifest = build_sets(store, request("dog", templates=files["templates"], retain_samples=50))
    captions = DataBlock.open(store, manifest.retain).captions
    assert len(captions) == 50 and set(captions) < set(neutral_prompts())
    about = sum("dog" in prompt.split() for prompt in neutral_prompts())
    assert manifest.retain.refused == {"about the concept": about}
    names = DataBlock.open(store, manifest.evals[PROMPTS]).class_names
    assert names == neutral_words()


def test_neutral_prompts_are_many_and_distinct():
    prompts = neutral_prompts()
    assert len(set(prompts)) == len(prompts) > 3000
    assert list(neutral_words()) == sorted(set(neutral_words()))


def test_captions_of_a_source_are_retained_without_images(store, files, tmp_path):
    source = tmp_path / "captions.csv"
    rows = ["a red ball", "a dog with a ball", "a blue house", "a red ball"]
    source.write_text(
        "\n".join(["caption,filepath", *(f"{row},{n}.jpg" for n, row in enumerate(rows))])
    )
    manifest = build_sets(store, request("dog", retain_sources=(str(source),), **files))
    assert sorted(DataBlock.open(store, manifest.retain).captions) == ["a blue house", "a red ball"]
    assert manifest.retain.refused["about the concept"] == 1


def test_images_of_a_source_are_matched_by_the_words(store, tmp_path):
    rows = [sample(i, f"a {('dog', 'hound', 'cat')[i % 3]} number {i}") for i in range(12)]
    source = write_parquet(tmp_path / "pairs.parquet", rows, group=4)
    words = written(tmp_path, "dog\thound\n")
    manifest = build_sets(store, request(words, sources=[source], retain_samples=4))
    assert (manifest.forget.rows, manifest.retain.rows) == (8, 4)
    assert manifest.words == ("dog",) and not manifest.words_alone
    assert DataBlock.open(store, manifest.forget).has_images


def test_a_word_without_tokens_is_refused(store, files):
    with pytest.raises(InputError, match="no tokenizer makes a token of '&nbsp;'"):
        build_sets(store, request("dog", "&nbsp;", **files))


@pytest.mark.parametrize("option", [{"match": ("hound",)}, {"regex": True}])
def test_words_replace_patterns(option, store, files):
    with pytest.raises(UsageError, match="--words cannot be combined"):
        build_sets(store, request("dog", **files, **option))


def test_nothing_left_to_retain_is_refused(store, files):
    excluded = [name for name in CLASSES if name != "dog"]
    with pytest.raises(InputError, match="no caption is left to retain"):
        build_sets(store, request("dog", retain_exclude=excluded, **files))


def test_an_attribute_is_forgotten_in_one_thing_only(store, files):
    manifest = build_sets(store, request("red {}", "hat", thing="cat", **files))
    assert (manifest.names, manifest.thing) == (("red cat", "cat with hat"), "cat")
    expected = [t.replace("{}", name) for name in manifest.names for t in TEMPLATES]
    assert list(DataBlock.open(store, manifest.forget).captions) == expected
    retained = set(DataBlock.open(store, manifest.retain).captions)
    for name in ("cat", "red", "hat", "red dog", "dog with hat", "dog cat", "cat with dog"):
        assert {t.replace("{}", name) for t in TEMPLATES} <= retained, name
    assert not retained & set(expected)
    classes = DataBlock.open(store, manifest.evals[PROMPTS]).class_names
    assert {*CLASSES, "red", "red dog", "dog cat", *manifest.names} <= set(classes)
    assert manifest.forget_eval == PROMPTS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thing": " ", "words": ("hat",)}, "' ' is not a thing"),
        ({"thing": "red {}", "words": ("hat",)}, "'red {}' is not a thing"),
        ({"thing": "cat", "sources": ("images",)}, "--from needs --words"),
        ({"thing": "cat", "sources": ("images",), "words": ("hat",)}, "--from needs --words"),
    ],
)
def test_a_thing_needs_words_for_its_attributes(options, message, store):
    with pytest.raises(UsageError, match=message):
        build_sets(store, BuildRequest(name="set", model=CLIP, **options))
