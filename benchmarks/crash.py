"""Attack five checkpointing systems: kill -9 while they save after every update, and damage to the newest save.

    python benchmarks/crash.py [--trials 100] [--damages 50] [--systems resilient_t5 dcp_folders ...] [--json FILE]

Kill: a forked child trains and saves after every update. It gets SIGKILL at a random moment within 0.35 s after its fourth
acknowledged save. Then the system's own resume call runs in a new process. Bad outcomes:
  unrecoverable   the call raises, although at least four saves were acknowledged
  mixed           weights, optimizer, random state and update number are not those of one update
  lost            the state is intact but older than the last acknowledged save
The kills hit in or near a save, so the percentages rank the systems; they are not failure rates of real runs.

Damage: one random file of the newest checkpoint gets one flipped bit, is truncated, has its tail zeroed, or is removed. Then
the same resume call runs. Bad outcomes:
  wrong           a state that was never saved is returned, whether or not a warning is logged
  dies            the call raises, although an older checkpoint is intact
A call that raises when there is no older checkpoint is counted separately. Harmless damage (to a file that the resume does not
read) and an older intact state are not counted as bad.

The file is rewritten after each system and keeps the results of the others, so a table can be made in several calls.

All files are in memory (/dev/shm) where available: a kill does not depend on the disk, and the disk is spared.
The last line is JSON. benchmarks/crash_systems.py has the calls of each system.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from crash_systems import FOREVER, SYSTEMS, System, reference_digests

MAX_S = 0.35
SAVES_FIRST = 4
DIGESTS = 600
MEMORY = Path("/dev/shm")
PACKAGES = ("torch", "transformers", "accelerate", "safetensors")


def start(function: Callable[[Callable[[str], None]], None]) -> tuple[int, Any]:
    """Fork a child that runs `function(send)` without a console. Return its process id and the stream of the lines it sends."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reading)
            null = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1, 2):
                os.dup2(null, descriptor)
            function(lambda line: os.write(writing, line.encode() + b"\n"))
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    return pid, os.fdopen(reading, "rb")


def call(function: Callable[[], Any]) -> Any:
    """Return the result of `function()` in a forked child, through JSON; None if it raised or died."""
    pid, stream = start(lambda send: send(json.dumps(function())))
    with stream:
        lines = stream.read().splitlines()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return json.loads(lines[0]) if code == 0 else None


class Judge:
    """Run a system's resume call and classify its result."""

    def __init__(self, digests: list[str]):
        self.digests = digests

    def resumed(self, system: System, directory: Path, path: Path | None = None) -> int | str:
        """Return the update of an intact state, "dies" if the call raised, or "mixed" for parts of two updates."""
        loaded = call(lambda: system.resume(directory, path))
        if loaded is None:
            return "dies"
        update, digest = loaded
        intact = 1 <= update <= len(self.digests) and self.digests[update - 1] == digest
        return update if intact else "mixed"

    def older_loads(self, system: System, directory: Path) -> bool:
        """Whether a checkpoint other than the newest loads intact when it is named explicitly."""
        return any(isinstance(self.resumed(system, directory, path), int) for path in system.checkpoints(directory)[-2::-1])


def kill_once(system: System, directory: Path, wait_s: float, judge: Judge) -> str:
    """Run one kill and return the name of its outcome."""

    def train(send: Callable[[str], None]) -> None:
        system.train(directory, lambda update: send(str(update)), FOREVER)

    pid, stream = start(train)
    with stream:
        first = [stream.readline() for _ in range(SAVES_FIRST)]
        time.sleep(wait_s)
        os.kill(pid, signal.SIGKILL)
        acknowledged = [int(line) for line in [*first, *stream.readlines()] if line.endswith(b"\n")]
    os.waitpid(pid, 0)
    if len(acknowledged) < SAVES_FIRST:
        raise RuntimeError(f"{system.name}: the child died without a kill after {len(acknowledged)} saves")
    resumed = judge.resumed(system, directory)
    if resumed == "dies":
        return "unrecoverable_older_whole" if judge.older_loads(system, directory) else "unrecoverable"
    if resumed == "mixed":
        return "mixed"
    return "lost" if int(resumed) < acknowledged[-1] else "good"


def kill_many(system: System, trials: int, scratch: Path, judge: Judge) -> dict[str, Any]:
    """Run `trials` kills and count the outcomes."""
    draw, outcomes, started_s = random.Random(3), Counter(), time.monotonic()
    for number in range(trials):
        directory = scratch / f"kill-{number}"
        directory.mkdir()
        outcomes[kill_once(system, directory, draw.random() * MAX_S, judge)] += 1
        shutil.rmtree(directory)
    bad = trials - outcomes["good"]
    return {
        "trials": trials,
        "bad": bad,
        "unrecoverable": outcomes["unrecoverable"] + outcomes["unrecoverable_older_whole"],
        "unrecoverable_although_an_older_one_loads_by_hand": outcomes["unrecoverable_older_whole"],
        "mixed": outcomes["mixed"],
        "acknowledged_save_lost": outcomes["lost"],
        "bad_share": bad / trials,
        "bad_share_below_95": bound(bad, trials),
        "wall_s": round(time.monotonic() - started_s, 1),
    }


def flip_a_bit(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, draw: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: draw.randrange(len(data))])


def zero_the_tail(path: Path, draw: random.Random) -> None:
    data = path.read_bytes()
    keep = draw.randrange(len(data))
    path.write_bytes(data[:keep] + bytes(len(data) - keep))


def remove(path: Path, draw: random.Random) -> None:
    path.unlink()


DAMAGES = {"flipped_bit": flip_a_bit, "truncated": truncate, "zeroed_tail": zero_the_tail, "missing_file": remove}


def damage_many(system: System, trials: int, scratch: Path, judge: Judge) -> dict[str, Any]:
    """Damage the newest of three saves `trials` times in each way, and count the outcomes by kind."""
    base, draw, result = scratch / "base", random.Random(4), {}
    base.mkdir()
    if call(lambda: system.train(base, lambda update: None, 3)) is None and not system.checkpoints(base):
        raise RuntimeError(f"{system.name}: nothing was saved")
    if judge.resumed(system, base) != 3:
        raise RuntimeError(f"{system.name}: an undamaged save does not load intact")
    for kind, damage in DAMAGES.items():
        outcomes = Counter(damage_once(system, base, scratch / "copy", (damage, draw), judge) for _ in range(trials))
        bad = outcomes["wrong"] + outcomes["dies_older_whole"]
        result[kind] = {
            "trials": trials,
            "bad": bad,
            "wrong_state_accepted": outcomes["wrong"],
            "dies_although_an_older_one_is_whole": outcomes["dies_older_whole"],
            "dies_nothing_older": outcomes["dies"],
            "fell_back": outcomes["fell_back"],
            "harmless": outcomes["harmless"],
            "bad_share_below_95": bound(bad, trials),
        }
    shutil.rmtree(base)
    return result


def damage_once(
    system: System, base: Path, copy: Path, damage: tuple[Callable[[Path, random.Random], None], random.Random], judge: Judge
) -> str:
    """Damage a copy of `base` once and return the name of the outcome."""
    shutil.copytree(base, copy)
    newest, draw = system.checkpoints(copy)[-1], damage[1]
    files = [newest] if newest.is_file() else sorted(path for path in newest.rglob("*") if path.is_file())
    damage[0](draw.choice([path for path in files if path.stat().st_size]), draw)
    resumed = judge.resumed(system, copy)
    if resumed == "dies":
        outcome = "dies_older_whole" if judge.older_loads(system, copy) else "dies"
    elif resumed == "mixed":
        outcome = "wrong"
    else:
        outcome = "harmless" if resumed == 3 else "fell_back"
    shutil.rmtree(copy)
    return outcome


def bound(bad: int, trials: int) -> float:
    """Upper end of the 95 % interval of a share: 3/N for zero, otherwise Wilson's interval."""
    if bad == 0:
        return min(1.0, 3 / trials)
    share, z = bad / trials, 1.96
    middle, spread = share + z**2 / (2 * trials), (share * (1 - share) / trials + z**2 / (4 * trials**2)) ** 0.5
    return min(1.0, (middle + z * spread) / (1 + z**2 / trials))


def main() -> int:
    """Attack the selected systems; print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100, help="kills per system")
    parser.add_argument("--damages", type=int, default=50, help="damages of each kind per system")
    parser.add_argument("--systems", nargs="+", default=[system.name for system in SYSTEMS])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {
        "benchmark": "crash",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "in_memory": os.access(MEMORY, os.W_OK),
        "systems": json.loads(options.json.read_text())["systems"] if options.json and options.json.exists() else {},
    }
    judge = Judge(call(lambda: reference_digests(DIGESTS)))
    with tempfile.TemporaryDirectory(dir=MEMORY if result["in_memory"] else None) as folder:
        for system in SYSTEMS:
            if system.name not in options.systems:
                continue
            kills = kill_many(system, options.trials, Path(folder), judge)
            damages = damage_many(system, options.damages, Path(folder), judge)
            result["systems"][system.name] = {"how": system.how, "kill": kills, "damage": damages}
            counts = "  ".join(f"{kind} {damage['bad']:>3}" for kind, damage in damages.items())
            sys.stdout.write(f"{system.name:>24}  kills {kills['bad']:>3} of {kills['trials']} bad  | {counts}  bad\n")
            sys.stdout.flush()
            if options.json:
                options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
