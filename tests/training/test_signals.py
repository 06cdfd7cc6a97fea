"""Signals and the STOP file. Run: python -m pytest tests/training/test_signals.py"""

import os
import signal
import subprocess
import sys
import time

import pytest

from resilient_t5.training import signals
from resilient_t5.training.signals import StopSignal


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=["INT", "TERM", "HUP"]
)
def test_a_stopping_signal_only_sets_a_flag(number, code):
    """The flag holds the signal and its exit code; nothing is raised."""
    with StopSignal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert stop.requested
        assert stop.exit_code == code


def test_the_first_signal_decides_the_exit_code():
    """SIGTERM from a scheduler after Ctrl-C changes nothing."""
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert stop.exit_code == 130


def test_sigusr1_asks_for_a_save_and_does_not_stop():
    """Save now, then continue."""
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.01)
        assert stop.save_requested
        assert not stop.requested


def test_a_stop_file_counts_as_the_first_ctrl_c(tmp_path, monkeypatch):
    """For services, and systems without signals."""
    monkeypatch.setattr(signals, "STOP_FILE_POLL_S", 0.0)
    with StopSignal(tmp_path) as stop:
        assert not stop.requested
        (tmp_path / "STOP").touch()
        assert stop.requested
        assert stop.exit_code == 130


def test_handlers_are_restored():
    """No handler stays installed."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with StopSignal():
        pass
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_an_ignored_signal_stays_ignored():
    """nohup ignores SIGHUP; the run must not change that."""
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, former)


CHILD = """
import sys, time
from resilient_t5.training.signals import StopSignal, die_by
with StopSignal() as stop:
    print("ready", flush=True)
    until = time.monotonic() + 20
    while time.monotonic() < until and not (stop.requested and sys.argv[1] == "once"):
        time.sleep(0.005)
if stop.received is not None:
    die_by(stop.received)
"""


def start(mode):
    """Start a child that waits for signals."""
    child = subprocess.Popen([sys.executable, "-c", CHILD, mode], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    return child


def test_a_stopped_process_dies_by_the_signal_itself():
    """Its parent sees a signal death, which a shell reports as 128 + number."""
    child = start("once")
    child.send_signal(signal.SIGTERM)
    assert child.wait(10) == -signal.SIGTERM


def test_a_second_ctrl_c_leaves_at_once_with_130():
    """Even if the loop never polls the flag."""
    child = start("never")
    child.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert child.poll() is None
    child.send_signal(signal.SIGINT)
    assert child.wait(2) == 130
