"""bin/restore and bin/export from the command line. Run: python -m pytest tests/commands/test_restore.py"""

import io
import json
import os
import shutil
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from resilient_t5.commands.export import main as export
from resilient_t5.commands.restore import main as restore
from resilient_t5.restoration.restoration_config import read_restoration_config
from tests.conftest import read_summary

TEXT = "诊断：抑郁症。处方：[?]；剂量：每次50毫克。\r\nDiagnosis: [?]. Course: [?][?]\n"


@pytest.fixture
def call(monkeypatch, capfdbinary):
    """Runs a command with bytes on standard input; gives its code, standard output and standard error."""

    def run(command, *argv, stdin=b""):
        torch.set_num_threads(1)
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(stdin)))
        try:
            code = command([str(item) for item in argv])
        except SystemExit as left:
            code = left.code
        out, error = capfdbinary.readouterr()
        return code, out, error.decode()

    return run


@pytest.mark.slow
def test_a_text_comes_back_with_its_gaps_filled_and_every_other_byte(call, finished, tmp_path):
    """File and standard input, UTF-8 and GB18030, CRLF kept: the same characters, each in its own encoding."""
    results = []
    for encoding in ("utf-8", "gb18030", "utf-16"):
        (tmp_path / "text.txt").write_bytes(TEXT.encode(encoding))
        code, out, error = call(restore, finished, tmp_path / "text.txt")
        assert code == 0 and "4 gaps" in error, error
        assert call(restore, finished, "-", stdin=TEXT.encode(encoding))[1] == out
        results.append(out.decode(encoding))
        parts, rest = TEXT.split("[?]"), results[-1]
        assert rest.startswith(parts[0]) and rest.endswith(parts[-1])
        for part in parts:
            assert part in rest
            rest = rest[rest.index(part) + len(part) :]
    assert results[0] == results[2]


def test_json_lists_every_gap(call, finished, tmp_path):
    """Offset, line, mark, fill, probability, alternatives; the fills are those of the text output."""
    code, out, _ = call(restore, finished, "--json", "--alternatives", "2", "--beams", "2", stdin=TEXT.encode())
    rows = [json.loads(line) for line in out.decode().splitlines()]
    assert code == 0 and [row["gap"] for row in rows] == [0, 1, 2, 3]
    assert [row["line"] for row in rows] == [1, 2, 2, 2]
    for row in rows:
        assert TEXT[row["offset"] : row["offset"] + len(row["mark"])] == row["mark"] == "[?]"
        assert row["fill"].strip() and 0 <= row["probability"] <= 1 and len(row["alternatives"]) == 2
    text = TEXT
    for row in reversed(rows):
        text = text[: row["offset"]] + row["fill"] + text[row["offset"] + 3 :]
    code, _, _ = call(restore, finished, "--beams", "2", "--output", tmp_path / "out.txt", stdin=TEXT.encode())
    assert code == 0 and (tmp_path / "out.txt").read_bytes() == text.encode()
    assert [path.name for path in tmp_path.iterdir()] == ["out.txt"]


@pytest.mark.parametrize(
    ("argv", "stdin", "code", "words"),
    [
        ((), "没有空缺□□", 65, ["[?]", "--mark", "□□"]),
        ((), "no gap", 65, ["[?]", "--mark"]),
        (("--mark", ""), "x", 2, ["--mark"]),
        (("--beams", "0"), "[?]", 2, ["--beams"]),
        (("--alternatives", "-1"), "[?]", 2, ["--alternatives"]),
        (("--max_sentinels", "0"), "[?]", 2, ["--max_sentinels"]),
        (("--encoding", "klingon"), "[?]", 2, ["--encoding", "klingon"]),
        (("--encoding", "ascii"), "患[?]", 65, ["ASCII", "byte 0", "--encoding"]),
        ((), b"\x81\xff\xfe[?]", 65, ["0x81", "standard input is not"]),
        ((), b"\x00\x01\x02" * 50, 65, ["binary"]),
        (("--nonsense",), "[?]", 2, ["--nonsense"]),
        (("--output", "/nowhere/out.txt"), "[?]", 74, ["--output /nowhere/out.txt", "no directory /nowhere"]),
        (("--output", "/"), "[?]", 74, ["--output /", "directory"]),
    ],
)
def test_a_mistake_is_reported_with_a_hint_and_nothing_is_written(call, finished, argv, stdin, code, words):
    """The exit code of the design, no traceback, nothing on standard output."""
    found, out, error = call(restore, finished, "-", *argv, stdin=stdin if isinstance(stdin, bytes) else stdin.encode())
    assert found == code, error
    assert "Traceback" not in error and out == b""
    for word in words:
        assert word in error


def test_an_empty_text_stays_empty(call, finished):
    """No text, or only a byte order mark: the same comes back, exit 0."""
    for content in (b"", b"\xef\xbb\xbf"):
        assert call(restore, finished, stdin=content)[:2] == (0, content)


def test_a_directory_that_is_no_t5_is_refused(call, finished, tmp_path):
    """65 with what is wrong: nothing there, another kind of model, no weights, no tokenizer, a damaged file."""
    best = finished / "export" / "best"

    def damaged(name, change):
        directory = tmp_path / name
        shutil.copytree(best, directory)
        change(directory)
        return directory

    def other_kind(directory):
        content = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**content, "model_type": "bert"}))

    cases = [
        (tmp_path / "absent", "absent"),
        (tmp_path, "config.json"),
        (damaged("bert", other_kind), "bert"),
        (damaged("bare", lambda d: (d / "model.safetensors").unlink()), "weights"),
        (damaged("cut", lambda d: (d / "model.safetensors").write_bytes(b"x" * 100)), "safetensors"),
        (damaged("usage", lambda d: (d / "restoration.json").write_text("[]")), "restoration.json"),
        (damaged("silent", lambda d: [(d / n).unlink() for n in ("tokenizer.json", "spiece.model")]), "tokenizer"),
    ]
    for model, word in cases:
        code, out, error = call(restore, model, stdin=b"[?]")
        assert (code, out) == (65, b""), (model, error)
        assert word in error and "Traceback" not in error


def test_a_checkpoint_from_elsewhere_is_used_with_the_defaults_of_t5(call, finished, tmp_path):
    """Without restoration.json the command reports which limits it uses, and works."""
    shutil.copytree(finished / "export" / "best", tmp_path / "plain")
    (tmp_path / "plain" / "restoration.json").unlink()
    code, out, error = call(restore, tmp_path / "plain", stdin=TEXT.encode())
    assert code == 0 and "27 gaps" in error and b"[?]" not in out


def test_the_exports_of_a_run_carry_a_card_and_how_they_are_used(finished):
    """README.md with the figures and the command, restoration.json with the limits of training, in best and in last."""
    for which in ("best", "last"):
        directory = finished / "export" / which
        card = (directory / "README.md").read_text(encoding="utf-8")
        for words in (
            "library_name: transformers",
            "masked terms",
            "majority guess",
            "95 % interval",
            "## Training",
            "| tokens |",
        ):
            assert words in card
        config = read_restoration_config(directory)
        assert (config.max_source_tokens, config.max_target_tokens, config.max_sentinels, config.document) == (
            96,
            48,
            10,
            "line",
        )
        assert not list(directory.parent.glob(".*"))


def test_a_run_is_exported_from_its_checkpoints_alone(call, finished, tmp_path):
    """bin/export gives the weights that bin/train exported, bit for bit, with the licence in the card."""
    target = tmp_path / "out" / "model"
    assert call(export, finished, "--which", "last", "--to", target, "--license", "apache-2.0")[0] == 0
    for name in ("model.safetensors", "config.json", "restoration.json", "generation_config.json", "tokenizer.json"):
        assert (target / name).read_bytes() == (finished / "export" / "last" / name).read_bytes(), name
    assert 'license: "apache-2.0"' in (target / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_an_interrupted_run_is_exported_and_a_held_one_only_elsewhere(call, fork_server, tiny_config, tmp_path):
    """While it trains: 69 into its own export/, 0 into another directory; after SIGTERM: 0, and the model fills gaps."""
    run = tmp_path / "run"
    argv = ["--config", tiny_config, "--run.dir", run, "--schedule.max_updates", "3000", "--evaluation.restore_every", "0"]
    process = fork_server.start(argv, tmp_path / "console.txt")
    until = time.monotonic() + 60
    while len(list((run / "checkpoints").glob("u*"))) < 2 and time.monotonic() < until:
        time.sleep(0.02)
    code, _, error = call(export, run)
    assert code == 69, error
    code, _, error = call(export, run, "--which", "last", "--to", tmp_path / "live")
    assert code == 0, error
    os.kill(process, 15)
    fork_server.wait(process)
    assert read_summary(run)["status"] == "interrupted"
    assert call(restore, run, stdin=b"[?]")[0] == 65
    for which in ("best", "last"):
        code, _, error = call(export, run, "--which", which)
        assert code == 0, error
    code, out, error = call(restore, run, stdin=TEXT.encode())
    assert code == 0 and b"[?]" not in out, error


def test_export_refuses_what_it_must_not_touch(call, finished, tmp_path):
    """A directory with files, a directory that is no run, a licence that is no identifier: 2; no checkpoint: 66."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert call(export, finished, "--to", tmp_path / "mine")[0] == 2
    assert call(export, tmp_path / "mine")[0] == 2
    assert call(export, finished, "--license", "my own\nlicence", "--to", tmp_path / "x")[0] == 2
    shutil.copytree(finished, tmp_path / "copy", ignore=shutil.ignore_patterns("u0*", "tensorboard"))
    code, _, error = call(export, tmp_path / "copy")
    assert code == 66 and "Traceback" not in error


def test_a_damaged_checkpoint_is_skipped_and_stays(call, finished, tmp_path):
    """The next older one is exported; the damaged one is not moved, since an export only reads."""
    run = tmp_path / "copy"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("tensorboard"))
    newest = sorted((run / "checkpoints").glob("u*"))[-1]
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (newest / "model.safetensors").write_bytes(bytes(content))
    code, out, error = call(export, run, "--which", "last", "--to", tmp_path / "out")
    assert code == 0 and newest.name.encode() not in out, error
    assert newest.is_dir()


def test_plain_transformers_uses_the_export_unchanged(call, finished):
    """AutoTokenizer and generate need nothing but the directory: trained ids only, no longer than the trained answers."""
    directory = finished / "export" / "best"
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    source = tokenizer("诊断：抑郁症。处方：<extra_id_0>；剂量：每次50毫克。", return_tensors="pt")
    assert model.generate(**source).shape[1] <= read_restoration_config(directory).max_target_tokens + 1
    code, out, _ = call(restore, directory, "--mark", "<extra_id_0>", "--json", stdin="处方：<extra_id_0>；".encode())
    assert code == 0 and json.loads(out)["mark"] == "<extra_id_0>"
