"""Cost of the training loop outside forward, backward, optimizer and evaluation, as a share of an update.

Two runs alternate on the same updates and examples. One uses the loop of bin/train with its reader thread, counters, spike
guard, metric rows, TensorBoard and console. The other has its micro-batches in memory and only runs the mathematics of the
updates. The difference in time is the overhead. Evaluations and saves are excluded on both sides.

    python benchmarks/loop_overhead.py --config configs/quickstart.yaml [--section.key value ...]
"""

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from resilient_t5.checkpoint.manager import CheckpointManager
from resilient_t5.config.parse import parse_config
from resilient_t5.config.schema import Config
from resilient_t5.data.store.prepare import prepare
from resilient_t5.training.build import build_run
from resilient_t5.training.loop import train
from resilient_t5.training.run import Run
from resilient_t5.training.schedule import learning_rate
from resilient_t5.training.signals import StopSignal
from resilient_t5.training.telemetry.console import Console
from resilient_t5.training.telemetry.run_log import RunLog

ROUNDS = 7
UPDATES = 20


def open_run(config: Config, directory: Path) -> Run:
    """Create a run in `directory`; both sides share the store."""
    directory.mkdir()
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(directory)))
    store = prepare(config, directory.parent / "store")
    log = RunLog(Console("quiet", directory / "train.log"), directory, tensorboard=config.telemetry.tensorboard)
    manager = CheckpointManager(directory, run_id="0" * 32, settings=config.checkpoint, audit=log.checkpoint_event)
    return build_run(config, store, manager, None, log)


def loop_s(run: Run, updates: int) -> float:
    """Seconds of the next `updates` updates in the loop, without evaluations and saves."""
    excluded = ("evaluation", "save")
    plan = dataclasses.replace(run.plan, total_updates=run.state.update + updates)
    before_s = sum(run.timing.spent_s.get(activity, 0.0) for activity in excluded)
    started_s = time.perf_counter()
    with StopSignal() as stop:
        train(dataclasses.replace(run, plan=plan), stop)
    spent_s = time.perf_counter() - started_s
    return spent_s - sum(run.timing.spent_s.get(activity, 0.0) for activity in excluded) + before_s


def bare_s(run: Run, updates: int) -> float:
    """Seconds of the mathematics of the next `updates` updates."""
    first = run.state.attempted
    prepared = [run.batches.at(number) for number in range(first, first + updates)]
    started_s = time.perf_counter()
    rate = learning_rate(run.state.update, run.plan, run.config, run.convergence, run.guard)
    results = [run.updater(found, number, rate, lambda: False) for number, found in enumerate(prepared, first)]
    spent_s = time.perf_counter() - started_s
    for result in results:
        assert result is not None
        run.state.count(result)
    return spent_s


def main(argv: Sequence[str]) -> int:
    """Print a table and one line of JSON."""
    config = parse_config(argv, "benchmark", "Overhead of the training loop.")
    evaluation = dataclasses.replace(config.evaluation, every=10**9, examples=1, restore_examples=0)
    checkpoint = dataclasses.replace(config.checkpoint, every_minutes=None, every_updates=None)
    config = dataclasses.replace(config, evaluation=evaluation, checkpoint=checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        looped, bare = open_run(config, Path(folder) / "loop"), open_run(config, Path(folder) / "bare")
        loop_s(looped, UPDATES)
        bare_s(bare, UPDATES)
        waited_before_s = looped.timing.spent_s["wait"]
        rounds = [(loop_s(looped, UPDATES), bare_s(bare, UPDATES)) for _ in range(ROUNDS)]
        waited_s = looped.timing.spent_s["wait"] - waited_before_s
        looped.prefetcher.close()
        looped.log.close()
    shares = [1.0 - bare_round_s / loop_round_s for loop_round_s, bare_round_s in rounds]
    for (loop_round_s, bare_round_s), share in zip(rounds, shares, strict=True):
        sys.stdout.write(
            f"loop {1000 * loop_round_s / UPDATES:8.2f} ms/update"
            f" | bare {1000 * bare_round_s / UPDATES:8.2f} | {100 * share:6.2f} %\n"
        )
    result = {
        "benchmark": "loop_overhead",
        "updates": UPDATES * ROUNDS,
        "loop_update_ms": 1000 * statistics.median(r[0] for r in rounds) / UPDATES,
        "bare_update_ms": 1000 * statistics.median(r[1] for r in rounds) / UPDATES,
        "overhead_share": statistics.median(shares),
        "data_wait_share": waited_s / sum(r[0] for r in rounds),
    }
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
