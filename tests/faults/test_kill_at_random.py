"""SIGKILL at random moments of a loop that saves after every update, again and again on the same run directory.

The loop acknowledges an update on a pipe only after its save returned. Set RESILIENT_T5_KILLS for more kills.

python -m pytest tests/faults/test_kill_at_random.py
"""

import os
import random
import signal
import time

import pytest

from resilient_t5.checkpoint.lock import RunLock
from resilient_t5.checkpoint.writer import Writer
from tests.checkpoint.harness import is_exactly, leftovers, make_manager, make_parts, valid_updates

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("RESILIENT_T5_KILLS", "100"))
MAX_S = 0.05


def save_after_every_update(directory, background, acknowledge):
    """What a training process does, without the training."""
    with RunLock(directory):
        manager = make_manager(directory, keep_last=3)
        manager.sweep()
        loaded = manager.load_newest()
        assert loaded is None or is_exactly(loaded, loaded.update)
        writer = Writer(manager, background=background, available_bytes=lambda: 2**40)
        update = loaded.update if loaded else 0
        while True:
            update += 1
            writer.submit(make_parts(update, metric=1.0 / update), best=update % 3 == 0, must=True)
            for committed in writer.drain():
                acknowledge(committed.update)


def start(directory, background):
    """A child that saves until it is killed; (its process id, a descriptor with its acknowledgements)."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            save_after_every_update(directory, background, lambda update: os.write(writing, b"%d\n" % update))
        finally:
            os._exit(1)
    os.close(writing)
    return pid, reading


def test_no_kill_loses_an_acknowledged_save_or_leaves_a_part(scratch, record_property):
    """After each kill every live checkpoint is complete, no acknowledged one is lost, and the next process resumes."""
    draw, acknowledged, saves = random.Random(5), 0, 0
    for kill in range(KILLS):
        pid, acknowledgements = start(scratch / "run", background=kill % 2 == 1)
        with os.fdopen(acknowledgements, "rb") as stream:
            first = [stream.readline() for _ in range(2)]
            time.sleep(draw.random() * MAX_S)
            os.kill(pid, signal.SIGKILL)
            commits = [int(line) for line in first + stream.readlines() if line.endswith(b"\n")]
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        assert len(commits) >= 2, "the child died by itself"
        assert commits[0] >= acknowledged + 1
        assert commits == list(range(commits[0], commits[0] + len(commits)))
        acknowledged, saves = commits[-1], saves + len(commits)
        found = valid_updates(scratch / "run")
        assert max(found.values()) in (acknowledged, acknowledged + 1)
        assert len(found) >= 3
        best = max(found.values()) // 3 * 3
        assert best in found.values() or best == 0, "the best is gone"
    make_manager(scratch / "run").sweep()
    assert leftovers(scratch / "run") == []
    record_property("trials", KILLS)
    record_property("saves_acknowledged", saves)
