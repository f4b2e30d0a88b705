import pytest
from hypothesis import given
from hypothesis import strategies as st

from slsgu_cli.clip.memory import spare
from slsgu_cli.errors import UsageError
from slsgu_cli.machine import free_memory
from slsgu_cli.records.option_fields import bytes_of


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
def test_sizes_with_units_are_parsed(text, size):
    assert bytes_of("--memory-budget", text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "4X", "4 G G", "1e9", "4,5G", "nan", "4GiBs"])
def test_malformed_sizes_are_reported(text):
    with pytest.raises(UsageError, match="is not a size") as error:
        bytes_of("--memory-budget", text)
    assert repr(text) in str(error.value)
    assert "4G" in error.value.hint


@given(st.integers(0, 10**15))
def test_bytes_are_used_as_stored(size):
    assert bytes_of("--memory-budget", str(size)) == size


def test_spare_memory_is_a_fraction_of_free_memory():
    assert 0 < spare("cpu") < 1 << 50


@pytest.fixture
def machine(tmp_path):
    """A machine of 16 GB that are free, told as Linux does; it lays further files."""

    def lay(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    lay({"proc/meminfo": f"MemTotal: 1 kB\nMemFree: 2 kB\nMemAvailable: {16 << 20} kB\n"})
    return lay


def test_free_memory_includes_the_file_cache(machine):
    assert free_memory(machine({})) == 16 << 30


def test_memory_limits_are_unknown_on_other_systems(tmp_path):
    assert free_memory(tmp_path) is None


def test_a_container_has_its_limit_minus_its_memory_without_files(machine):
    root = machine(
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": f"{4 << 30}\n",
            "sys/fs/cgroup/memory.current": f"{3 << 30}\n",
            "sys/fs/cgroup/memory.stat": f"anon 1\ninactive_anon 5\ninactive_file {1 << 30}\n",
        }
    )
    assert free_memory(root) == 2 << 30


def test_the_smallest_limit_of_all_parent_groups_counts(machine):
    group = "sys/fs/cgroup/memory/jobs"
    root = machine(
        {
            "proc/self/cgroup": "9:cpu,cpuacct:/\n4:memory:/jobs/mine\n0::/\n",
            f"{group}/mine/memory.limit_in_bytes": f"{(1 << 63) - 4096}\n",
            f"{group}/mine/memory.usage_in_bytes": "4096\n",
            f"{group}/memory.limit_in_bytes": f"{2 << 30}\n",
            f"{group}/memory.usage_in_bytes": f"{3 << 30}\n",
            f"{group}/memory.stat": f"inactive_file 7\ntotal_inactive_file {(1 << 30) + 5}\n",
        }
    )
    assert free_memory(root) == 5


@pytest.mark.parametrize("limit", ["max\n", ""])
def test_a_group_without_a_limit_has_the_machines_memory(limit, machine):
    root = machine(
        {
            "proc/self/cgroup": "0::/user.slice\n",
            "sys/fs/cgroup/user.slice/memory.max": limit,
            "sys/fs/cgroup/user.slice/memory.current": "4096\n",
        }
    )
    assert free_memory(root) == 16 << 30
