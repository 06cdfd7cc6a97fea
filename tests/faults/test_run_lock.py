"""Eight processes start on one run directory: one trains, the others leave with 69; and a kill frees the lock.

Set RESILIENT_T5_STARTS for more rounds.

python -m pytest tests/faults/test_run_lock.py
"""

import os
import signal
import time

import pytest

from resilient_t5.checkpoint.lock import RunLock
from resilient_t5.errors import RunHeld, StorageError
from tests.checkpoint.harness import in_child

pytestmark = pytest.mark.slow

STARTERS = 8
ROUNDS = int(os.environ.get("RESILIENT_T5_STARTS", "20"))


def start_together(directory, ready):
    """A child that waits for the signal to start, then holds the lock until it is killed, or leaves with 69."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.read(ready, 1)
        code = 1
        try:
            with RunLock(directory):
                os.write(writing, b"won %d\n" % os.getpid())
                time.sleep(60)
        except RunHeld as error:
            code = int(error.exit_code)
            os.write(writing, b"held\n")
        finally:
            os._exit(code)
    os.close(writing)
    return pid, reading


def test_of_eight_starters_exactly_one_wins(scratch, record_property):
    """In every round one process holds the lock, seven leave with 69, and kill -9 of the winner frees it."""
    for number in range(ROUNDS):
        directory = scratch / f"run-{number}"
        ready, go = os.pipe()
        started = [start_together(directory, ready) for _ in range(STARTERS)]
        os.write(go, b"x" * STARTERS)
        answers = [os.read(reading, 100).split()[0] for _, reading in started]
        assert answers.count(b"won") == 1
        assert answers.count(b"held") == STARTERS - 1
        winner = started[answers.index(b"won")][0]
        with pytest.raises(RunHeld, match=f"process {winner} on"), RunLock(directory):
            pass
        os.kill(winner, signal.SIGKILL)
        codes = sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid, _ in started)
        assert codes == [-signal.SIGKILL, *[69] * (STARTERS - 1)]
        with RunLock(directory) as lock:
            assert lock.is_exclusive
        for descriptor in (ready, go, *(reading for _, reading in started)):
            os.close(descriptor)
    record_property("trials", ROUNDS)


def test_a_forked_worker_does_not_keep_the_run_held(scratch):
    """The worker of a killed process lives on for a while; the next process can start all the same."""
    reading, writing = os.pipe()
    holder = os.fork()
    if holder == 0:
        with RunLock(scratch):
            if os.fork() == 0:
                # Reported by the worker itself: until it has run for the first time its copy of the lock counts.
                os.write(writing, b"%d" % os.getpid())
                time.sleep(30)
                os._exit(0)
            time.sleep(30)
        os._exit(0)
    worker = int(os.read(reading, 20))
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    with RunLock(scratch) as lock:
        os.kill(worker, 0)  # still alive, and the lock is ours all the same
        assert lock.is_exclusive
    os.kill(worker, signal.SIGKILL)


def test_a_worker_that_ends_does_not_free_the_lock_of_its_parent(scratch):
    """Closing the child's copy must not give the parent's lock up."""
    with RunLock(scratch):
        assert in_child(lambda write: None)[0] == 0
        with pytest.raises(RunHeld), RunLock(scratch):
            pass


def test_a_lock_that_was_given_up_can_be_taken_again(scratch):
    """The file stays, the lock does not."""
    for _ in range(3):
        with RunLock(scratch / "run"):
            assert (scratch / "run" / "run.lock").exists()
    assert (scratch / "run" / "run.lock").exists()


@pytest.mark.parametrize("body", [b"", b"\xff\x00", b"[]", b'{"pid": "x"}', b'{"pid": NaN}', b"{" * 5000])
def test_a_damaged_lock_file_is_only_a_worse_message(scratch, body):
    """The content of the file is informative only; the lock is the kernel's."""
    with RunLock(scratch):
        (scratch / "run.lock").write_bytes(body)
        with pytest.raises(RunHeld, match="another process"), RunLock(scratch):
            pass


def test_a_link_in_the_place_of_the_lock_file_is_refused(scratch):
    """Nothing outside the run directory is written."""
    (scratch / "elsewhere").write_text("keep")
    (scratch / "run.lock").symlink_to(scratch / "elsewhere")
    with pytest.raises(StorageError, match="ELOOP"), RunLock(scratch):
        pass
    assert (scratch / "elsewhere").read_text() == "keep"
