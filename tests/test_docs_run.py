"""The commands in the documents run. Run: python -m pytest tests/test_docs_run.py

The first page runs unchanged in a shell, with a shorter training. All other commands run in a folder that has the files that
the pages mention: text, terms, a run of each name, and a model under its hub name. Additional settings reduce the amount of
work. Every command runs: none needs a GPU or the hub.
"""

import contextlib
import gzip
import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from resilient_t5.commands import evaluate, export, plan, prepare, replay, restore
from resilient_t5.data.corpus.sample import clinical_terms, generate_notes
from resilient_t5.restoration.beam_search import DecodeSettings
from resilient_t5.restoration.filler import open_filler
from resilient_t5.restoration.gaps import find_gaps
from resilient_t5.training.entrypoints.export import snippet
from tests.published import LAYOUTS, random_weights, write_layout
from tests.shown_commands import FIRST_RUN, ROOT, first_block, shown_commands

pytestmark = pytest.mark.slow

MAIN = {
    "bin/evaluate": evaluate.main,
    "bin/export": export.main,
    "bin/plan": plan.main,
    "bin/prepare": prepare.main,
    "bin/replay": replay.main,
    "bin/restore": restore.main,
}
LESS_WORK = {
    "bin/train": [
        *("--schedule.max_updates", "2", "--schedule.warmup", "1", "--batch.examples_per_update", "8"),
        *("--data.sample_notes", "120"),
        *("--evaluation.examples", "8", "--evaluation.restore_examples", "4"),
    ],
    "bin/evaluate": ["--examples", "8", "--curve_examples", "2"],
}
ONCE = list({(shown.launcher, shown.arguments, shown.stdin): shown for shown in shown_commands()}.values())
"""Commands without duplicates across pages."""
PUBLISHED = ("configs/mt5-small-4gb.yaml", "configs/seed.yaml")
"""Configurations that use the tokenizer of a published model; for others a small one is trained."""
OUTPUT_OPTIONS = ("--png", "--json", "--to")
"""Options whose value is a file or folder that the command creates."""


@pytest.fixture(scope="session")
def mt5(tmp_path_factory):
    """An mT5 with random weights in the layout of the hub, in place of google/mt5-small."""
    return write_layout(LAYOUTS["mt5-hub"], random_weights(untied=True), tmp_path_factory.mktemp("hub") / "mt5-small")


@pytest.fixture
def reader(finished, mt5, tiny_config, tmp_path, monkeypatch):
    """A folder with the files that the pages mention; the current directory."""
    notes = [note.text for note in generate_notes(60, 3)]
    for name in ("corpus/ward.txt", "notes/ward.txt", "reports/ward7.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("\n\n".join(notes), encoding="utf-8")
    (tmp_path / "terms.txt").write_text("\n".join(clinical_terms()), encoding="utf-8")
    (tmp_path / "note.txt").write_text("Diagnosis: gout. Drug: [?]; dose: [?].\n", encoding="utf-8")
    (tmp_path / "my.yaml").write_bytes(tiny_config.read_bytes())
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "google").mkdir()
    (tmp_path / "google" / "mt5-small").symlink_to(mt5)
    (tmp_path / "mt5-small").symlink_to(mt5)
    (tmp_path / "runs").mkdir()
    for name in ("a", "mine", "mt5", "other", "quickstart"):
        (tmp_path / "runs" / name).symlink_to(finished)
    losses = [3.0 + 4.0 / (1 + number) for number in range(40)]
    history = [{"step": 1000 * number, "eval_loss": loss} for number, loss in enumerate(losses, 1)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}), encoding="utf-8")
    curve = {"name": "one", "eval": [[1000 * number, loss] for number, loss in enumerate(losses, 1)]}
    (tmp_path / "CURVES.jsonl.gz").write_bytes(gzip.compress((json.dumps(curve) + "\n").encode()))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("shown", ONCE, ids=lambda shown: str(shown)[:70])
def test_a_shown_command_runs(shown, reader, fork_server, monkeypatch, capfd):
    """The exit code is 0, there is no traceback, and the named output files exist."""
    arguments = [*shown.arguments, *LESS_WORK.get(shown.launcher, ())]
    if shown.launcher == "bin/train":
        arguments += [] if set(PUBLISHED) & set(arguments) else ["--tokenizer.train_vocab_size", "700"]
        for run in (reader / "runs").iterdir():
            run.unlink()  # so that the run is new
        console = reader / "console.txt"
        code = fork_server.run(arguments, console, before=[("os:chdir", {"path": str(reader)})])
        output = console.read_text(encoding="utf-8")
    else:
        torch.set_num_threads(1)
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO((shown.stdin or "").encode())))
        code = MAIN[shown.launcher](arguments)
        output = "".join(capfd.readouterr())
    assert code == 0, output
    assert "Traceback" not in output
    for option, value in zip(arguments, arguments[1:], strict=False):
        assert option not in OUTPUT_OPTIONS or value.startswith("--") or (reader / value).exists(), value


def first_page(folder: Path, *shorter: str) -> str:
    """Run the commands of the first page without the installation, in a clone without runs; return the output."""
    (folder / "bin").symlink_to(ROOT / "bin")
    (folder / "configs").symlink_to(ROOT / "configs")
    lines = first_block(FIRST_RUN)
    assert len(lines) == 5
    assert [line.split()[0] for line in lines[:3]] == ["python3.11", "source", "python"]
    train, restored = lines[3:]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = f"set -e\n{train} {shlex.join(shorter)} >&2\n{restored}\n"
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def test_the_first_page_leads_to_a_restored_sentence(tmp_path):
    """With fewer notes and updates, its commands in a shell print the sentence with all gaps filled."""
    printed = first_page(tmp_path, "--schedule.max_updates", "4", "--data.sample_notes", "400")
    asked = shlex.split(first_block(FIRST_RUN)[4])[1]
    between = asked.split("[?]")
    assert printed.startswith(between[0]) and printed.endswith(between[-1] + "\n") and between[1] in printed
    assert "[?]" not in printed


def test_the_first_page_prints_its_sentence_and_plain_transformers_restores_the_same_texts(tmp_path):
    """The full quickstart prints the documented sentence. The documented Python code and bin/restore agree on 95 of 96 gaps."""
    shown = FIRST_RUN.read_text(encoding="utf-8").split("```")[3].strip()
    assert first_page(tmp_path).strip() == shown
    export = str(tmp_path / "runs" / "quickstart" / "export" / "best")
    notes = [note.text.replace(note.facts[number % 5], "[?]", 1) for number, note in enumerate(generate_notes(400, 4711))]
    wide = [text for text in notes if not text.isascii() and "[?]" in text][:48]
    texts = [*wide, *[text for text in notes if text.isascii() and "[?]" in text][:48]]
    filler, _ = open_filler(export)
    filled = filler.fill([(text, find_gaps(text, ["[?]"])) for text in texts], DecodeSettings())
    assert filled is not None and len(texts) == 96
    ours = [text.replace("[?]", fills[0].text, 1) for text, fills in zip(texts, filled, strict=True)]
    assert sum(one == other for one, other in zip(ours, map(plainly_filled(export), texts), strict=True)) >= 95


def plainly_filled(export: str):
    """Wrap the documented code in a function of a text that loads the model once."""
    code = snippet(export, "TEXT").replace('"TEXT"', "TEXT")
    loading, filling = code.split("source = ", 1)
    names: dict = {"TEXT": ""}
    exec(loading, names)

    def fill(text: str) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(f"source = {filling}", {**names, "text": text.replace("[?]", "<extra_id_0>")})
        return printed.getvalue().rstrip("\n")

    return fill
