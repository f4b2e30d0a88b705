import pytest

from slsgu_cli.errors import InputError, MissingError, UsageError
from slsgu_cli.targets.generate import Prompt, read_prompts
from slsgu_cli.targets.judge import class_in

NAMES = ("star", "sea star", "github", "c++")


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("an icon of a star", "star"),
        ("A Sea-Star!", "sea star"),
        ("starfish", None),
        ("the GitHub logo", "github"),
    ],
)
def test_the_class_of_a_prompt_is_the_longest_name_in_it(text, label):
    assert class_in(text, NAMES) == label


def test_prompts_of_the_line_come_before_those_of_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a github icon\n\nsomething that shines\tstar\n")
    found = read_prompts(["a facebook icon"], file, NAMES, "facebook")
    assert found == [
        Prompt("a facebook icon", "facebook"),
        Prompt("a github icon", "github"),
        Prompt("something that shines", "star"),
    ]


def test_a_class_the_judge_does_not_know_is_refused_with_its_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a github icon\na moon\tmoon\n")
    with pytest.raises(InputError, match="line 2: 'moon'"):
        read_prompts([], file, NAMES, "facebook")


def test_a_missing_prompt_and_a_missing_file_are_errors(tmp_path):
    with pytest.raises(UsageError, match="there is no prompt"):
        read_prompts([], None, NAMES, "facebook")
    with pytest.raises(MissingError, match="no file of prompts"):
        read_prompts([], tmp_path / "none.txt", NAMES, "facebook")
