"""A run on several real processes on one machine (gloo), and what happens when one of them is killed in a save.

python -m tests.resume.several --kills 50 --seed 1
"""

import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

from tests.forkserver import LIMIT_S
from tests.resume.harness import Arena, differences, main, newest_checkpoint, whole_rows

RESUMABLE = 75
MAX_WRITES = 25
"""A kill comes at one of this many writes of a process: in the first saves of its life, so that each life gets further."""
UPDATES_EACH = 3


def be_one_of(index, count, port):
    """What a launcher sets for process `index` of `count`; called in the child by the fork server."""
    os.environ.update(
        RANK=str(index), LOCAL_RANK=str(index), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )


def kill_at_write(call, pid_file):
    """Before write number `call` of a save, from this process' first on, SIGKILL the process whose number `pid_file` holds."""
    from resilient_t5.files import FileSystem
    from tests.resume.placing import before

    counter = iter(range(1, 1 << 60))

    def strike(*_):
        if next(counter) == call:
            os.kill(int(Path(pid_file).read_text()), signal.SIGKILL)

    before(FileSystem, "write", strike)


def run_out_of_memory(call):
    """Micro-batch number `call` of this process finds no memory."""
    from resilient_t5.training.update import Updater
    from tests.resume.placing import before

    counter = iter(range(1, 1 << 60))

    def fail(*_):
        if next(counter) == call:
            raise MemoryError("no room")

    before(Updater, "accumulate", fail)


def fall_silent(call, patience_s):
    """Micro-batch number `call` of this process lasts for minutes; no process waits longer than `patience_s` for another."""
    from resilient_t5.training.hardware import process_group
    from resilient_t5.training.update import Updater
    from tests.resume.placing import before

    counter = iter(range(1, 1 << 60))
    process_group.TIMEOUT_S = patience_s
    before(Updater, "accumulate", lambda *_: time.sleep(600) if next(counter) == call else None)


def weigh(place, update):
    """Before the move of attempted update `update`, write into the file `place` what memory this process holds, in bytes.

    Every storage counts once and whole, however small the part of it that is in use.
    """
    from resilient_t5.training.update import Updater
    from tests.resume.placing import before

    counter = iter(range(1 << 60))

    def look(updater, *_):
        if next(counter) != update:
            return
        local_tensors = {
            "weights": [parameter for _, parameter in updater.sharded.named_parameters()],
            "gradients": [parameter.grad for _, parameter in updater.sharded.named_parameters()],
            "states": [value for state in updater.optimizer.state.values() for value in state.values() if value.ndim],
        }
        Path(place).write_text(json.dumps({name: held_bytes(tensors) for name, tensors in local_tensors.items()}))

    before(Updater, "_move", look)


def spoil_rows(update):
    """In attempted update `update` the first value of the gradients that only this process holds is not a number."""
    from resilient_t5.training.hardware.sharding import ShardedModel
    from tests.resume.placing import before

    counter = iter(range(1 << 60))

    def spoil(layers, _):
        if next(counter) == update:
            next(iter(layers.shards.values())).grad.view(-1)[0] = float("nan")

    before(ShardedModel, "gradient_norm", spoil)


def begin_otherwise(shift):
    """This process builds its layers with other first weights."""
    import torch

    from resilient_t5.training import build
    from tests.resume.placing import before

    @torch.no_grad()
    def move(model, *_, **__):
        for parameter in model.decoder.block.parameters():
            parameter.add_(shift)

    before(build, "shard_model", move)


def held_bytes(tensors):
    """Bytes of the storages behind these tensors; of a cut one, behind its own rows."""
    own = [getattr(tensor, "_local_tensor", tensor).untyped_storage() for tensor in tensors if tensor is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in own}.values())


def free_port():
    """A port of this machine that nobody listens on."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def start_together(arena, name, count, *more, before=None, own=None):
    """Start `count` processes of the run `name`; their process ids.

    Args:
        before: {index: faults to place in that process}.
        own: {index: settings that only that process gets}.
    """
    port = free_port()
    return [
        arena.server.start(
            arena.argv(name, *more, *(own or {}).get(index, [])),
            arena.console(name),
            [
                ("tests.resume.several:be_one_of", {"index": index, "count": count, "port": port}),
                *(before or {}).get(index, []),
            ],
        )
        for index in range(count)
    ]


def run_together(arena, name, count, *more, before=None, own=None):
    """Run the processes to their end; their exit statuses, in the order of their indices."""
    return [arena.server.wait(pid) for pid in start_together(arena, name, count, *more, before=before, own=own)]


def attack_lost(server, folder, kills, seed, more=()):
    """R22: one of two processes is killed in a save, again and again; the other leaves, and the run goes on unchanged."""
    started_s, draw, arena = time.monotonic(), random.Random(seed), Arena(server, folder)
    options = ("--schedule.max_updates", str(6 + UPDATES_EACH * kills), "--checkpoint.every_updates", "1", *more)
    assert run_together(arena, "reference", 2, *options) == [0, 0], console(arena, "reference")
    bad, struck, slowest_s = [], 0, 0.0
    while struck < kills:
        victim, call = draw.randrange(2), draw.randint(1, MAX_WRITES)
        pid_file = arena.folder / "victim.pid"
        pid_file.unlink(missing_ok=True)
        fault = ("tests.resume.several:kill_at_write", {"call": call, "pid_file": str(pid_file)})
        pids = start_together(arena, "attacked", 2, *options, before={0: [fault]})
        pid_file.write_text(str(pids[victim]))
        statuses, waited_s = wait_for_both(server, pids, victim)
        if statuses == [0, 0]:  # the run had come to its end before the kill; there is nothing left to strike
            break
        struck += 1
        slowest_s = max(slowest_s, waited_s)
        expected = [RESUMABLE, RESUMABLE]
        expected[victim] = -signal.SIGKILL
        problems = [f"statuses {statuses}"] if statuses != expected else []
        problems += damage(arena.folder / "attacked")
        if problems:
            bad.append({"kill": struck, "victim": victim, "call": call, "problems": problems})
    statuses = run_together(arena, "attacked", 2, *options)
    different = differences(arena.folder / "attacked", arena.folder / "reference") if statuses == [0, 0] else ["no end"]
    figures = {
        "attack": "R22",
        "kills": struck,
        "bad": bad,
        "different": different,
        "slowest_exit_of_the_other_s": round(slowest_s, 2),
        "seconds": round(time.monotonic() - started_s, 1),
    }
    return figures, len(bad) + len(different)


def wait_for_both(server, pids, victim):
    """(Exit statuses, seconds from the end of the victim to that of the other)."""
    ended_s = {}
    statuses = {}
    until = time.monotonic() + 2 * LIMIT_S
    while len(statuses) < 2:
        for index, pid in enumerate(pids):
            if index not in statuses and (status := server.poll(pid)) is not None:
                statuses[index], ended_s[index] = status, time.monotonic()
        if time.monotonic() > until:
            for index, pid in enumerate(pids):
                if index not in statuses:
                    os.kill(pid, signal.SIGKILL)
            raise TimeoutError(f"processes {pids} did not end; ended: {statuses}")
        time.sleep(0.01)
    return [statuses[0], statuses[1]], ended_s[1 - victim] - ended_s[victim]


def damage(run):
    """What is wrong with the checkpoints of a run: a live one that is not whole, or one that was acknowledged and is gone."""
    from resilient_t5.checkpoint.reader import load_checkpoint
    from resilient_t5.errors import NoValidCheckpoint

    found, names = [], sorted(path.name for path in (run / "checkpoints").glob("u*-*"))
    for name in names:
        try:
            load_checkpoint(run / "checkpoints" / name)
        except NoValidCheckpoint as error:
            found.append(f"{name}: {error}")
    acknowledged = [row["q"] for row in whole_rows(run) if row["kind"] == "save" and row["event"] == "save"]
    newest = int(newest_checkpoint(run).name.rpartition("-")[2]) if names else 0
    if newest < max(acknowledged, default=0):
        found.append(f"commit {max(acknowledged)} was acknowledged, the newest is {newest}")
    return found


def console(arena, name):
    """The last lines of a run's console."""
    return arena.console(name).read_text()[-1500:]


def summary(arena, name):
    """summary.json of a run."""
    return json.loads((arena.folder / name / "summary.json").read_text())


if __name__ == "__main__":
    sys.exit(main(attack_lost, ("kills", 5), ("seed", 1)))
