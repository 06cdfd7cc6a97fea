"""Compare bin/train on a real text, killed repeatedly at random, with the same run without kills.

    python benchmarks/killed_run.py [--text FILE] [--terms FILE] [--kills 20] [--updates 120] [--seed 1] [--json FILE]

Both runs are `bin/train --config configs/zh-medical-cpu.yaml` with dropout and one thread. Evaluations, restorations and saves
are frequent, so that a short run has several of each. Both runs share one prepared store. The whole process group of the second
run gets SIGKILL at random moments: a quarter of the kills during start-up, the others during training. The same command is
started again after each kill. At the end the runs are compared: all tensors of the newest checkpoint bit for bit, the exported
models, and the training, evaluation, restoration and phase rows without values that depend on the clock.
The last line is JSON. The exit status is 1 if anything differs.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.circumstances import write_json  # noqa: E402

SHARED = Path(os.environ.get("RESILIENT_T5_SHARED", ROOT.parent / "shared")) / "data"
CLOCK = ("_s", "_per_s", "_mib", "_share")
KINDS = ("train", "evaluation", "restoration", "phase")
PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "numpy")
STARTING_SHARE = 0.25


def command(options: argparse.Namespace, store: Path, run: Path) -> list[str]:
    """Return the command of a run in directory `run`."""
    settings = {
        "data.train": options.text,
        "data.terms": options.terms,
        "data.store": store,
        "model.dropout": 0.1,
        "schedule.max_updates": options.updates,
        "evaluation.every": max(1, options.updates // 4),
        "evaluation.examples": 64,
        "evaluation.restore_examples": 32,
        "checkpoint.every_updates": max(1, options.updates // 60),  # several saves between two kills
        "telemetry.log_every": 1,
        "telemetry.progress": "plain",
        "hardware.threads": 1,
        "run.dir": run,
    }
    given = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return [sys.executable, str(ROOT / "bin" / "train"), "--config", str(ROOT / "configs" / "zh-medical-cpu.yaml"), *given]


def start(argv: list[str], console: Path) -> subprocess.Popen[bytes]:
    """Start a run in its own process group; append its output to a file."""
    with console.open("ab") as output:
        return subprocess.Popen(argv, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, cwd=console.parent)


def read_rows(run: Path) -> list[dict[str, Any]]:
    """Return the complete rows written so far."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def starts(run: Path) -> int:
    """Number of processes that have started to train in `run`."""
    return sum(row["kind"] == "start" for row in read_rows(run))


def kill_once(argv: list[str], run: Path, draw: random.Random, times: tuple[float, float]) -> dict[str, Any] | None:
    """Start the run and kill it at a random moment. Describe the hit; None if the run had already ended."""
    starting_s, training_s = times
    before, starting = starts(run), draw.random() < STARTING_SHARE
    process = start(argv, run.with_name("console.txt"))
    if not starting:
        while starts(run) == before and process.poll() is None:
            time.sleep(0.01)
    time.sleep(draw.random() * (starting_s if starting else training_s))
    if process.poll() is not None:
        return None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    rows = read_rows(run)
    half_written = [path.name for path in (run / "checkpoints").glob(".t*-*")] if run.exists() else []
    return {
        "update": max((row["update"] for row in rows if row["kind"] == "train"), default=0),
        "training": starts(run) > before,
        "in_a_save": bool(half_written),
    }


def tensors(run: Path) -> dict[str, str]:
    """Sha256 of each tensor file in the newest checkpoint, by file stem."""
    newest = max((run / "checkpoints").glob("u*-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return {path.stem: tensor_sha256(path) for path in sorted(newest.glob("*.safetensors"))}


def tensor_sha256(path: Path) -> str:
    """Sha256 over the names, dtypes, shapes and bytes of all tensors in a file."""
    digest = hashlib.sha256()
    for name, value in sorted(load_file(path).items()):
        digest.update(f"{name} {value.dtype} {value.shape}".encode() + value.tobytes())
    return digest.hexdigest()


def outcome(run: Path) -> dict[str, Any]:
    """Return everything that must be equal in the two runs."""
    rows = [{key: value for key, value in row.items() if key != "time" and not key.endswith(CLOCK)} for row in read_rows(run)]
    exported = {name: tensor_sha256(run / "export" / name / "model.safetensors") for name in ("best", "last")}
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return {
        **{f"checkpoint/{stem}": digest for stem, digest in tensors(run).items()},
        **{f"export/{name}": digest for name, digest in exported.items()},
        **{f"rows/{kind}": [row for row in rows if row["kind"] == kind] for kind in KINDS},
        "summary": {key: summary[key] for key in ("updates", "best", "last", "target_tokens", "stop_reason", "exit_code")},
    }


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run both and compare them."""
    alone, killed, store = folder / "alone", folder / "killed", options.store or folder / "store"
    started_s = time.monotonic()
    process = start(command(options, store, alone), folder / "console_alone.txt")
    while not starts(alone) and process.poll() is None:
        time.sleep(0.05)
    if process.wait():
        raise RuntimeError((folder / "console_alone.txt").read_text(encoding="utf-8"))
    wall_s = json.loads((alone / "summary.json").read_text(encoding="utf-8"))["wall_s"]
    argv, draw, hits = command(options, store, killed), random.Random(options.seed), []
    warm_s = time.monotonic()
    subprocess.run([*argv[:2], "--help"], check=True, stdout=subprocess.DEVNULL)
    starting_s = 8 * (time.monotonic() - warm_s)
    while len(hits) < options.kills:
        # A kill comes, on average, before 1 / kills of the training time has passed, so the run lasts for all kills.
        hit = kill_once(argv, killed, draw, (starting_s, 1.5 * wall_s / options.kills))
        if hit is None:
            break
        hits.append(hit)
        sys.stdout.write(f"kill {len(hits):>2}: {json.dumps(hit)}\n")
        sys.stdout.flush()
    code = start(argv, folder / "console.txt").wait()
    if code:
        raise RuntimeError((folder / "console.txt").read_text(encoding="utf-8"))
    actual, expected = outcome(killed), outcome(alone)
    different = sorted(key for key in expected.keys() | actual.keys() if expected.get(key) != actual.get(key))
    resumed = [row["resumed_from"] for row in read_rows(killed) if row["kind"] == "start"]
    return {
        "updates": options.updates,
        "kills": len(hits),
        "kills_in_training": sum(hit["training"] for hit in hits),
        "kills_in_a_save": sum(hit["in_a_save"] for hit in hits),
        "checkpoints_resumed_from": len({name for name in resumed if name}),
        "compared": {key: value if isinstance(value, str) else len(value) for key, value in expected.items()},
        "different": different,
        "identical": not different,
        "text_bytes": options.text.stat().st_size,
        "wall_s": round(time.monotonic() - started_s, 1),
    }


def main() -> int:
    """Print the hits and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=SHARED / "zh_medical_25mb_open.txt")
    parser.add_argument("--terms", type=Path, default=SHARED / "zh_terms.txt")
    parser.add_argument("--store", type=Path, help="a store that was prepared from this text with these settings")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--updates", type=int, default=120)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not options.text.is_file():
        parser.error(f"{options.text} does not exist; pass a text file with --text")
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(options, Path(folder))
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    result = {"benchmark": "killed_run", "date": f"{datetime.now(UTC):%Y-%m-%d}", "versions": versions, **figures}
    write_json(result, options.json)
    return int(not result["identical"])


if __name__ == "__main__":
    raise SystemExit(main())
