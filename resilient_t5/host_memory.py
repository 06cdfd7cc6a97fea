"""Host memory: how much this process can still allocate, and its peak so far."""

import resource
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil

V1_FILES = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2_FILES = ("memory.max", "memory.current", "inactive_file")
"""Names of the limit file, of the usage file, and of the entry of memory.stat with the reclaimable page cache."""


def available_bytes(root: Path = Path("/")) -> int:
    """Bytes of main memory that this process can still allocate.

    The minimum of what the machine has available and of what the memory limit of this process's cgroup and of each of its
    ancestors leaves (cgroup v1 and v2). Inactive page cache counts as free, since the kernel reclaims it on demand.

    Args:
        root: directory that contains `proc` and `sys`; the cgroup file systems are expected below sys/fs/cgroup.
    """
    free = [psutil.virtual_memory().available]
    for directory, (limit, usage, inactive) in _memory_cgroups(root):
        try:
            allowed = int((directory / limit).read_text(encoding="ascii"))
            used = int((directory / usage).read_text(encoding="ascii"))
            statistics = dict(line.split() for line in (directory / "memory.stat").read_text(encoding="ascii").splitlines())
        except (OSError, ValueError):  # not visible in this mount, or no limit ("max")
            continue
        free.append(allowed - used + int(statistics.get(inactive, 0)))
    return max(0, min(free))


def _memory_cgroups(root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Possible directories of this process's memory cgroup and its ancestors, each with the file names of its version.

    In a container the path in /proc may be that of the host, while the mount point shows the container's own cgroup;
    the walk therefore always includes the mount point.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, files = root / "sys/fs/cgroup", V2_FILES
        elif "memory" in controllers.split(","):
            mount, files = root / "sys/fs/cgroup/memory", V1_FILES
        else:
            continue
        cgroup = PurePosixPath(path.lstrip("/"))
        if ".." not in cgroup.parts:  # a cgroup outside of this namespace
            yield from ((mount / ancestor, files) for ancestor in (cgroup, *cgroup.parents) if ancestor.parts)
        yield mount, files


def peak_mib(*, include_children: bool = False) -> float:
    """Peak resident memory of this process so far, in MiB.

    Args:
        include_children: return the peak of an ended child process where that is higher.
    """
    peak = _own_peak_mib()
    return max(peak, _max_rss_mib(resource.RUSAGE_CHILDREN)) if include_children else peak


def _own_peak_mib() -> float:
    # getrusage inherits the peak of the process that forked this one; the high-water mark in /proc does not.
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 1024
    except (OSError, StopIteration):
        return _max_rss_mib(resource.RUSAGE_SELF)


def _max_rss_mib(who: int) -> float:
    peak = resource.getrusage(who).ru_maxrss
    return peak / (1 << 20) if sys.platform == "darwin" else peak / 1024  # bytes on macOS, KiB elsewhere
