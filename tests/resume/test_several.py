"""Several processes train one run. Run: python -m pytest tests/resume/test_several.py

RESILIENT_T5_RANK_KILLS makes the attack on a save longer.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest

from resilient_t5.checkpoint.lock import RunLock
from tests.conftest import ROOT
from tests.forkserver import LIMIT_S
from tests.resume.harness import Arena, differences, metric_rows, newest_checkpoint, whole_rows
from tests.resume.several import attack_lost, console, free_port, run_together, start_together, summary

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("RESILIENT_T5_RANK_KILLS", "3"))
UPDATES = ("--schedule.max_updates", "20", "--telemetry.log_every", "1")
RELATIVE_TOLERANCE = 1e-6
"""The order of the additions depends on the number of processes, and nothing else does."""


@pytest.fixture(scope="module")
def arena(fork_server, tmp_path_factory):
    """A folder with a store and the run of one process over 20 updates, dropout and several micro-batches included."""
    arena = Arena(fork_server, tmp_path_factory.mktemp("several"))
    arena.finish("alone", *UPDATES)
    return arena


@pytest.fixture(scope="module")
def two(arena):
    """The same run on two processes."""
    assert run_together(arena, "two", 2, *UPDATES) == [0, 0], console(arena, "two")
    return arena.folder / "two"


def order(run):
    """The chain over the examples of every update."""
    return json.loads((newest_checkpoint(run) / "state.json").read_text())["run"]["order_sha256"]


def assert_close(run, reference):
    """Every figure of every row that one process gives, to 1e-6 relative; counts, examples and answers exactly."""
    for kind in ("train", "evaluation", "restoration"):
        rows, expected_rows = metric_rows(run, kind), metric_rows(reference, kind)
        assert len(rows) == len(expected_rows) > 0
        for row, expected in zip(rows, expected_rows, strict=True):
            assert row.keys() == expected.keys()
            for name in ("loss", "gradient_norm", "loss_se", "learning_rate"):
                if name in row:
                    assert row[name] == pytest.approx(expected[name], rel=RELATIVE_TOLERANCE), (kind, row["update"], name)
            for name in ("target_tokens", "order_sha256", "token_accuracy", "term_rate", "n", "span_match", "cer"):
                assert row.get(name) == expected.get(name), (kind, row["update"], name)


def test_two_processes_give_the_losses_of_one(arena, two):
    """Twenty updates: losses and gradient norms to 1e-6, the same examples, and evaluations with the same answers."""
    assert_close(two, arena.folder / "alone")


def test_three_processes_with_unequal_shares_give_the_losses_of_one(arena):
    """Four or five micro-batches an update for three processes, and fewer evaluation batches than that."""
    assert run_together(arena, "three", 3, *UPDATES) == [0, 0, 0], console(arena, "three")
    assert_close(arena.folder / "three", arena.folder / "alone")
    assert "3 processes, 3 on this machine, sums by gloo" in arena.console("three").read_text()


def test_two_runs_of_two_processes_are_the_same_bit_for_bit(arena, two):
    """Weights, optimizer, random states, counters, metric rows and exports by sha256."""
    assert run_together(arena, "two again", 2, *UPDATES) == [0, 0], console(arena, "two again")
    assert differences(arena.folder / "two again", two) == []


def test_a_signal_to_one_process_stops_all_and_another_number_goes_on(arena):
    """SIGTERM to process 1 alone: both leave with 143 at the same update, saved; three processes go on at the next batch."""
    fault = ("tests.resume.placing:signal_at", {"place": "micro-batch", "number": int(signal.SIGTERM), "call": 17})
    plain = (*UPDATES, "--run.signal_exit", "code")
    assert run_together(arena, "stopped", 2, *plain, before={1: [fault]}) == [143, 143], console(arena, "stopped")
    stopped_at = summary(arena, "stopped")["updates"]
    assert summary(arena, "stopped")["exit_code"] == 143 and 0 < stopped_at < 20
    assert newest_checkpoint(arena.folder / "stopped").name.startswith(f"u{stopped_at:08d}")
    assert run_together(arena, "stopped", 3, *plain) == [0, 0, 0], console(arena, "stopped")
    assert order(arena.folder / "stopped") == order(arena.folder / "alone")
    assert_close(arena.folder / "stopped", arena.folder / "alone")
    changed = [row["changed_conditions"] for row in whole_rows(arena.folder / "stopped") if row["kind"] == "start"]
    assert changed == [[], ["processes: 2 -> 3"]]


def test_a_signal_while_process_0_prepares_stops_those_that_wait(arena):
    """Nothing is left behind, and both die by the signal that one of them got."""
    fault = ("tests.resume.placing:signal_at", {"place": "preparing", "number": int(signal.SIGTERM)})
    store = arena.folder / "never"
    assert run_together(arena, "early", 2, "--data.store", store, before={0: [fault]}) == [-15, -15], console(arena, "early")
    assert not store.exists()


def test_a_held_run_directory_sends_all_processes_away(arena):
    """Process 0 finds it held; the other, which looks at no lock, leaves with the same code and says why."""
    with RunLock(arena.folder / "held"):
        assert run_together(arena, "held", 2) == [69, 69]
    assert "process 0 failed: run error" in arena.console("held").read_text()


def test_one_process_without_memory_makes_all_cut_smaller(arena):
    """The update is done again by all with half the micro-batches, and the run sees the same examples."""
    fault = ("tests.resume.several:run_out_of_memory", {"call": 5})
    assert run_together(arena, "short", 2, *UPDATES, before={1: [fault]}) == [0, 0], console(arena, "short")
    guard_rows = [row for row in whole_rows(arena.folder / "short") if row["kind"] == "guard"]
    assert [row["action"] for row in guard_rows] == ["out of memory"] and "process 1: no room" in guard_rows[0]["why"]
    assert order(arena.folder / "short") == order(arena.folder / "alone")


def test_what_one_process_finds_not_finite_no_process_applies(arena):
    """NaN in a gradient of process 1: the update is refused by both, and their weights stay equal to the end."""
    fault = ("tests.resume.placing:spoil", {"place": "gradient", "update": 6, "updates": 1})
    assert run_together(arena, "spoilt", 2, *UPDATES, before={1: [fault]}) == [0, 0], console(arena, "spoilt")
    guard_rows = [row for row in whole_rows(arena.folder / "spoilt") if row["kind"] == "guard"]
    assert [(row["action"], row["attempted"]) for row in guard_rows] == [("skip", 6)]
    assert math.isnan(float(guard_rows[0]["gradient_norm"]))


def test_weights_that_drift_apart_end_the_run(arena):
    """One changed weight in process 1 is found at the next evaluation, and nothing is saved after it."""
    fault = ("tests.resume.placing:spoil", {"place": "parameter", "update": 6, "value": "0.5"})
    assert run_together(arena, "drifted", 2, *UPDATES, before={1: [fault]}) == [70, 70], console(arena, "drifted")
    assert "weights of the processes differ" in console(arena, "drifted")


def test_a_process_that_says_nothing_is_not_waited_for_without_end(arena):
    """After its patience the other one saves what stands and leaves with 75."""
    faults = {index: [("tests.resume.several:fall_silent", {"call": 9 + 999 * index, "patience_s": 3.0})] for index in (0, 1)}
    silent, other = start_together(arena, "silent", 2, *UPDATES, before={1: faults[0], 0: faults[1]})[::-1]
    assert arena.server.wait(other) == 75, console(arena, "silent")
    os.kill(silent, signal.SIGKILL)
    arena.server.wait(silent)
    assert "has not answered for" in console(arena, "silent")
    assert newest_checkpoint(arena.folder / "silent").name.startswith(f"u{summary(arena, 'silent')['updates']:08d}")


def test_processes_with_other_settings_do_not_start(arena):
    """One machine with another learning rate in its file: nothing is written, and both say what differs."""
    assert run_together(arena, "unlike", 2, own={1: ["--optim.lr", "0.1"]}) == [2, 2]
    assert "processes 0 and 1 differ: settings" in console(arena, "unlike")
    assert not (arena.folder / "unlike" / "environment.json").exists()


def test_an_optimizer_that_steps_in_backward_is_refused(arena):
    """It moves weights before the gradients of the others have come; both processes name the setting."""
    settings = {"optim.name": "adafactor_in_backward", "optim.clip_norm": 0, "batch.groups_per_update": 1}
    more = [word for name, value in settings.items() for word in (f"--{name}", value)]
    assert run_together(arena, "in backward", 2, *more, "--batch.micro_tokens", "auto") == [2, 2]
    assert "optim.name: adafactor_in_backward" in console(arena, "in backward")


def test_a_killed_process_in_a_save_loses_nothing(fork_server, tmp_path, record_property):
    """R22: the other one leaves with 75, every commit is whole, and in the end the run is the run that was left alone."""
    figures, _ = attack_lost(fork_server, tmp_path, KILLS, seed=1)
    record_property("trials", figures["kills"])
    record_property("slowest_exit_of_the_other_s", figures["slowest_exit_of_the_other_s"])
    assert figures["bad"] == [] and figures["different"] == []
    assert figures["kills"] == KILLS


def test_torchrun_starts_a_run_of_two_processes(arena):
    """The launcher itself, with interpreters of their own that come to a clean end: exit 0, and the run of two."""
    more = ("--schedule.max_updates", "4", "--evaluation.restore_examples", "0")
    argv = [*map(str, arena.argv("launched", *more))]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    done = subprocess.run([*torchrun, "bin/train", *argv], cwd=ROOT, capture_output=True, text=True, timeout=4 * LIMIT_S)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 processes, 2 on this machine" in done.stdout
    assert summary(arena, "launched")["updates"] == 4


def test_a_process_whose_partner_is_killed_says_so_and_leaves_with_75(arena):
    """In interpreters of their own, as srun starts them: no hang, no abort, and what was trained is saved."""
    argv, port = [*map(str, arena.argv("bereft", "--schedule.max_updates", "5000"))], free_port()
    pair = []
    for index in range(2):
        own = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **{name: str(value) for name, value in own.items()}, "OMP_NUM_THREADS": "1"}
        pair.append(
            subprocess.Popen([sys.executable, "bin/train", *argv], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        )
    until = time.monotonic() + 2 * LIMIT_S
    while not metric_rows(arena.folder / "bereft", "train") and time.monotonic() < until:
        time.sleep(0.1)
    pair[1].kill()
    error_output = pair[0].communicate(timeout=LIMIT_S)[1]
    pair[1].communicate(timeout=LIMIT_S)
    assert pair[0].returncode == 75, error_output
    assert "process lost: another process of this run is gone" in error_output
    last = metric_rows(arena.folder / "bereft", "train")[-1]["update"]
    assert int(newest_checkpoint(arena.folder / "bereft").name[1:9]) >= last == 3 * (last // 3)
