"""Cost of saving: stall of the loop, slow-down of the updates, write and read speed, memory of a resume.

    python benchmarks/checkpoint_io.py [--rounds 12] [--large_mib 500] [--resumes 3] [--only stall speed memory] [--json FILE]

stall    a real run of configs/quickstart.yaml; blocks of updates with one save at the start alternate with blocks without.
         The stall is the time for which the loop waits (for the copy). The total cost adds all CPU seconds of a save, measured
         while training is paused, as an upper bound for the slow-down. Both as a share of training with one save per minute.
         The difference in wall time of the blocks is given too; on a busy machine it is mostly noise.
speed    a synthetic state of --large_mib on the disk of the temporary folder: stall of a background save, of a synchronous one,
         and a load with verification, compared with a plain write and fsync of as many bytes.
memory   bin/train: peak memory of a process that resumed, relative to one that did the same updates from the start; at
         quickstart size, and with a model whose state is far larger than the program, with and without the writer thread.

The last line is JSON.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from circumstances import write_json

from resilient_t5.checkpoint.manager import CheckpointManager, Parts
from resilient_t5.checkpoint.writer import Writer
from resilient_t5.config.parse import parse_config
from resilient_t5.config.schema import CheckpointConfig
from resilient_t5.data.store.prepare import prepare
from resilient_t5.training.build import build_run
from resilient_t5.training.loop import train
from resilient_t5.training.run import Run
from resilient_t5.training.signals import StopSignal
from resilient_t5.training.telemetry.console import Console
from resilient_t5.training.telemetry.run_log import RunLog

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
UPDATES = 15
MINUTE_S = 60.0
LARGE = {
    "data.sample_notes": 300,
    "model.d_model": 512,
    "model.d_ff": 2048,
    "model.num_layers": 6,
    "model.num_heads": 8,
    "batch.examples_per_update": 2,
    "schedule.max_updates": 8,
    "checkpoint.every_updates": 2,
}
MEMORY_RUNS = {
    "quickstart": {"schedule.max_updates": 40, "checkpoint.every_updates": 10},
    "large_background": {**LARGE, "checkpoint.background": "true"},
    "large_synchronous": {**LARGE, "checkpoint.background": "false"},
}


def open_run(directory: Path) -> Run:
    """A run of the quickstart without evaluations, and with no save but those that are asked for."""
    config = parse_config(["--config", str(QUICKSTART)], "benchmark", "Cost of saving.")
    config = dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, dir=str(directory)),
        evaluation=dataclasses.replace(config.evaluation, every=10**9, examples=1, restore_examples=0),
        checkpoint=dataclasses.replace(config.checkpoint, every_minutes=None, every_updates=None),
        schedule=dataclasses.replace(config.schedule, max_updates=10**6),
        telemetry=dataclasses.replace(config.telemetry, log_every=10**6),
    )
    directory.mkdir(parents=True)
    log = RunLog(Console("quiet", directory / "train.log"), directory, tensorboard=config.telemetry.tensorboard)
    manager = CheckpointManager(directory, run_id="0" * 32, settings=config.checkpoint, audit=log.checkpoint_event)
    store = prepare(config, directory.parent / "store")
    return build_run(config, store, manager, None, log)


def block(run: Run, saves: bool) -> dict[str, float]:
    """Do a block of updates, its first pass with a save or without."""
    plan = dataclasses.replace(run.plan, total_updates=run.state.update + UPDATES)
    stalled_s = run.timing.spent_s.get("save", 0.0)
    started_s = time.perf_counter()
    with StopSignal() as stop:
        stop.save_requested = saves
        train(dataclasses.replace(run, plan=plan), stop)
    spent_s = time.perf_counter() - started_s
    run.saver.writer.drain()
    return {"wall_s": spent_s, "stall_s": run.timing.spent_s.get("save", 0.0) - stalled_s}


def save_cpu_s(run: Run) -> float:
    """CPU seconds of one save, from the copy to the commit, with nothing else going on."""
    started_s = time.process_time()
    with StopSignal() as stop:
        run.saver.save("asked", stop)
    run.saver.writer.drain()
    return time.process_time() - started_s


def measure_stall(folder: Path, rounds: int) -> dict[str, Any]:
    """Blocks with and without a save in turns."""
    run = open_run(folder / "stall" / "run")
    block(run, True)
    pairs, worked_s = [], []
    for number in range(rounds):
        order = (True, False) if number % 2 else (False, True)
        found = {saves: block(run, saves) for saves in order}
        pairs.append((found[True], found[False]))
        block(run, False)
        worked_s.append(save_cpu_s(run))
    newest = run.manager.newest
    run.prefetcher.close()
    run.saver.writer.close()
    run.log.close()
    stall_s = statistics.median(saving["stall_s"] for saving, _ in pairs)
    save_s = statistics.median(worked_s)
    extra_wall_s = statistics.median(saving["wall_s"] - plain["wall_s"] for saving, plain in pairs)
    return {
        "checkpoint_mib": newest.bytes / 2**20 if newest else 0.0,
        "saves": len(pairs),
        "update_ms": 1000 * statistics.median(plain["wall_s"] for _, plain in pairs) / UPDATES,
        "stall_ms": 1000 * stall_s,
        "stall_max_ms": 1000 * max(saving["stall_s"] for saving, _ in pairs),
        "extra_wall_ms": 1000 * extra_wall_s,
        "save_cpu_ms": 1000 * save_s,
        "stalled_share_at_a_save_a_minute": stall_s / MINUTE_S,
        "whole_cost_share_at_a_save_a_minute": (stall_s + save_s) / MINUTE_S,
    }


def large_parts(mib: int, update: int) -> Parts:
    """A state of `mib`: a third weights, the rest the two moments of AdamW, in matrices of 4 MiB."""
    matrices = max(1, mib // 12)
    made = {f"layer.{number}": torch.full((1024, 1024), float(number + update)) for number in range(matrices)}
    moments = {f"{name}/{key}": tensor * 0.5 for name, tensor in made.items() for key in ("exp_avg", "exp_avg_sq")}
    return Parts(update, {"model": made, "optimizer": moments}, {"update": update}, "periodic", {"finite": True}, {})


def bare_write_s(folder: Path, size: int) -> float:
    """Seconds to write and fsync one file of `size` bytes."""
    chunk = os.urandom(1 << 24)
    started_s = time.perf_counter()
    with open(folder / "bare", "wb") as file:
        for _ in range(size // len(chunk)):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    spent_s = time.perf_counter() - started_s
    os.unlink(folder / "bare")
    return spent_s * size / (size // len(chunk) * len(chunk))


def measure_speed(folder: Path, rounds: int, mib: int) -> dict[str, Any]:
    """Saves of a large state in turns with the bare write of as many bytes; then loads."""
    settings = CheckpointConfig(keep_last=2)
    manager = CheckpointManager(folder / "speed", run_id="0" * 32, settings=settings, audit=lambda event, fields: None)
    found: dict[str, list[float]] = {"stall": [], "background": [], "synchronous": [], "bare": [], "load": []}
    for number in range(rounds):
        for background in (True, False):
            writer, parts = Writer(manager, background=background), large_parts(mib, 2 * number + background)
            started_s = time.perf_counter()
            writer.submit(parts, best=False, must=True)
            submitted_s = time.perf_counter() - started_s
            (committed,) = writer.drain()
            if background:
                found["stall"].append(submitted_s)
            found["background" if background else "synchronous"].append(committed.seconds)
            writer.close()
        found["bare"].append(bare_write_s(folder, committed.bytes))
        started_s = time.perf_counter()
        if manager.load_newest() is None:
            raise RuntimeError("the state that was just saved is not there")
        found["load"].append(time.perf_counter() - started_s)
    size_mib, median = committed.bytes / 2**20, {name: statistics.median(values) for name, values in found.items()}
    return {
        "state_mib": size_mib,
        "rounds": rounds,
        "stall_ms": 1000 * median["stall"],
        "stall_copy_mib_per_s": size_mib / median["stall"],
        "background_write_mib_per_s": size_mib / median["background"],
        "synchronous_write_mib_per_s": size_mib / median["synchronous"],
        "bare_write_and_fsync_mib_per_s": size_mib / median["bare"],
        "write_ratio_to_bare": median["bare"] / median["synchronous"],
        "verified_load_mib_per_s": size_mib / median["load"],
    }


def train_process(run: Path, store: Path, settings: dict[str, Any], stop_at: int | None = None) -> float:
    """Run bin/train to its end, or stop it by SIGTERM at an update; peak memory in MiB from its summary."""
    quiet = {
        "telemetry.log_every": 1,
        "telemetry.progress": "quiet",
        "evaluation.examples": 8,
        "evaluation.restore_examples": 0,
    }
    given = {**quiet, **settings, "run.dir": run, "data.store": store}
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    argv = [sys.executable, str(ROOT / "bin" / "train"), "--config", str(QUICKSTART), *words]
    process = subprocess.Popen(argv, cwd=store.parent)
    while stop_at is not None and process.poll() is None:
        path = run / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        if any(row["kind"] == "train" and row["update"] >= stop_at for row in map(json.loads, lines)):
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.02)
    process.wait()
    return json.loads((run / "summary.json").read_text(encoding="utf-8"))["peak_memory_mib"]


def measure_memory(folder: Path, rounds: int) -> dict[str, Any]:
    """Peak memory of fresh and of resumed processes, in turns."""
    result: dict[str, Any] = {"rounds": rounds}
    for name, settings in MEMORY_RUNS.items():
        store, stop_at = folder / f"store-{name}", settings["schedule.max_updates"] // 2
        # Preparing the store costs memory: do it in another process than those that are compared.
        train_process(folder / f"{name}-prepared", store, {**settings, "schedule.max_updates": 1})
        fresh, resumed = [], []
        for number in range(rounds):
            fresh.append(train_process(folder / f"{name}-fresh-{number}", store, settings))
            run = folder / f"{name}-resumed-{number}"
            train_process(run, store, settings, stop_at)
            resumed.append(train_process(run, store, settings))
        result[name] = {
            "fresh_mib": statistics.median(fresh),
            "resumed_mib": statistics.median(resumed),
            "resumed_over_fresh": statistics.median(resumed) / statistics.median(fresh),
        }
    return result


def main() -> int:
    """Measure, print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--large_mib", type=int, default=500)
    parser.add_argument("--resumes", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=["stall", "speed", "memory"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "checkpoint_io"}
    if options.json and options.json.exists():
        result = json.loads(options.json.read_text(encoding="utf-8"))
    result |= {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "numpy")},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "stall" in options.only:
            result["stall"] = measure_stall(folder, options.rounds)
        if "speed" in options.only:
            result["speed"] = measure_speed(folder, max(3, options.rounds // 3), options.large_mib)
        if "memory" in options.only:
            result["memory"] = measure_memory(folder, options.resumes)
    for part in ("stall", "speed", "memory"):
        sys.stdout.write(f"{part}: {json.dumps(result.get(part))}\n")
    write_json(result, options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
