"""How long a run takes to leave after a signal, in every phase, and with which status.

python -m tests.resume.exits --trials 1000 --seed 1
"""

import json
import random
import shutil
import signal
import statistics
import sys
import time

from tests.resume.harness import Arena, committed_update, main, metric_rows, whole_rows

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PLACES = {
    "preparing": (1, 1),
    "starting": (1, 1),
    "micro-batch": (1, 60),
    "evaluation": (1, 3),
    "generation": (1, 20),
    "save": (1, 40),
    "disk wait": (2, 4),
    "export": (1, 2),
}
"""Where the signal strikes, and in which calls of that place."""
LIMITED = ("micro-batch", "evaluation", "generation", "save")
"""Where the goal of a micro-batch, the write and SPARE_S is meant; while a corpus or a model is read there is no such unit."""
SPARE_S = 0.1


def attack_exits(server, folder, trials, seed):
    """R10: from the signal to the exit of the process within a micro-batch, the write and 0.1 s; the status is the signal."""
    started_s, draw, arena = time.monotonic(), random.Random(seed), Arena(server, folder)
    shutil.rmtree(arena.finish("warm", "--schedule.max_updates", "2"))
    found = {place: [] for place in PLACES}
    limits = []
    bad = {"wrong_codes": [], "unsaved": [], "hangs": []}
    for trial in range(trials):
        place = list(PLACES)[trial % len(PLACES)]
        number, call = draw.choice(SIGNALS), draw.randint(*PLACES[place])
        seconds, problem = one_exit(arena, f"run-{trial}", place, number, call)
        if seconds is not None and place in LIMITED:
            limits.append((seconds, allowed_s(arena.folder / f"run-{trial}")))
        if problem is not None:
            bad[problem[0]].append({"place": place, "signal": number.name, "call": call, "what": problem[1]})
        elif seconds is not None:
            found[place].append(seconds)
            shutil.rmtree(arena.folder / f"run-{trial}")
    all_s = [seconds for group in found.values() for seconds in group]
    figures = {
        "attack": "R10",
        "trials": trials,
        "struck": len(all_s),
        "late": sum(seconds > allowed for seconds, allowed in limits),
        "limited": len(limits),
        "phases": {place: spread(group) for place, group in found.items() if group},
        **spread(all_s),
        **{name: len(items) for name, items in bad.items()},
        "bad": bad,
        "seconds": round(time.monotonic() - started_s, 1),
    }
    return figures, sum(map(len, bad.values()))


def one_exit(arena, name, place, number, call):
    """One run that gets one signal; (seconds to the exit or None when it never struck, what went wrong)."""
    stamp = arena.folder / f"{name}.stamp"
    argv = arena.argv(name)
    if place == "preparing":
        argv = [*argv, "--data.store", arena.folder / f"{name}-store"]
    if place == "disk wait":
        argv = [*argv, "--checkpoint.on_disk_full", "wait"]
    arguments = {"place": place, "number": int(number), "call": call, "stamp": str(stamp)}
    pid = arena.server.start(argv, arena.console(name), [("tests.resume.placing:signal_at", arguments)])
    status, ended_s = arena.server.wait_timed(pid)
    if status is None:
        return None, ("hangs", "killed as it did not end")
    if not stamp.exists():
        return None, None
    seconds = ended_s - json.loads(stamp.read_text())
    stamp.unlink()
    # A run that was writing its exports had finished: it may end as it would have, or be stopped.
    if status != -number and not (place == "export" and status == 0):
        return seconds, ("wrong_codes", f"{status}: {arena.console(name).read_text()[-500:]}")
    if place not in ("preparing", "disk wait"):
        saved_updates = [row["saved_update"] for row in whole_rows(arena.folder / name) if row["kind"] == "signal"]
        done = max([row["update"] for row in metric_rows(arena.folder / name, "train")], default=0)
        if committed_update(arena.folder / name) < max([*saved_updates, done]):
            return seconds, ("unsaved", f"committed {committed_update(arena.folder / name)}, done {done}")
    arena.console(name).unlink()
    return seconds, None


def allowed_s(run):
    """A micro-batch, the write, and the spare time, as this run measured them itself."""
    writes_s = [row["save_s"] for row in whole_rows(run) if row["kind"] == "save" and row["event"] == "save"]
    updates_s = [row["update_s"] for row in whole_rows(run) if row["kind"] == "train"]
    return max(writes_s, default=0.0) + max(updates_s, default=0.05) + SPARE_S


def spread(values_s):
    """Median, p99 and maximum."""
    ordered = sorted(values_s)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    median_s, p99_s, max_s = (round(value, 4) for value in (statistics.median(ordered), p99, ordered[-1]))
    return {"n": len(ordered), "median_s": median_s, "p99_s": p99_s, "max_s": max_s}


if __name__ == "__main__":
    sys.exit(main(attack_exits, ("trials", 50), ("seed", 1)))
