"""Free host memory and peak memory, with fake cgroup trees. Run: python -m pytest tests/test_host_memory.py"""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from resilient_t5.host_memory import available_bytes, peak_mib

NO_LIMIT_V1 = 9223372036854771712


def write_v2(directory: Path, limit: int | str, used: int, inactive: int = 0) -> None:
    """The memory files of a cgroup v2."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "memory.max").write_text(f"{limit}\n")
    (directory / "memory.current").write_text(f"{used}\n")
    (directory / "memory.stat").write_text(f"anon 1\ninactive_file {inactive}\n")


def write_v1(directory: Path, limit: int, used: int, inactive: int = 0) -> None:
    """The memory files of a cgroup v1."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (directory / "memory.usage_in_bytes").write_text(f"{used}\n")
    (directory / "memory.stat").write_text(f"inactive_file 3\ntotal_inactive_file {inactive}\n")


def write_proc(root: Path, text: str) -> None:
    """/proc/self/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(text)


def assert_machine_only(root: Path) -> None:
    """No limit counts, so the result is what the machine has available."""
    assert available_bytes(root) == pytest.approx(psutil.virtual_memory().available, rel=0.5)


def test_a_v2_limit_counts_without_its_usage_and_with_its_inactive_page_cache(tmp_path):
    """The kernel reclaims inactive file pages on demand, so they are free."""
    write_proc(tmp_path, "0::/user.slice/run\n")
    write_v2(tmp_path / "sys/fs/cgroup/user.slice/run", 1000, 700, 50)
    assert available_bytes(tmp_path) == 350


def test_a_v1_limit_counts_without_its_usage_and_with_its_inactive_page_cache(tmp_path):
    """The controller may be mounted together with others."""
    write_proc(tmp_path, "9:cpu,cpuacct:/job\n4:hugetlb,memory:/job\n")
    write_v1(tmp_path / "sys/fs/cgroup/memory/job", 1000, 700, 50)
    assert available_bytes(tmp_path) == 350


def test_the_tighter_limit_of_an_ancestor_decides(tmp_path):
    """A Slurm step inside of a job, or a service inside of a slice."""
    write_proc(tmp_path, "0::/job/step\n4:memory:/slurm/job/step\n")
    write_v2(tmp_path / "sys/fs/cgroup/job/step", "max", 100)
    write_v2(tmp_path / "sys/fs/cgroup/job", 1000, 400)
    assert available_bytes(tmp_path) == 600
    write_v1(tmp_path / "sys/fs/cgroup/memory/slurm/job/step", NO_LIMIT_V1, 100)
    write_v1(tmp_path / "sys/fs/cgroup/memory/slurm/job", 500, 400)
    assert available_bytes(tmp_path) == 100


@pytest.mark.parametrize("path", ["/", "/docker/0123abcd", "/../.."])
@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_a_container_is_read_at_the_mount_point(tmp_path, path, version):
    """With a cgroup namespace its path is `/`; without one /proc shows the path of the host."""
    write_proc(tmp_path, f"4:memory:{path}\n" if version == 1 else f"0::{path}\n")
    write, mount = (write_v1, "sys/fs/cgroup/memory") if version == 1 else (write_v2, "sys/fs/cgroup")
    write(tmp_path / mount, 1000, 700, 50)
    assert available_bytes(tmp_path) == 350


def test_no_limit_leaves_the_memory_of_the_machine(tmp_path):
    """`max` of v2 and the huge number of v1."""
    write_proc(tmp_path, "0::/a\n4:memory:/a\n")
    write_v2(tmp_path / "sys/fs/cgroup/a", "max", 700)
    write_v1(tmp_path / "sys/fs/cgroup/memory/a", NO_LIMIT_V1, 700)
    assert_machine_only(tmp_path)


def test_without_readable_files_the_memory_of_the_machine_counts(tmp_path):
    """No /proc at all, then no cgroup file system."""
    assert_machine_only(tmp_path)
    write_proc(tmp_path, "0::/a\n4:memory:/a\n")
    assert_machine_only(tmp_path)


def test_a_cgroup_above_its_limit_leaves_nothing(tmp_path):
    """Usage may exceed a limit that was lowered."""
    write_proc(tmp_path, "0::/\n")
    write_v2(tmp_path / "sys/fs/cgroup", 1000, 1200)
    assert available_bytes(tmp_path) == 0


def test_the_free_memory_of_this_machine_is_plausible():
    """More than nothing, and at most what the machine has."""
    assert 0 < available_bytes() <= psutil.virtual_memory().total


def test_the_peak_is_that_of_this_process_or_of_an_ended_child():
    """Fresh interpreters, so that no earlier test counts."""
    code = (
        "import subprocess, sys\n"
        "from resilient_t5.host_memory import peak_mib\n"
        "subprocess.run([sys.executable, '-c', 'x = bytearray(150 << 20)'], check=True)\n"
        "print(peak_mib(), peak_mib(include_children=True))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    own, with_children = map(float, done.stdout.split())
    assert 5 < own < 100 < 150 < with_children
    assert peak_mib() > 5
