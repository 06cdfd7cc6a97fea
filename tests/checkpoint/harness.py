"""Tiny checkpoints whose content is a function of their update, and processes that are killed at a given call."""

import os
import signal
import traceback
from pathlib import Path

import torch

from resilient_t5.checkpoint.manager import CheckpointManager, Parts
from resilient_t5.checkpoint.reader import read_directory
from resilient_t5.config.schema import CheckpointConfig
from resilient_t5.files import FileSystem

RUN_ID = "0123456789abcdef"


def make_parts(update, *, reason="periodic", metric=None, health=None):
    """The parts of `update`: two files, shared memory, four dtypes, a zero-dimensional and an empty tensor."""
    generator = torch.Generator().manual_seed(update)
    weight = torch.randn(3, 2, generator=generator)
    return Parts(
        update=update,
        tensors={
            "model": {"shared": weight, "lm_head": weight, "scale": torch.tensor(update, dtype=torch.bfloat16)},
            "optimizer": {
                "shared/exp_avg": torch.randn(3, 2, generator=generator),
                "shared/count": torch.tensor(update, dtype=torch.int64),
                "bytes": torch.arange(update % 5, dtype=torch.uint8),
            },
        },
        state={"update": update, "history": [update * 0.1, None, "x"], "nested": {"nan": float("inf")}},
        reason=reason,
        health={"finite": True} if health is None else health,
        fingerprints={"config_sha": "c", "data_sha": "d", "tokenizer_sha": "t"},
        metric=metric,
    )


def is_exactly(loaded, update):
    """Whether a loaded checkpoint holds every value and dtype of `make_parts(update)`."""
    expected = make_parts(update)
    return loaded.update == update and loaded.state == expected.state and same_tensors(loaded.tensors, expected.tensors)


def same_tensors(one, other):
    """Equal names, shapes, dtypes and bytes."""
    return one.keys() == other.keys() and all(
        one[stem].keys() == other[stem].keys()
        and all(
            one[stem][name].dtype == other[stem][name].dtype
            and one[stem][name].shape == other[stem][name].shape
            and torch.equal(one[stem][name].reshape(-1).view(torch.uint8), other[stem][name].reshape(-1).view(torch.uint8))
            for name in one[stem]
        )
        for stem in one
    )


def make_manager(directory, *, keep_last=2, fs=None, events=None, kind=CheckpointManager, **options):
    """A manager that appends its events to the list `events` as (kind, fields)."""
    settings = CheckpointConfig(keep_last=keep_last, **options)
    log = [] if events is None else events
    return kind(
        Path(directory), run_id=RUN_ID, settings=settings, fs=fs, audit=lambda *event: log.append(event), reserve_bytes=0
    )


def commit(manager, *updates):
    """Save these updates."""
    for update in updates:
        manager.save(make_parts(update), best=False)


def live_names(directory):
    """Names of checkpoint directories, oldest commit first."""
    names = [path.name for path in (Path(directory) / "checkpoints").glob("u*-*")]
    return sorted(names, key=lambda name: int(name.split("-")[1]))


def valid_updates(directory):
    """{commit number: update} of the live directories; fails at a wrong content under a valid hash."""
    updates = {}
    for name in live_names(directory):
        loaded = read_directory(FileSystem(), Path(directory) / "checkpoints" / name, RUN_ID)
        assert is_exactly(loaded, loaded.update), f"{name} verifies and holds something else"
        updates[loaded.commit_number] = loaded.update
    return updates


def leftovers(directory):
    """Temporaries and trash of dead saves, anywhere in the run directory."""
    return [str(path) for path in Path(directory).rglob("*") if path.name.startswith((".tmp-", ".trash-"))]


class CountingHook:
    """Counts calls of the hook and calls `action` at number `at`; also records the names of the operations."""

    def __init__(self, at=None, action=None, moments=("before", "after")):
        self.at, self.action, self.moments = at, action, moments
        self.operations = []

    def __call__(self, moment, operation, arguments):
        if moment not in self.moments:
            return
        self.operations.append((moment, operation))
        if len(self.operations) - 1 == self.at:
            self.action()


def die():
    """End this process as kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


def in_child(function):
    """Run `function(write)` in a forked process; returns (wait status as an exit code, the bytes it wrote)."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        code = 1
        try:
            function(lambda data: os.write(writing, data))
            code = 0
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        written = stream.read()
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), written
