import pytest
from hypothesis import given
from hypothesis import strategies as st

from slsgu_cli.clip.inputs import spare
from slsgu_cli.errors import UsageError
from slsgu_cli.records.words import bytes_of


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1000000", 1_000_000),
        ("0", 0),
        ("4G", 4 << 30),
        ("4g", 4 << 30),
        ("512MiB", 512 << 20),
        ("512 MB", 512 << 20),
        (" 1.5K ", 1536),
        ("2T", 2 << 40),
        ("7B", 7),
    ],
)
def test_sizes_as_people_write_them(text, size):
    assert bytes_of("--memory-budget", text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "4X", "4 G G", "1e9", "4,5G", "nan", "4GiBs"])
def test_what_is_no_size_is_told(text):
    with pytest.raises(UsageError, match="is not a size") as error:
        bytes_of("--memory-budget", text)
    assert repr(text) in str(error.value)
    assert "4G" in error.value.hint


@given(st.integers(0, 10**15))
def test_bytes_are_taken_as_they_are(size):
    assert bytes_of("--memory-budget", str(size)) == size


def test_spare_memory_of_a_cpu_is_a_part_of_it():
    assert 0 < spare("cpu") < 1 << 50
