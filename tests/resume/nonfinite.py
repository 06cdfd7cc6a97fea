"""A value that is not finite in a real run: in the loss, a gradient, a weight, the optimizer, a metric, or a useless batch.

python -m tests.resume.nonfinite --trials 500 --seed 1
"""

import json
import math
import random
import shutil
import sys
import time

from safetensors import safe_open

from tests.resume.harness import CONFIG, Arena, main, whole_rows

SHORT = (
    CONFIG.replace("max_updates: 18", "max_updates: 12")
    .replace("every: 5, examples: 8, restore_examples: 2", "every: 3, examples: 4, restore_examples: 0")
    .replace("every_updates: 2", "every_updates: 2, keep_last: 60, background: false")
    .replace("window_updates: 3", "window_updates: 1, readers: 0")
)
"""Every commit stays on disk, so that each one can be looked at."""
PLACES = ("loss", "gradient", "parameter", "optimizer", "metric", "ignored", "range")
VALUES = ("nan", "inf", "-inf")
FOR_GOOD = 1000


def attack_nonfinite(server, folder, trials, seed):
    """R17: none is committed, the best stays what it was, and the run skips, rolls back or gives up as it is meant to."""
    started_s, draw, arena = time.monotonic(), random.Random(seed), Arena(server, folder, SHORT)
    clean = arena.finish("clean")
    best = json.loads((clean / "summary.json").read_text())["best"]
    counts = dict.fromkeys(("committed_non_finite", "best_not_finite", "wrong_outcome", "rows_without_raw_value"), 0)
    places, bad = dict.fromkeys(PLACES, 0), []
    for trial in range(trials):
        place = PLACES[trial % len(PLACES)]
        updates = draw.choice((1, 3, 5, FOR_GOOD)) if place not in ("parameter", "optimizer", "metric") else 1
        first = draw.randint(1, 9) if place != "metric" else draw.randint(1, 4)
        spoil = {"place": place, "update": first, "value": draw.choice(VALUES), "updates": updates}
        found = one_injection(arena, f"run-{trial}", spoil, best)
        places[place] += 1
        for name in found:
            counts[name] += 1
        if found:
            bad.append({**spoil, "found": found})
    figures = {
        "attack": "R17",
        "trials": trials,
        "places": places,
        **counts,
        "bad": bad,
        "seconds": round(time.monotonic() - started_s, 1),
    }
    return figures, len(bad)


def one_injection(arena, name, spoil, clean_best):
    """One run with one injection; {what was wrong: details}, empty when all is as it must be."""
    faults = [("tests.resume.placing:spoil", spoil)]
    status = arena.server.run(arena.argv(name), arena.console(name), faults)
    run, found = arena.folder / name, {}
    for checkpoint in (run / "checkpoints").glob("u*-*"):
        if not all_finite(checkpoint):
            found["committed_non_finite"] = checkpoint.name
    summary = json.loads((run / "summary.json").read_text())
    if summary["best"] is None or not isinstance(summary["best"]["loss"], float) or not math.isfinite(summary["best"]["loss"]):
        found["best_not_finite"] = summary["best"]
    rows = [row for row in whole_rows(run) if row["kind"] == "guard"]
    if not outcome_is_right(spoil, status, rows, run, summary, clean_best):
        found["wrong_outcome"] = f"exit {status}: {arena.console(name).read_text()[-600:]}"
    if any(row["loss"] is None or not row["examples"] for row in rows if row["action"] == "skip"):
        found["rows_without_raw_value"] = True
    if not found:
        shutil.rmtree(run)
        arena.console(name).unlink()
    return found


def outcome_is_right(spoil, status, rows, run, summary, clean_best):
    """Skipped, rolled back, given up, or for a metric nothing at all: what the guard promises for this injection."""
    actions = [row["action"] for row in rows]
    if spoil["place"] == "metric":
        kept = spoil["update"] != 4 or summary["best"]["update"] < 12  # the clean run's best is its last evaluation
        return status == 0 and actions == [] and (summary["best"] == clean_best or not kept or spoil["update"] < 4)
    if spoil["updates"] == FOR_GOOD and spoil["update"] + 4 * 4 <= FOR_GOOD:
        return (
            status == 70 and actions.count("rolled back") == 3 and actions[-1] == "abort" and (run / "diagnosis.json").exists()
        )
    if spoil["updates"] > 3 or spoil["place"] in ("parameter", "optimizer"):
        return status == 0 and actions.count("rolled back") == 1
    return status == 0 and actions == ["skip"] * spoil["updates"]


def all_finite(checkpoint):
    """Whether every number of a checkpoint is finite."""
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors = (file.get_tensor(name) for name in file.keys())  # noqa: SIM118  not a dict
            if any(tensor.is_floating_point() and not tensor.isfinite().all() for tensor in tensors):
                return False
    return True


if __name__ == "__main__":
    sys.exit(main(attack_nonfinite, ("trials", 100), ("seed", 1)))
