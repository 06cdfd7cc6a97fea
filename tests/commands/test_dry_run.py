"""bin/train --dry_run: prints what a run would do, or runs its largest steps, and leaves no files.

Run: python -m pytest tests/commands/test_dry_run.py
"""

import os
import shutil
import signal
import time

import pytest

from tests.conftest import read_summary

pytestmark = pytest.mark.slow


def tree(folder):
    """Every path below a folder, with size and time of change."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.fixture
def dry_run(fork_server, tiny_config, tmp_path):
    """Runs `bin/train --dry_run KIND`, and returns exit status and console."""

    def run(kind, *argv, config=tiny_config):
        output = tmp_path / f"console-{time.monotonic_ns()}.txt"
        status = fork_server.run(["--config", config, "--dry_run", kind, *argv], output)
        console = output.read_text()
        output.unlink()
        return status, console

    return run


def banner(lines):
    """The banner without times of day and without what changes from minute to minute: free memory and free disk."""
    kept = {}
    for line in lines:
        word, _, rest = line.partition(" ")
        if word in ("model", "data", "plan", "phases", "disk", "memory"):
            kept.setdefault(word, rest.partition("GiB at most")[0].partition(": needs")[0])
    return kept


def test_a_plan_of_a_new_run_says_what_is_missing_and_what_fits_and_writes_nothing(dry_run, tmp_path):
    """Without a prepared corpus it prints the plan of bin/plan, with the rows that the tokenizer will have."""
    status, console = dry_run("plan", "--run.dir", tmp_path / "runs" / "new")
    assert status == 0, console
    assert "bin/prepare" in console
    assert "vocabulary rows (" in console
    assert "800 vocabulary rows" in console, "700 pieces and 100 sentinels"
    assert list(tmp_path.iterdir()) == []


def test_a_plan_tells_what_the_run_itself_tells_and_touches_nothing(dry_run, finished):
    """Model, data, plan, disk, memory and phases are those of the run's own banner; the run would be resumed."""
    before = tree(finished)
    status, console = dry_run("plan", "--run.dir", finished)
    assert status == 0, console
    log_lines = [line.partition(" ")[2] for line in (finished / "train.log").read_text().splitlines()]
    assert banner(console.splitlines()) == banner(log_lines)
    assert len(banner(log_lines)) == 6
    assert "resumed from u00000012" in console
    assert tree(finished) == before


def test_a_plan_finds_what_would_keep_the_run_from_starting(dry_run, finished, tmp_path):
    """A missing file (65), settings of another run (78), a kind of dry run that does not exist (2)."""
    status, console = dry_run("plan", "--data.train", "absent.txt", "--run.dir", tmp_path / "new")
    assert (status, "absent.txt" in console) == (65, True), console
    status, console = dry_run("plan", "--run.dir", finished, "--optim.lr", "0.5")
    assert (status, "optim.lr" in console) == (78, True), console
    status, console = dry_run("everything", "--run.dir", tmp_path / "new")
    assert (status, "plan or update" in console) == (2, True), console
    assert list(tmp_path.iterdir()) == []


def test_a_plan_takes_the_checkpoint_that_the_run_would_take(dry_run, finished, tmp_path):
    """The one that is named; none where none is whole, or none of that name: 66, as the run itself."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    older = sorted(path.name for path in (run / "checkpoints").glob("u*"))[0]
    status, console = dry_run("plan", "--run.dir", run, "--run.resume", older)
    assert (status, f"resumed from {older}" in console) == (0, True), console
    assert dry_run("plan", "--run.dir", run, "--run.resume", "u00000001-0099")[0] == 66
    for manifest in run.glob("checkpoints/*/MANIFEST.json"):
        manifest.write_text("{}")
    assert dry_run("plan", "--run.dir", run)[0] == 66


def test_a_rehearsal_does_every_hard_moment_and_leaves_nothing(dry_run, finished):
    """On an existing run: two longest updates, two regular ones, loss, generation, save, load; then the totals."""
    before, summary = tree(finished), read_summary(finished)
    status, console = dry_run("update", "--run.dir", finished)
    assert status == 0, console
    assert console.count("update the longest 8 examples") == 2
    assert console.count("update the run's own 8 examples") == 2
    assert "NOT applied" not in console
    for words in (
        "eval   loss of",
        "eval   restoring",
        "saved       4",
        "each equal bit for bit",
        "peak ",
        "time   about",
        "disk   at most",
    ):
        assert words in console, words
    assert (tree(finished), read_summary(finished)) == (before, summary)


def test_a_save_that_takes_longer_than_sigterm_leaves_is_warned_of(dry_run, finished):
    """Before the signal comes."""
    status, console = dry_run("update", "--run.dir", finished, "--run.deadline_s", "0.0001")
    assert status == 0, console
    assert console.count("longer than run.deadline_s") == 1


def test_a_rehearsal_of_a_new_run_prepares_its_corpus_for_itself(dry_run, tmp_path):
    """Not even the prepared corpus stays, and the run directory is not made."""
    status, console = dry_run("update", "--run.dir", tmp_path / "runs" / "new")
    assert status == 0, console
    assert "for 12 updates" in console
    assert list(tmp_path.iterdir()) == []


def test_a_rehearsal_that_is_stopped_ends_by_the_signal_and_leaves_nothing(fork_server, tiny_config, tmp_path):
    """SIGTERM while a long batch is restored."""
    output = tmp_path / "console.txt"
    place = tmp_path / "place"
    place.mkdir()
    argv = ["--config", tiny_config, "--dry_run", "update", "--run.dir", place / "run", "--batch.examples_per_update", "100"]
    pid = fork_server.start(argv, output)
    until = time.monotonic() + 60
    while not list(place.glob(".dry_run-*/run")):
        assert time.monotonic() < until, output.read_text()
        time.sleep(0.01)
    os.kill(pid, signal.SIGTERM)
    assert fork_server.wait(pid) == -signal.SIGTERM, output.read_text()
    assert "left no files" in output.read_text()
    assert list(place.iterdir()) == []


def test_rehearsing_examples_are_the_longest_of_the_corpus(dry_run, finished, tmp_path):
    """A batch limit below one longest example shows in the micro-batches: each of the 8 examples is one micro-batch."""
    status, console = dry_run("update", "--run.dir", tmp_path / "new", "--batch.micro_tokens", "16")
    assert status == 0, console
    assert "8 micro-batches" in next(line for line in console.splitlines() if "the longest 8" in line)
