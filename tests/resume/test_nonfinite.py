"""NaN and infinity never reach a checkpoint. Run: python -m pytest tests/resume/test_nonfinite.py

RESILIENT_T5_NAN makes it longer.
"""

import json
import os

import pytest

from tests.resume.harness import Arena, differences, whole_rows
from tests.resume.nonfinite import SHORT, attack_nonfinite

pytestmark = pytest.mark.slow

TRIALS = int(os.environ.get("RESILIENT_T5_NAN", "21"))


def test_nothing_that_is_not_finite_is_committed_and_the_guard_keeps_its_promise(fork_server, tmp_path, record_property):
    """R17: in loss, gradient, parameter, optimizer and metric, useless batches, once and for good: skip, roll back, give up."""
    figures, _ = attack_nonfinite(fork_server, tmp_path, TRIALS, seed=1)
    record_property("trials", figures["trials"])
    assert figures["bad"] == []


def test_a_rollback_that_is_killed_right_after_its_commit_is_not_forgotten(fork_server, tmp_path):
    """What the guard passes over is in the checkpoint that the rollback committed; the killed run ends as the other one."""
    arena = Arena(fork_server, tmp_path, SHORT)
    spoil = [("tests.resume.placing:spoil", {"place": "gradient", "update": 4, "updates": 4})]
    reference = arena.finish("reference", before=spoil)
    rows = [row for row in whole_rows(reference) if row["kind"] == "guard"]
    assert [row["action"] for row in rows] == ["skip"] * 3 + ["rollback", "rolled back"]
    assert [row["gradient_norm"] for row in rows[:3]] == ["nan"] * 3 and all(len(row["examples"]) == 8 for row in rows[:4])
    assert rows[-1]["passed_over"] == [[4, 7]]
    kill = ("tests.resume.placing:kill_after_rollback", {})
    assert arena.server.run(arena.argv("killed"), arena.console("killed"), [*spoil, kill]) == -9
    # The second process is not spoilt: only what the first one committed keeps it from the four updates.
    assert differences(arena.finish("killed"), reference) == []


def test_a_diagnosis_says_what_was_seen_and_what_to_try(fork_server, tmp_path):
    """Exit 70 after three rollbacks; raw values, examples, the newest healthy checkpoint still there."""
    arena = Arena(fork_server, tmp_path, SHORT)
    spoil = [("tests.resume.placing:spoil", {"place": "loss", "update": 5, "updates": 1000, "value": "inf"})]
    assert arena.server.run(arena.argv("run"), arena.console("run"), spoil) == 70
    diagnosis = json.loads((tmp_path / "run" / "diagnosis.json").read_text())
    assert "3 rollbacks did not help" in diagnosis["why"]
    assert diagnosis["rollbacks"] == 3 and len(diagnosis["last_losses"]) > 0 and diagnosis["advice"]
    assert {row["loss"] for row in diagnosis["guard_rows"] if row["action"] == "skip"} == {"inf"}
    assert "diagnosis.json" in arena.console("run").read_text()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "diverged"
