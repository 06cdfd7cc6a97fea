"""The examples run and print what their comments promise. Run: python -m pytest tests/test_examples.py

`restore.py` runs on a finished tiny run. The shell scripts run in an empty folder with fewer notes and updates.
"""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow

EXAMPLES = ROOT / "examples"
LESS_WORK = ("--data.sample_notes", "400", "--schedule.max_updates")


def run_script(name, folder, *arguments):
    """Standard output of a shell example that must succeed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", EXAMPLES / name, folder, *arguments], env=environment, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_example_is_short_and_linked_from_the_readme():
    """Under 40 lines each; a reader of the README finds all of them."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    names = {path.name for path in EXAMPLES.iterdir() if path.is_file()}
    assert names == {"restore.py", "train_and_restore.sh", "resume_after_kill.sh"}
    for name in names:
        assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) < 40, name
        assert f"(examples/{name})" in readme, name


def test_three_sentences_are_restored_in_plain_transformers_and_through_the_package(finished, monkeypatch, capsys):
    """Both ways print every sentence with its text around the gap unchanged; the package fills every gap."""
    script = EXAMPLES / "restore.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(finished / "export" / "best")])
    names = runpy.run_path(str(script), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    for prefix, printed in (("transformers: ", lines[:3]), ("resilient_t5: ", lines[3:])):
        for sentence, line in zip(names["SENTENCES"], printed, strict=True):
            before, after = sentence.split(names["GAP"])
            assert line.startswith(prefix + before) and after in line
    assert not any(names["GAP"] in line for line in lines[3:])


def test_training_restoring_and_evaluating_from_an_empty_folder(tmp_path):
    """The sentence comes back with both gaps filled, and the evaluation prints its table."""
    printed = run_script("train_and_restore.sh", tmp_path / "new", *LESS_WORK, "4")
    assert re.search(r"^My uncle, 64, has gout\. Drug: (?!\[\?]).*; dose: (?!\[\?]).*\.$", printed, re.MULTILINE)
    assert "term rate" in printed
    assert (tmp_path / "new" / "resilience.png").is_file()


def test_a_killed_run_is_resumed_from_a_checkpoint_of_a_trained_update(tmp_path):
    """The first start is new and dies with SIGKILL; the second one resumes after update 0."""
    printed = run_script("resume_after_kill.sh", tmp_path / "new", *LESS_WORK, "20")
    assert "exit status 137" in printed
    first, second = printed.splitlines()[-2:]
    assert first == '"resumed_from": null'
    assert re.fullmatch(r'"resumed_from": "u000000(05|10|15)-\d+"', second)
