"""Runs that are interrupted at random moments, again and again, against runs that were left alone.

python -m tests.resume.exact --runs 200 --interruptions 10 --seed 1
"""

import os
import random
import shutil
import signal
import sys
import time
from itertools import product

from tests.resume.harness import Arena, differences, main

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
VARIANTS = [
    (optimizer, readers, micro_tokens)
    for optimizer, readers, micro_tokens in product(("adamw", "adafactor"), (0, 2), (300, 4000))
]
"""Two optimizers, no reader thread and two, several micro-batches an update and one."""
MAX_STARTS = 400
UPDATES_EACH = 5
"""Updates of a run for each interruption that it is to get, so that there is something left to interrupt."""


def attack_exact(server, folder, runs, interruptions, seed):
    """R7: every interrupted run ends in the digest of the run that was left alone."""
    begin_s, draw, arena = time.monotonic(), random.Random(seed), Arena(server, folder)
    reach = 0.8
    references, lengths_s, sent, different = {}, {}, dict.fromkeys((s.name for s in SIGNALS), 0), []
    for number in range(runs):
        variant = VARIANTS[number % len(VARIANTS)]
        options = [*options_of(variant), "--schedule.max_updates", str(max(18, UPDATES_EACH * interruptions))]
        if variant not in references:
            name = "reference-" + "-".join(map(str, variant))
            if not references:  # the first run of all makes the store, which is no part of the length
                shutil.rmtree(arena.finish("warm", *options))
            started_s = time.monotonic()
            references[variant] = arena.finish(name, *options)
            lengths_s[variant] = time.monotonic() - started_s
        name = f"run-{number}"
        # A run that ends before it got all its signals says that they come too late, and the other way round.
        done = interrupt_until_done(arena, name, options, interruptions, reach * lengths_s[variant], draw, sent)
        reach = reach * 0.7 if done < interruptions else min(0.8, reach * 1.1)
        found = differences(arena.folder / name, references[variant])
        if found:
            different.append({"run": number, "variant": variant, "differs": found})
        else:
            shutil.rmtree(arena.folder / name)
            arena.console(name).unlink()
    figures = {
        "attack": "R7",
        "runs": runs,
        "interruptions": sum(sent.values()),
        "signals": sent,
        "identical": runs - len(different),
        "different": different,
        "seconds": round(time.monotonic() - begin_s, 1),
    }
    return figures, len(different)


def options_of(variant):
    """The settings of a variant."""
    optimizer, readers, micro_tokens = variant
    lr = "0.002" if optimizer == "adamw" else "0.01"
    return [
        "--optim.name", optimizer, "--optim.lr", lr, "--batch.readers", str(readers), "--batch.micro_tokens", str(micro_tokens)
    ]  # fmt: skip


def interrupt_until_done(arena, name, options, interruptions, latest_s, draw, sent):
    """Start the run, signal it at a random moment, and again, until it has had `interruptions`; then let it finish.

    Returns how many it got.
    """
    for done in range(MAX_STARTS):
        pid = arena.server.start(arena.argv(name, *options), arena.console(name))
        number = draw.choice(SIGNALS)
        if done < interruptions:
            time.sleep(latest_s * draw.uniform(0.02, 1.0))
        status = arena.server.poll(pid) if done < interruptions else arena.server.wait(pid)
        if status is None:
            os.kill(pid, number)
            status = arena.server.wait(pid)
        if status == 0:  # it was faster than the signal, or there was none
            return done
        assert status in (-number, 130), f"exit {status} after {number.name}: {console(arena, name)}"
        sent[number.name] += 1
    raise AssertionError(f"{name} did not end in {MAX_STARTS} starts: {console(arena, name)}")


def console(arena, name):
    """The last lines of a run's console."""
    return arena.console(name).read_text()[-1500:]


if __name__ == "__main__":
    sys.exit(main(attack_exact, ("runs", 10), ("interruptions", 4), ("seed", 1)))
