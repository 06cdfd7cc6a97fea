"""The ballast on a disk that fills up: python -m pytest tests/checkpoint/test_ballast.py"""

import errno
from pathlib import Path

import pytest

from resilient_t5.checkpoint.manager import BALLAST
from resilient_t5.checkpoint.writer import Writer
from resilient_t5.errors import DiskFull
from resilient_t5.files import FileSystem
from tests.checkpoint.harness import is_exactly, live_names, make_parts, make_vault

CAPACITY = 100_000


class SmallDisk(FileSystem):
    """A disk of CAPACITY bytes that holds `directory` and what others wrote; with `quota`, free space is not told."""

    def __init__(self, directory: Path, *, quota: bool = False):
        super().__init__()
        self.directory, self.quota, self.of_others = directory, quota, 0

    def left(self) -> int:
        """Bytes that are really free."""
        own = sum(path.stat().st_size for path in self.directory.rglob("*") if path.is_file())
        return CAPACITY - self.of_others - own

    def free_bytes(self, path):
        return CAPACITY if self.quota else max(0, self.left())

    def allocate(self, file, size):
        if size > self.left():
            raise OSError(errno.EDQUOT if self.quota else errno.ENOSPC, "full", str(file.path))
        super().allocate(file, size)


def run_on(directory, **options):
    """A small disk, a writer of ours on it, the ballast's path and the events."""
    disk, events = SmallDisk(directory, quota=options.pop("quota", False)), []
    manager = make_vault(directory, fs=disk, events=events, **options)
    manager.reserve_bytes = 4096  # of checkpoints this small, what is beside the tensors is the larger part
    return disk, Writer(manager, background=False), directory / "checkpoints" / BALLAST, events


def save(writer, update, reason="periodic"):
    """One save of the writer."""
    writer.submit(make_parts(update, reason=reason), best=False, must=True)
    return writer.poll()


@pytest.mark.parametrize("quota", [False, True])
def test_the_save_of_a_signal_takes_the_place_of_the_ballast_when_the_disk_is_full(tmp_path, quota):
    """A periodic save leaves the ballast alone; the last one has its room, and is whole; the next run makes a new one."""
    disk, writer, ballast, _ = run_on(tmp_path, ballast=True, quota=quota)
    save(writer, 1)
    assert ballast.stat().st_size >= sum(path.stat().st_size for path in (tmp_path / "checkpoints").glob("u*/*"))
    disk.of_others += disk.left()
    assert save(writer, 2) == [] and ballast.exists()
    assert [committed.update for committed in save(writer, 3, "signal")] == [3]
    assert not ballast.exists() and live_names(tmp_path)[-1].startswith("u00000003")
    disk.of_others = 0
    _, resumed, _, _ = run_on(tmp_path, ballast=True)
    assert is_exactly(make_vault(tmp_path).load_newest(), 3)
    save(resumed, 4)
    assert ballast.exists()


def test_without_a_ballast_the_save_of_a_signal_fails_on_a_full_disk(tmp_path):
    """The disk of the test above really is full."""
    disk, writer, ballast, _ = run_on(tmp_path)
    save(writer, 1)
    disk.of_others += disk.left()
    with pytest.raises(DiskFull):
        save(writer, 3, "signal")
    assert not ballast.exists() and len(live_names(tmp_path)) == 1


def test_a_ballast_never_takes_the_room_of_the_next_checkpoint(tmp_path):
    """Where both do not fit there is none, told once, and saving goes on."""
    disk, writer, ballast, events = run_on(tmp_path, ballast=True)
    disk.of_others = CAPACITY - 10_500
    for update in (1, 2, 3):
        assert [committed.update for committed in save(writer, update)] == [update]
    assert not ballast.exists() and [kind for kind, _ in events].count("ballast_failed") == 1
