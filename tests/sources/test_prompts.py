import pytest
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

from slsgu_cli.errors import InputError
from slsgu_cli.sources.prompts import (
    class_indices,
    find_class,
    parse_classes,
    parse_templates,
    read_classes,
    read_templates,
)


def test_read_templates_are_those_of_open_clip():
    templates = read_templates("imagenet")
    assert len(templates) == 80
    assert all(t.count("{}") == 1 for t in templates)
    said = [template("tench") for template in OPENAI_IMAGENET_TEMPLATES]
    assert [t.format("tench") for t in templates] == said
    assert len(read_templates("imagenet-simple")) == 7
    assert read_templates("celeba") == ("{}.",)


def test_without_a_list_labels_are_the_names():
    names, index = class_indices(None, {"dog", "elon_musk", "cat"})
    assert names == ("cat", "dog", "elon musk")
    assert index == {"cat": 0, "dog": 1, "elon_musk": 2}
    assert read_classes("celeba") is None


def test_imagenet_by_index_name_and_folder():
    imagenet = read_classes("imagenet")
    assert imagenet.names == tuple(IMAGENET_CLASSNAMES)
    assert class_indices(imagenet, {"0", "999", "1000"})[1] == {"0": 0, "999": 999}
    assert class_indices(imagenet, {"Goldfish", "nonsense"})[1] == {"Goldfish": 1}
    folders = {f"n{number:08d}" for number in range(5, 5005, 5)}
    assert class_indices(imagenet, folders)[1]["n00000010"] == 1
    with pytest.raises(InputError, match="999 of ImageNet's 1000"):
        class_indices(imagenet, set(sorted(folders)[1:]))


def test_a_file_of_names():
    classes = parse_classes("tench\n\n Gold fish \n", "names.txt")
    assert classes.names == ("tench", "Gold fish")
    assert class_indices(classes, {"gold_fish"})[1] == {"gold_fish": 1}
    assert class_indices(classes, {"1", "7"})[1] == {"1": 1}
    with pytest.raises(InputError, match=r"no label is a class of names\.txt.*'zebra'"):
        class_indices(classes, {"zebra"})


def test_digits_in_names_are_not_taken_for_indices():
    classes = parse_classes("9\n8\n", "digits")
    assert class_indices(classes, {"8", "9"})[1] == {"8": 1, "9": 0}


def test_a_file_of_labels_and_names():
    classes = parse_classes("n01\ttench\nn02\tgoldfish\nn03\ttench\n", "map")
    assert classes.names == ("tench", "goldfish")
    assert class_indices(classes, {"n03", "n02", "x"})[1] == {"n03": 0, "n02": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty"),
        ("a\tb\nc\n", "1 of 2 lines have a tab"),
        ("a\nb\na\n", "line 3: 'a' appears twice"),
        ("a\tx\na\ty\n", "line 2"),
    ],
)
def test_bad_class_files(text, message):
    with pytest.raises(InputError, match=message):
        parse_classes(text, "file")


def test_templates_from_a_file():
    assert parse_templates("a {}.\n\n the {} \n", "t") == ("a {}.", "the {}")
    with pytest.raises(InputError, match=r"t, line 2: 'no slot' contains \{\} 0 times"):
        parse_templates("a {}.\nno slot\n", "t")
    with pytest.raises(InputError, match="2 times"):
        parse_templates("{} and {}", "t")
    with pytest.raises(InputError, match="no templates"):
        parse_templates("\n", "t")


def test_the_concept_is_found_whatever_its_case():
    assert find_class(["cat", "Elon Musk"], "elon_musk") == 1
    assert find_class(["cat"], "dog") is None
