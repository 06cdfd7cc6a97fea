"""bin/train as a user meets it. Run: python -m pytest tests/commands/test_train.py"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from tests.conftest import ROOT, read_summary

SUMMARY_KEYS = {
    "status",
    "stop_reason",
    "exit_code",
    "updates",
    "best",
    "last",
    "target_tokens",
    "wall_s",
    "peak_memory_mib",
    "useful_token_share",
}
SENTENCES = "患者因高血压入院，给予氨氯地平口服。头痛三天，血压升高明显。\n" * 3


def test_a_finished_run_leaves_the_tree_that_the_readme_shows(finished):
    """Every file of the run directory is there, and every checkpoint is whole."""
    names = {path.name for path in finished.iterdir()}
    assert {
        "config.yaml", "environment.json", "metrics.jsonl", "train.log", "summary.json", "tensorboard", "checkpoints",
        "best.json", "last.json", "export", "store",
    } <= names  # fmt: skip
    for checkpoint in (finished / "checkpoints").glob("u*"):
        files = {path.name for path in checkpoint.iterdir()}
        assert files == {"model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "MANIFEST.json"}


def test_the_summary_has_its_fields(finished):
    """Scripts rely on these names."""
    summary = read_summary(finished)
    assert summary.keys() >= SUMMARY_KEYS
    assert set(summary["best"]) == set(summary["last"]) == {"update", "loss", "term_restoration"}
    assert (summary["status"], summary["stop_reason"], summary["exit_code"]) == ("finished", "max_updates", 0)
    assert summary["best"]["loss"] < summary["before_training"]["loss"]


def test_the_export_is_loaded_by_transformers_and_gives_the_loss_of_the_run(finished):
    """from_pretrained finds model and tokenizer, and the weights are those of the best checkpoint."""
    model = AutoModelForSeq2SeqLM.from_pretrained(finished / "export" / "best", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(finished / "export" / "best")
    assert tokenizer.convert_tokens_to_ids("<extra_id_0>") == max(
        tokenizer.convert_tokens_to_ids(f"<extra_id_{k}>") for k in range(100)
    )
    encoded = tokenizer("患者<extra_id_0>入院", return_tensors="pt")
    out = model(**encoded, labels=encoded["input_ids"])
    assert torch.isfinite(out.loss)
    assert model.shared.weight.shape[0] >= len(tokenizer)


def test_the_launcher_works_from_any_folder_and_through_a_symlink(tmp_path):
    """bin/train finds its package by the installation, not by the folder it is called from."""
    link = tmp_path / "train"
    link.symlink_to(ROOT / "bin" / "train")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([str(link), "--version"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("resilient_t5 ")


def test_help_is_there_before_torch_could_be_imported():
    """Under 3 seconds."""
    started_s = time.monotonic()
    code = "import sys; from resilient_t5.commands.train import main; main(['--help'])"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert time.monotonic() - started_s < 3.0
    assert done.returncode == 0
    assert " torch\n" not in done.stderr


def test_the_run_trained_in_full_ids_restores_too(fork_server, tiny_config, tmp_path):
    """`active_vocabulary: full` is first-class: the same store, every row trained, an export that loads."""
    run = tmp_path / "run"
    argv = ["--config", tiny_config, "--run.dir", run, "--model.active_vocabulary", "full", "--schedule.max_updates", "4"]
    assert fork_server.run(argv, tmp_path / "console.txt") == 0, (tmp_path / "console.txt").read_text()
    assert read_summary(run)["best"]["loss"] < read_summary(run)["before_training"]["loss"]


@pytest.mark.slow
def test_adafactor_and_bf16_train_and_resume(fork_server, tiny_config, tmp_path):
    """The other optimizer and the other format go through the same loop."""
    argv = [
        "--config", tiny_config, "--run.dir", tmp_path / "run", "--optim.name", "adafactor", "--optim.lr", "0.01",
        "--hardware.precision", "bf16", "--schedule.max_updates", "4", "--schedule.shape", "constant", "--schedule.warmup", "2",
    ]  # fmt: skip
    console = tmp_path / "console.txt"
    assert fork_server.run(argv, console) == 0, console.read_text()
    longer = [*argv, "--schedule.max_updates", "6"]
    assert fork_server.run(longer, console) == 0, console.read_text()
    assert read_summary(tmp_path / "run")["updates"] == 6


# Bad input: one clear message, the exit code of the design, nothing written over.


@pytest.fixture
def train(fork_server, tiny_config, tmp_path):
    """Runs bin/train over the tiny configuration and returns exit status and console."""

    def run(*argv, config=tiny_config):
        output = tmp_path / f"console-{time.monotonic_ns()}.txt"
        status = fork_server.run(["--config", config, "--run.dir", tmp_path / "run", *argv], output)
        return status, output.read_text()

    return run


def assert_refused(result, code, *words):
    """The exit code, the words, and no traceback."""
    status, console = result
    assert status == code, console
    assert "Traceback" not in console
    for word in words:
        assert word in console, console


def test_a_missing_file_is_named(train):
    """Exit 65."""
    assert_refused(train("--data.train", "absent.txt"), 65, "absent.txt")


def test_an_empty_corpus_is_told(train, tmp_path):
    """Exit 65."""
    (tmp_path / "empty.txt").touch()
    assert_refused(train("--data.train", tmp_path / "empty.txt"), 65, "empty.txt")


def test_a_corpus_without_any_term_of_the_list_is_told(train, tmp_path):
    """Exit 65: a term list that matches nothing is a mistake."""
    (tmp_path / "text.txt").write_text(SENTENCES + "\n\n血糖偏高。\n", encoding="utf-8")
    (tmp_path / "terms.txt").write_text("xylophone\n", encoding="utf-8")
    text, terms = tmp_path / "text.txt", tmp_path / "terms.txt"
    result = train("--data.train", text, "--data.terms", terms, "--tokenizer.train_vocab_size", "320")
    assert_refused(result, 65, "terms.txt")


def test_a_term_list_with_blanks_and_duplicates_is_cleaned(train, tmp_path):
    """The run starts, and the report counts what was dropped."""
    text = "".join(f"患者{i}因高血压入院，给予氨氯地平{i}毫克口服。\n\n" for i in range(40))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    (tmp_path / "terms.txt").write_text("高血压\n\n高血压\n  氨氯地平  \n\n", encoding="utf-8")
    status, console = train(
        "--data.train", tmp_path / "text.txt", "--data.terms", tmp_path / "terms.txt",
        "--tokenizer.train_vocab_size", "320", "--schedule.max_updates", "2",
    )  # fmt: skip
    assert status == 0, console
    report = json.loads((tmp_path / "run" / "store" / "report.json").read_text())
    assert report["terms"]["listed"] == report["terms"]["found"] == 2


def test_text_that_is_not_utf8_is_named_with_its_byte(train, tmp_path):
    """Exit 65, file and offset."""
    (tmp_path / "bad.txt").write_bytes(("患者因高血压入院。\n" * 20).encode() + b"\xff\xff\n" + "好\n".encode())
    assert_refused(train("--data.train", tmp_path / "bad.txt"), 65, "bad.txt", "560")


def test_a_model_directory_without_weights_is_told(train, tmp_path, finished):
    """Exit 65, and the message names what it looks for."""
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (model / name).write_bytes((finished / "export" / "best" / name).read_bytes())
    config = tmp_path / "model.yaml"
    config.write_text(f"data: {{train: 'builtin:clinical', sample_notes: 100}}\nmodel: {{name_or_path: {model}}}\n")
    assert_refused(train(config=config), 65, "safetensors", str(model))


def test_a_typo_is_refused_before_anything_is_written(train, tmp_path):
    """Exit 2, the nearest right name."""
    assert_refused(train("--optim.lrr", "1"), 2, "optim.lr")
    assert not (tmp_path / "run").exists()


def test_a_directory_with_other_files_is_left_alone(train, tmp_path):
    """Exit 2."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert_refused(train(), 2, "notes.txt")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_a_directory_that_another_process_holds_is_refused(fork_server, tiny_config, tmp_path):
    """Exit 69, and the message names the process."""
    argv = ["--config", tiny_config, "--run.dir", tmp_path / "run", "--schedule.max_updates", "2000"]
    first = fork_server.start(argv, tmp_path / "first.txt")
    until = time.monotonic() + 30
    while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < until:
        time.sleep(0.01)
    status = fork_server.run(argv, tmp_path / "second.txt")
    os.kill(first, 15)
    assert fork_server.wait(first) == -15
    assert status == 69
    assert str(first) in (tmp_path / "second.txt").read_text()
