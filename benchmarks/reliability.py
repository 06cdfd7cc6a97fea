"""The attacks of the test suite at the numbers that RELIABILITY.md reports, one after another.

    python benchmarks/reliability.py [--only R1 R4 ...] [--scale 0.1] [--json FILE]

Each attack is the test that CI runs, with an environment variable for how often. A test says by `record_property` what it
really tried, so that a figure is a count and never a wish; one that fails stops at its first failure. The file is rewritten
after each attack and keeps what it held of the others: a campaign can be run in pieces. The last line is JSON.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "numpy")
LIMIT_S = 4 * 3600
HANGS_AFTER_S = 600
"""A reported campaign may share its machine with anything, so a slow run must not count as one that hangs."""


@dataclass(frozen=True)
class Attack:
    """One line of the table.

    `trials` is what the environment variable `variable` asks for; None where the test enumerates all there is.
    """

    name: str
    what: str
    unit: str
    goal: str
    tests: tuple[str, ...]
    variable: str | None = None
    trials: int | None = None
    more: dict[str, str] = field(default_factory=dict)


ATTACKS = (
    Attack(
        "R1",
        "SIGKILL at random moments of a loop that saves after every update; restart, verify",
        "kills",
        "0 unrecoverable, 0 parts taken for whole, 0 acknowledged saves lost",
        ("tests/faults/test_kill_at_random.py",),
        "RESILIENT_T5_KILLS",
        3_000,
    ),
    Attack(
        "R2",
        "SIGKILL before and after every file system call of a save, a first save and a recovery",
        "moments",
        "0 bad",
        ("tests/faults/test_kill_at_every_call.py",),
    ),
    Attack(
        "R3",
        "power-loss states of the recorded calls in two models of a file system; mutants of the protocol",
        "states",
        "0 bad states of 500 or more; at least 8 mutants caught",
        ("tests/faults/test_power_loss.py",),
    ),
    Attack(
        "R4",
        "flipped bit, truncation, zeroed tail, swapped, missing or foreign file, edited JSON",
        "damages",
        "all found, all fall back with one extra load",
        ("tests/checkpoint/test_damage.py",),
        "RESILIENT_T5_DAMAGES",
        10_000,
    ),
    Attack(
        "R6",
        "ENOSPC, EDQUOT, EROFS, EIO, EFBIG at every call of a save and of a start, once and for good",
        "errors",
        "older checkpoints intact, the errno named, a later save works",
        ("tests/faults/test_disk_errors.py",),
    ),
    Attack(
        "R7",
        "exact resume under random SIGKILL, SIGTERM and SIGINT: dropout, accumulation, readers 0 and 2, AdamW and Adafactor",
        "runs",
        "weights, optimizer, metric rows and order of every run identical by sha256",
        ("tests/resume/test_exact.py::test_no_interruption_changes_a_run",),
        "RESILIENT_T5_RUNS",
        200,
        {"RESILIENT_T5_INTERRUPTIONS": "10"},
    ),
    Attack(
        "R9",
        "one item of the state left out at a time",
        "mutants",
        "at least 15 of 16 caught",
        ("tests/resume/test_state_is_complete.py",),
    ),
    Attack(
        "R10",
        "signal to exit, in every phase",
        "signals",
        "p99 within a micro-batch, the write and 0.1 s; the right code; all saved; no hang",
        ("tests/resume/test_exits.py::test_a_signal_in_any_phase_ends_the_run_at_once_and_saved",),
        "RESILIENT_T5_EXITS",
        1_000,
    ),
    Attack(
        "R12",
        "retention under random saves, NaN metrics, crashes, damage, resumes, clock jumps",
        "runs",
        "best, newest and newest healthy on disk, enough whole ones, the count bounded",
        ("tests/checkpoint/test_retention.py",),
        "RESILIENT_T5_EXAMPLES",
        20_000,
    ),
    Attack(
        "R13",
        "eight processes start on one run directory",
        "rounds",
        "one winner, the others leave with 69",
        ("tests/faults/test_run_lock.py",),
        "RESILIENT_T5_STARTS",
        200,
    ),
    Attack(
        "R17",
        "NaN and infinity in loss, gradient, parameter, optimizer, metric; labels all ignored, ids out of range",
        "injections",
        "none committed, the best unchanged, skip, roll back and give up as specified",
        ("tests/resume/test_nonfinite.py",),
        "RESILIENT_T5_NAN",
        500,
    ),
    Attack(
        "R22",
        "SIGKILL of one of two processes in a save; the other leaves, the same command goes on",
        "kills",
        "no commit lost or half, exit 75 without a hang, the run identical by sha256 to one left alone",
        ("tests/resume/test_several.py::test_a_killed_process_in_a_save_loses_nothing",),
        "RESILIENT_T5_RANK_KILLS",
        50,
    ),
)


def command_of(attack: Attack, scale: float) -> tuple[dict[str, str], list[str]]:
    """(environment, arguments behind `python -m pytest`) of an attack."""
    environment = dict(attack.more)
    if attack.variable is not None and attack.trials is not None:
        environment[attack.variable] = str(max(1, round(attack.trials * scale)))
    return environment, [*attack.tests, "-q"]


def run(attack: Attack, scale: float) -> dict[str, Any]:
    """Run one attack in a process of its own; its line of the table."""
    environment, arguments = command_of(attack, scale)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-o", "junit_family=xunit1", f"--junitxml={report}"]
        begun_s, cpu_begun_s = time.monotonic(), children_cpu_s()
        subprocess.run(
            [sys.executable, "-m", "pytest", *arguments, *options],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "RESILIENT_T5_LIMIT_S": str(HANGS_AFTER_S), **environment},
            timeout=LIMIT_S,
            check=False,
        )
        seconds, cpu_s = time.monotonic() - begun_s, children_cpu_s() - cpu_begun_s
        counted = read_report(report)
    words = [f"{name}={value}" for name, value in environment.items()]
    return {
        "attack": attack.what,
        "unit": attack.unit,
        "goal": attack.goal,
        **counted,
        "wall_s": round(seconds, 1),
        "cpu_s": round(cpu_s, 1),
        "command": " ".join([*words, "python -m pytest", *attack.tests]),
    }


def read_report(report: Path) -> dict[str, Any]:
    """Trials, failures and other counts that the tests recorded; no report at all is one failure."""
    if not report.exists():
        return {"trials": 0, "failures": 1, "tests": 0, "counts": {}}
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    counts: dict[str, float] = {}
    for name, value in recorded(cases):
        # A time is no sum: of several tests the slowest one is the figure.
        counts[name] = max(counts.get(name, 0.0), value) if name.endswith("_s") else counts.get(name, 0) + value
    trials = int(counts.pop("trials", 0))
    return {"trials": trials, "failures": len(failed), "tests": len(cases), "counts": counts}


def recorded(cases: list[ElementTree.Element]) -> Iterator[tuple[str, float]]:
    """Every number that a test recorded."""
    for case in cases:
        for entry in case.iter("property"):
            try:
                value = float(entry.get("value", ""))
            except ValueError:  # other plugins record text
                continue
            yield entry.get("name", ""), int(value) if value.is_integer() else value


def children_cpu_s() -> float:
    """CPU seconds of all finished children and theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def describe_machine() -> dict[str, Any]:
    """Kind of machine and versions; no name and no path of it."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cores": os.cpu_count(),
        "memory_gib": round(pages / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def main() -> int:
    """Run what is asked for, print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[attack.name for attack in ATTACKS])
    parser.add_argument("--scale", type=float, default=1.0, help="share of the reported numbers to try")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    kept = json.loads(options.json.read_text(encoding="utf-8"))["attacks"] if options.json and options.json.exists() else {}
    for attack in ATTACKS:
        if attack.name in options.only:
            kept[attack.name] = run(attack, options.scale)
            found = kept[attack.name]
            sys.stdout.write(f"{attack.name:>4} {found['trials']:>7} {attack.unit}, {found['failures']} failures\n")
        result = {"benchmark": "reliability", "date": f"{datetime.now(UTC):%Y-%m-%d}", **describe_machine(), "attacks": kept}
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(result) + "\n")
    return int(any(found["failures"] for found in kept.values()))


if __name__ == "__main__":
    raise SystemExit(main())
