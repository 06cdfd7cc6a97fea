"""Memory and time of sharded layers (`hardware.shard_layers`): the same run on several processes, replicated and sharded.

Every process of a run is started by itself, and the system says what it took at most: imports, training, an evaluation at
the start and at the end, saves, exports. What a process takes whatever it trains is measured with a tiny model and taken
off. The sides take turns; times are medians over all updates but the first two of each run. On CPUs, by gloo.

    python benchmarks/sharding.py --processes 2 --preset mt5-small [--rounds 2]
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from circumstances import circumstances, write_json

ROOT = Path(__file__).parents[1]
SETTINGS = """
data: {train: "builtin:clinical", sample_notes: 300, max_source_tokens: 128, max_target_tokens: 64}
tokenizer: {train_vocab_size: 1000}
corruption: {max_sentinels: 10}
batch: {examples_per_update: 8, micro_tokens: 384}
schedule: {max_updates: 6}
convergence: {preset: short}
evaluation: {every: 6, examples: 8, restore_examples: 2}
checkpoint: {every_minutes: null, every_updates: 3}
telemetry: {log_every: 1, progress: quiet, tensorboard: false, samples: 1}
hardware: {threads: 1}
"""
UNTIMED_UPDATES = 2


def run(folder, name, options, *more):
    """One run on all its processes: (peak MiB of each, processor seconds of all, seconds of each timed update)."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    directory = folder / name
    argv = ["--config", folder / "config.yaml", "--data.store", folder / "store", "--run.dir", directory, *more]
    started = []
    for index in range(options.processes):
        own = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": options.processes, "MASTER_PORT": port}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
        environment |= {key: str(value) for key, value in own.items()}
        command = [sys.executable, str(ROOT / "bin" / "train"), *map(str, argv), "--hardware.device", "cpu"]
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
    peaks_mib, cpu_s = [], 0.0
    for process in started:
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{name}: a process ended with status {status}")
        peaks_mib.append(usage.ru_maxrss / 1024)
        cpu_s += usage.ru_utime + usage.ru_stime
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return peaks_mib, cpu_s, [row["update_s"] for row in rows if row["kind"] == "train"][UNTIMED_UPDATES:]


def measure(options, folder):
    """Peaks and processor times above what a run takes anyhow, and times of an update, of both sides; their ratios."""
    (folder / "config.yaml").write_text(SETTINGS, encoding="utf-8")
    base_mib, base_s, _ = run(folder, "tiny", options, "--model.preset", "tiny")
    peaks, cpu, times = ({"whole": [], "cut": []} for _ in range(3))
    for number in range(options.rounds):
        for side, found in peaks.items():
            cut = str(side == "cut").lower()
            more = ("--model.preset", options.preset, "--hardware.shard_layers", cut)
            peaks_mib, cpu_s, update_s = run(folder, f"{side}-{number}", options, *more)
            found.append([peak - base for peak, base in zip(peaks_mib, base_mib, strict=True)])
            cpu[side].append(cpu_s - base_s)
            times[side] += update_s
    result = {"processes": options.processes, "preset": options.preset, "base_mib": [round(mib) for mib in base_mib]}
    for side in peaks:
        writer, others = [max(row[0] for row in peaks[side]), max(max(row[1:]) for row in peaks[side])]
        result[side] = {"writer_mib": round(writer), "others_mib": round(others)}
        result[side] |= {"cpu_s": statistics.median(cpu[side]), "update_s": statistics.median(times[side])}
    for figure in ("writer_mib", "others_mib", "cpu_s", "update_s"):
        result[f"{figure.rpartition('_')[0]}_ratio"] = round(result["cut"][figure] / result["whole"][figure], 3)
    return result


def main():
    """Print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--preset", default="mt5-small")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.processes < 2 or options.rounds < 1:
        parser.error("--processes is to be 2 or more, --rounds 1 or more")
    with tempfile.TemporaryDirectory() as folder:
        result = {**circumstances("sharding", ("torch", "accelerate")), **measure(options, Path(folder))}
    for side in ("whole", "cut"):
        sys.stdout.write(f"{side}: " + ", ".join(f"{key} {value:.3g}" for key, value in result[side].items()) + "\n")
    write_json(result, options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
