"""Run the attacks of the test suite with the trial counts that RELIABILITY.md reports, one after another.

    python benchmarks/reliability.py [--only R1 R4 ...] [--scale 0.1] [--json FILE]

Each attack is the test that CI runs; an environment variable sets the number of trials. A test reports its actual trials with
`record_property`, and the report uses these counts. A failing test stops at its first failure. The file is rewritten after each
attack and keeps the results of the others, so a campaign can be run in several calls. The last line is JSON.
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
"""Time limit of a run in the tests. Generous, because other programs may slow the machine and slow is not a hang."""


@dataclass(frozen=True)
class Attack:
    """One row of the table.

    `trials` is the value of the environment variable `variable`; None for an exhaustive test.
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
        "0 unrecoverable, 0 partial checkpoints loaded, 0 acknowledged saves lost",
        ("tests/faults/test_kill_at_random.py",),
        "RESILIENT_T5_KILLS",
        3_000,
    ),
    Attack(
        "R2",
        "SIGKILL before and after every file system call of a save, of a first save and of a recovery",
        "moments",
        "0 failures",
        ("tests/faults/test_kill_at_every_call.py",),
    ),
    Attack(
        "R3",
        "power-loss states of the recorded calls under two file system models; mutants of the write protocol",
        "states",
        "0 bad states of 500 or more; at least 8 mutants caught",
        ("tests/faults/test_power_loss.py",),
    ),
    Attack(
        "R4",
        "flipped bit, truncation, zeroed tail, swapped, missing or foreign file, edited JSON",
        "damages",
        "all detected; each falls back with one extra load",
        ("tests/checkpoint/test_damage.py",),
        "RESILIENT_T5_DAMAGES",
        10_000,
    ),
    Attack(
        "R6",
        "ENOSPC, EDQUOT, EROFS, EIO, EFBIG at every call of a save and of a start-up, once and permanently",
        "errors",
        "older checkpoints intact, the errno reported, a later save succeeds",
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
        "one item of the run state omitted at a time",
        "mutants",
        "at least 15 of 16 caught",
        ("tests/resume/test_state_is_complete.py",),
    ),
    Attack(
        "R10",
        "time from signal to exit, in every phase",
        "signals",
        "p99 within one micro-batch, the write and 0.1 s; correct exit code; state saved; no hang",
        ("tests/resume/test_exits.py::test_a_signal_in_any_phase_ends_the_run_at_once_and_saved",),
        "RESILIENT_T5_EXITS",
        1_000,
    ),
    Attack(
        "R12",
        "retention under random saves, NaN metrics, crashes, damage, resumes, clock jumps",
        "runs",
        "best, newest and newest healthy on disk, enough intact checkpoints, a bounded number",
        ("tests/checkpoint/test_retention.py",),
        "RESILIENT_T5_EXAMPLES",
        20_000,
    ),
    Attack(
        "R13",
        "eight processes start in one run directory",
        "rounds",
        "one winner, the others exit with 69",
        ("tests/faults/test_run_lock.py",),
        "RESILIENT_T5_STARTS",
        200,
    ),
    Attack(
        "R17",
        "NaN and infinity in loss, gradient, parameter, optimizer, metric; all labels ignored, ids out of range",
        "injections",
        "none committed, the best unchanged; skip, rollback and abort as specified",
        ("tests/resume/test_nonfinite.py",),
        "RESILIENT_T5_NAN",
        500,
    ),
    Attack(
        "R22",
        "SIGKILL of one of two processes during a save; the other exits, the same command resumes",
        "kills",
        "no lost or partial commit, exit 75 without a hang, the run identical by sha256 to an uninterrupted one",
        ("tests/resume/test_several.py::test_a_killed_process_in_a_save_loses_nothing",),
        "RESILIENT_T5_RANK_KILLS",
        50,
    ),
)


def command_of(attack: Attack, scale: float) -> tuple[dict[str, str], list[str]]:
    """Environment and arguments of `python -m pytest` for an attack."""
    environment = dict(attack.more)
    if attack.variable is not None and attack.trials is not None:
        environment[attack.variable] = str(max(1, round(attack.trials * scale)))
    return environment, [*attack.tests, "-q"]


def run(attack: Attack, scale: float) -> dict[str, Any]:
    """Run one attack in a new process and return its row of the table."""
    environment, arguments = command_of(attack, scale)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-o", "junit_family=xunit1", f"--junitxml={report}"]
        started_s, cpu_started_s = time.monotonic(), children_cpu_s()
        subprocess.run(
            [sys.executable, "-m", "pytest", *arguments, *options],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "RESILIENT_T5_LIMIT_S": str(HANGS_AFTER_S), **environment},
            timeout=LIMIT_S,
            check=False,
        )
        seconds, cpu_s = time.monotonic() - started_s, children_cpu_s() - cpu_started_s
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
    """Return the trials, failures and other counts that the tests recorded. A missing report counts as one failure."""
    if not report.exists():
        return {"trials": 0, "failures": 1, "tests": 0, "counts": {}}
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    counts: dict[str, float] = {}
    for name, value in recorded(cases):
        # Counts are summed; of times, the slowest test is reported.
        counts[name] = max(counts.get(name, 0.0), value) if name.endswith("_s") else counts.get(name, 0) + value
    trials = int(counts.pop("trials", 0))
    return {"trials": trials, "failures": len(failed), "tests": len(cases), "counts": counts}


def recorded(cases: list[ElementTree.Element]) -> Iterator[tuple[str, float]]:
    """Yield every number that a test recorded."""
    for case in cases:
        for entry in case.iter("property"):
            try:
                value = float(entry.get("value", ""))
            except ValueError:  # other plugins record text
                continue
            yield entry.get("name", ""), int(value) if value.is_integer() else value


def children_cpu_s() -> float:
    """CPU seconds of all finished child processes and their descendants."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def describe_machine() -> dict[str, Any]:
    """Machine type and package versions, without host name or paths."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cores": os.cpu_count(),
        "memory_gib": round(pages / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def main() -> int:
    """Run the selected attacks; print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[attack.name for attack in ATTACKS])
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the reported trial counts to run")
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
