"""Interrupted at random, or exactly where it hurts: the same run. Run: python -m pytest tests/resume/test_exact.py

RESILIENT_T5_RUNS and RESILIENT_T5_INTERRUPTIONS (of each run) make the random part longer.
"""

import json
import os
import signal

import pytest

from tests.resume.exact import attack_exact
from tests.resume.harness import Arena, differences, metric_rows, newest_checkpoint, whole_rows

pytestmark = pytest.mark.slow

RUNS = int(os.environ.get("RESILIENT_T5_RUNS", "4"))
INTERRUPTIONS = int(os.environ.get("RESILIENT_T5_INTERRUPTIONS", "4"))


def test_no_interruption_changes_a_run(fork_server, tmp_path, record_property):
    """R7: SIGKILL, SIGTERM and SIGINT at random moments; every tensor, counter, row and export has the same sha256."""
    figures, _ = attack_exact(fork_server, tmp_path, RUNS, INTERRUPTIONS, seed=1)
    record_property("trials", figures["runs"])
    record_property("interruptions", figures["interruptions"])
    assert figures["different"] == []
    assert figures["interruptions"] >= RUNS, "the signals came too late to interrupt anything"


@pytest.fixture(scope="module")
def arena(fork_server, tmp_path_factory):
    """A folder with a reference run that was left alone."""
    arena = Arena(fork_server, tmp_path_factory.mktemp("arena"))
    arena.finish("reference")
    return arena


LAST = -1
PLACES = {
    "at update 0, in its evaluation": [("evaluation", 1)],
    "at update 0, in its save": [("save", 2)],
    "at update 0, in its generation": [("generation", 2)],
    "in the first micro-batch": [("micro-batch", 1)],
    "in the evaluation of update 5": [("evaluation", 3)],
    "in the save of a best": [("save", 20)],
    "just before a commit": [("commit", 6)],
    "in the last update": [("micro-batch", LAST)],
    "in the export, after the last update": [("export", 1)],
    "between the two exports": [("export", 2)],
    "three times in one update": [("micro-batch", 30), ("micro-batch", 2), ("micro-batch", 1)],
    "in an evaluation, and again when it is made up for": [("evaluation", 3), ("evaluation", 1), ("generation", 2)],
}
"""Where the signals strike, one process after the other: a place and its n-th call in that process, or its LAST."""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
@pytest.mark.parametrize("place", PLACES, ids=lambda name: name.replace(" ", "-"))
def test_a_run_that_was_interrupted_here_is_the_same_run(arena, place, number, record_property):
    """R8: a second and third resume, evaluation, save, update 0, after the last: nothing differs, no row stands twice."""
    name = f"{int(number)}-{place}".replace(" ", "-").replace(",", "")
    for where, call in PLACES[place]:
        strike = {"place": where, "number": int(number), "call": micro_batches_of(arena) if call == LAST else call}
        status = arena.server.run(arena.argv(name), arena.console(name), [("tests.resume.placing:signal_at", strike)])
        assert status in (-number, 0), arena.console(name).read_text()[-1500:]
        assert status == -number or where == "export", "the signal did not strike"
    run = arena.finish(name)
    assert differences(run, arena.folder / "reference") == []
    for kind in ("train", "evaluation"):
        updates = [row["update"] for row in metric_rows(run, kind)]
        assert updates == sorted(set(updates)), f"{kind} rows stand twice"
    record_property("trials", 1)


def micro_batches_of(arena):
    """Micro-batches of the whole reference run."""
    state = json.loads((newest_checkpoint(arena.folder / "reference") / "state.json").read_text())
    return state["run"]["micro_batches"]


@pytest.mark.parametrize("readers", ["1", "4"])
def test_the_number_of_readers_changes_nothing(arena, readers):
    """Neither from the start, nor from a resume on."""
    run = arena.finish(f"readers-{readers}", "--batch.readers", readers)
    assert differences(run, arena.folder / "reference") == []


def test_another_micro_tokens_keeps_every_optimizer_batch_and_says_what_it_does_not_keep(arena):
    """The chain over the examples is the same to the end; dropout is keyed by micro-batch, so the bits are not."""
    strike = {"place": "micro-batch", "number": int(signal.SIGTERM), "call": 30}
    arena.server.run(arena.argv("recut"), arena.console("recut"), [("tests.resume.placing:signal_at", strike)])
    run = arena.finish("recut", "--batch.micro_tokens", "150")
    assert "order" not in differences(run, arena.folder / "reference")
    reference_rows = metric_rows(arena.folder / "reference", "train")
    assert [row["target_tokens"] for row in metric_rows(run, "train")] == [row["target_tokens"] for row in reference_rows]
    start = [row for row in whole_rows(run) if row["kind"] == "start"][-1]
    assert start["changed_conditions"] == ["micro_tokens: 300 -> 150"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_a_packed_run_that_was_interrupted_twice_is_the_same_run(arena, number):
    """The shapes of packed rows are chosen anew at each start and are no part of a checkpoint: every sha256 is equal."""
    packed = ("--batch.pack", "true")
    if not (arena.folder / "packed").exists():
        arena.finish("packed", *packed)
    name = f"packed-{int(number)}"
    for call in (5, 9):
        strike = ("tests.resume.placing:signal_at", {"place": "micro-batch", "number": int(number), "call": call})
        assert arena.server.run(arena.argv(name, *packed), arena.console(name), [strike]) == -number
    run = arena.finish(name, *packed)
    starts = [row for row in whole_rows(run) if row["kind"] == "start"]
    assert len(starts) == 3 and starts[1]["resumed_from"] is not None and starts[2]["update"] > 0
    assert differences(run, arena.folder / "packed") == []
    assert "tensors/model" in differences(run, arena.folder / "reference"), "the rows were not packed"


@pytest.mark.parametrize("before, after", [("false", "true"), ("true", "false")])
def test_another_pack_keeps_every_optimizer_batch_and_says_what_it_does_not_keep(arena, before, after):
    """A resume may pack rows or stop packing them: the chain over the examples and the tokens of every update stay."""
    name = f"pack-{before}-{after}"
    strike = {"place": "micro-batch", "number": int(signal.SIGTERM), "call": 8}
    begun = arena.argv(name, "--batch.pack", before)
    assert arena.server.run(begun, arena.console(name), [("tests.resume.placing:signal_at", strike)]) == -signal.SIGTERM
    run = arena.finish(name, "--batch.pack", after)
    assert "order" not in differences(run, arena.folder / "reference")
    found, expected = (metric_rows(path, "train") for path in (run, arena.folder / "reference"))
    assert [row["target_tokens"] for row in found] == [row["target_tokens"] for row in expected]
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=0.05)
    starts = [row for row in whole_rows(run) if row["kind"] == "start"]
    assert starts[-1]["changed_conditions"] == [f"packed: {before == 'true'} -> {after == 'true'}"]
