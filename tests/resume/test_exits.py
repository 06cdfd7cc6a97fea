"""Leaving after a signal: soon, saved, with the right status. Run: python -m pytest tests/resume/test_exits.py

RESILIENT_T5_EXITS makes the random part longer.
"""

import json
import os
import signal
import time

import pytest

from tests.conftest import read_summary
from tests.resume.exits import attack_exits
from tests.resume.harness import Arena, committed_update, differences, whole_rows

pytestmark = pytest.mark.slow

EXITS = int(os.environ.get("RESILIENT_T5_EXITS", "24"))
SIGNAL = "tests.resume.placing:signal_at"


def test_a_signal_in_any_phase_ends_the_run_at_once_and_saved(fork_server, tmp_path, record_property):
    """R10: the status is the signal, everything done is on disk, nothing hangs.

    How soon is recorded, and asserted loosely: a machine with other work stretches every second of it.
    """
    figures, _ = attack_exits(fork_server, tmp_path, EXITS, seed=1)
    record_property("trials", figures["struck"])
    for name in ("median_s", "p99_s", "late", "limited"):
        record_property(name, figures[name])
    assert figures["struck"] >= 0.9 * EXITS
    assert figures["bad"] == {"wrong_codes": [], "unsaved": [], "hangs": []}
    assert figures["median_s"] < 2.0


@pytest.fixture(scope="module")
def arena(fork_server, tmp_path_factory):
    """A folder with a reference run that was left alone."""
    arena = Arena(fork_server, tmp_path_factory.mktemp("exits"))
    arena.finish("reference")
    return arena


def struck(arena, name, *more, faults=(), **strike):
    """Run with a signal placed in it; (exit status, seconds from the signal to the exit)."""
    stamp = arena.folder / f"{name}.stamp"
    place = (SIGNAL, {**strike, "number": int(strike["number"]), "stamp": str(stamp)})
    pid = arena.server.start(arena.argv(name, *more), arena.console(name), [*faults, place])
    status, ended_s = arena.server.wait_timed(pid)
    assert stamp.exists(), arena.console(name).read_text()[-1500:]
    return status, ended_s - json.loads(stamp.read_text())


def test_a_second_ctrl_c_leaves_at_once_and_loses_no_more_than_the_last_save(arena):
    """R11: 130 without waiting for the save; the next start goes on and ends the same."""
    status, _ = struck(arena, "twice", place="save", number=signal.SIGINT, call=20, times=2)
    assert status == 130
    assert differences(arena.finish("twice"), arena.folder / "reference") == []


def test_fifty_sigterms_are_one_and_are_counted(arena):
    """R11: no deadlock, one save, the count in the audit trail."""
    status, _ = struck(arena, "fifty", place="micro-batch", number=signal.SIGTERM, call=30, times=50)
    assert status == -signal.SIGTERM
    row = [row for row in whole_rows(arena.folder / "fifty") if row["kind"] == "signal"][-1]
    assert row["signal"] == "SIGTERM" and row["count"] == 50
    assert row["saved_update"] == row["update"] == committed_update(arena.folder / "fifty")
    assert differences(arena.finish("fifty"), arena.folder / "reference") == []


def test_under_nohup_a_hangup_is_no_reason_to_stop(arena):
    """R11: SIGHUP that was ignored before the start stays ignored; without nohup it stops the run with its own status."""
    ignore = ("tests.resume.placing:ignore_hangup", {})
    status, _ = struck(arena, "nohup", faults=[ignore], place="micro-batch", number=signal.SIGHUP, call=30)
    assert status == 0
    assert differences(arena.folder / "nohup", arena.folder / "reference") == []
    status, _ = struck(arena, "hangup", place="micro-batch", number=signal.SIGHUP, call=30)
    assert status == -signal.SIGHUP
    assert read_summary(arena.folder / "hangup")["exit_code"] == 129


def test_plain_exit_codes_are_an_option(arena):
    """For a caller that cannot tell a signal death."""
    options = ("--run.signal_exit", "code")
    status, _ = struck(arena, "plain", *options, place="micro-batch", number=signal.SIGTERM, call=30)
    assert status == 143
    assert differences(arena.finish("plain", *options), arena.folder / "reference") == []


def test_usr1_saves_and_goes_on_and_as_requeue_leaves_with_75(arena):
    """One signal, two meanings; the run is the same run after both."""
    status, _ = struck(arena, "usr1", place="micro-batch", number=signal.SIGUSR1, call=28)
    assert status == 0
    assert differences(arena.folder / "usr1", arena.folder / "reference") == []
    options = ("--run.on_usr1", "requeue")
    status, _ = struck(arena, "requeue", *options, place="micro-batch", number=signal.SIGUSR1, call=28)
    assert status == 75
    assert read_summary(arena.folder / "requeue")["status"] == "interrupted"
    assert differences(arena.finish("requeue", *options), arena.folder / "reference") == []


def test_usr2_prints_stacks_and_writes_where_the_run_stands(arena):
    """Training goes on, and nothing of the run changes."""
    status, _ = struck(arena, "usr2", place="micro-batch", number=signal.SIGUSR2, call=28)
    assert status == 0
    assert "most recent call first" in arena.console("usr2").read_text()
    values = json.loads((arena.folder / "usr2" / "status.json").read_text())
    assert 0 < values["update"] < values["total_updates"] == 18
    assert values["newest_checkpoint"].startswith("u")
    assert differences(arena.folder / "usr2", arena.folder / "reference") == []


def test_a_process_whose_save_hangs_is_gone_at_its_deadline(arena):
    """143 with the older commit; the half-written save is swept at the next start, which ends the same."""
    hang = ("tests.resume.placing:hang_at_write", {"call": 20})
    started_s = time.monotonic()
    options = ("--run.deadline_s", "1")
    status, seconds = struck(arena, "hangs", *options, faults=[hang], place="save", number=signal.SIGTERM, call=19)
    assert status == 143
    assert 0.9 < seconds < 6.0 and time.monotonic() - started_s < 60
    assert list((arena.folder / "hangs" / "checkpoints").glob(".tmp-*"))
    run = arena.finish("hangs", *options)
    assert not list((run / "checkpoints").glob(".tmp-*"))
    assert differences(run, arena.folder / "reference") == []


def test_a_full_disk_does_not_keep_a_process_from_leaving(arena):
    """The signal's save finds no room: the status is the signal all the same, and the console says what is on disk."""
    full = ("tests.resume.placing:fill_disk_from", {"call": 3})
    status, _ = struck(arena, "full", faults=[full], place="micro-batch", number=signal.SIGTERM, call=30)
    assert status == -signal.SIGTERM
    assert "is not saved, the newest on disk is" in arena.console("full").read_text()
    assert differences(arena.finish("full"), arena.folder / "reference") == []


def test_a_disk_that_is_full_for_a_while_costs_saves_and_nothing_else(arena):
    """By policy the run goes on, or waits; once there is room it saves again and ends as if nothing had been."""
    for policy in ("continue", "wait"):
        full = [("tests.resume.placing:fill_disk_from", {"call": 3, "free_again_after": 4})]
        run = arena.finish(f"full-{policy}", "--checkpoint.on_disk_full", policy, before=full)
        assert "no space" in arena.console(f"full-{policy}").read_text()
        assert differences(run, arena.folder / "reference") == []


def test_a_full_disk_stops_the_run_with_73_when_it_is_to(arena):
    """And the next start, with room, ends the same."""
    full = [("tests.resume.placing:fill_disk_from", {"call": 3})]
    options = ("--checkpoint.on_disk_full", "stop")
    assert arena.server.run(arena.argv("stop", *options), arena.console("stop"), full) == 73
    assert differences(arena.finish("stop", *options), arena.folder / "reference") == []


def test_a_device_that_fails_leaves_with_75_and_the_next_start_ends_the_same(arena):
    """What CUDA raises when its context is gone; nothing on the device is touched any more."""
    lost = [("tests.resume.placing:lose_device", {"call": 40})]
    assert arena.server.run(arena.argv("lost"), arena.console("lost"), lost) == 75
    assert "device lost" in arena.console("lost").read_text()
    assert read_summary(arena.folder / "lost")["status"] == "interrupted"
    assert differences(arena.finish("lost"), arena.folder / "reference") == []


def test_a_suspend_is_survived_on_a_cpu_and_ends_with_75_on_a_gpu(arena):
    """A clock that jumped; on the GPU only the device's name is a pretence, as there is none here."""
    woke = [("tests.resume.placing:sleep_machine", {"call": 8, "device": "cpu"})]
    run = arena.finish("woke", before=woke)
    assert "woke   after 3600 s of sleep" in arena.console("woke").read_text()
    assert differences(run, arena.folder / "reference") == []
    slept = [("tests.resume.placing:sleep_machine", {"call": 8, "device": "cuda"})]
    assert arena.server.run(arena.argv("slept"), arena.console("slept"), slept) == 75
    assert differences(arena.finish("slept"), arena.folder / "reference") == []
