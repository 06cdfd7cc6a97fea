"""bin/prepare: exit codes, messages, report, signals. Run: python -m pytest tests/commands/test_prepare.py"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from resilient_t5.commands.prepare import main
from resilient_t5.data.corpus.sample import clinical_terms, generate_notes
from resilient_t5.data.store.store import Store
from resilient_t5.data.tokenizer.tokenizer import train_tokenizer

NOTES = [note.text for note in generate_notes(200, 5)]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory):
    """A saved tokenizer of 700 pieces."""
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(NOTES, 700, 0.999).save(path)
    return path


@pytest.fixture
def arguments(tmp_path, tokenizer_directory):
    """A command line over a small corpus with terms."""
    (tmp_path / "text.txt").write_text("\n".join(NOTES), encoding="utf-8")
    (tmp_path / "terms.txt").write_text("\n".join(clinical_terms()), encoding="utf-8")
    settings = {
        "data.train": tmp_path / "text.txt",
        "data.terms": tmp_path / "terms.txt",
        "data.document": "line",
        "tokenizer.name_or_path": tokenizer_directory,
        "data.store": tmp_path / "store",
    }
    return [part for key, value in settings.items() for part in (f"--{key}", str(value))]


def test_the_command_makes_a_store_and_prints_its_report(arguments, tmp_path, capsys):
    """Exit code 0, the report for people on stdout and in report.json; a second call prints the same report."""
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    store = Store.open(tmp_path / "store")
    report = json.loads((tmp_path / "store" / "report.json").read_text(encoding="utf-8"))
    assert report == store.report
    for part in (f"{report['characters']:,} characters", f"{report['terms']['found']:,} found", "a trial", "updates"):
        assert part in printed
    assert main(arguments) == 0
    assert capsys.readouterr().out == printed


def test_dropped_control_characters_are_named(arguments, tmp_path, capsys):
    """A NUL and a bell in the text are reported by name and number, with everything else that was dropped."""
    text = Path(arguments[arguments.index("--data.train") + 1])
    text.write_bytes(text.read_bytes() + b"\nlast\x00 line\x07 of\x00 all")
    assert main(arguments) == 0
    assert "3 control characters (U+0000 2, U+0007 1)" in capsys.readouterr().out


def test_no_model_is_needed_but_text_and_a_tokenizer_are(arguments, capsys):
    """A missing tokenizer or text is a usage error with the keys to set."""
    assert main(arguments[:6]) == 2
    assert "tokenizer.train_vocab_size" in capsys.readouterr().err
    assert main(arguments[6:]) == 2
    assert "data.train is not set" in capsys.readouterr().err


def test_bad_data_leaves_with_65_and_one_message(arguments, tmp_path, capsys):
    """A missing file and a store of other settings: one line, no traceback, nothing written over."""
    assert main([*arguments, "--data.train", str(tmp_path / "absent.txt")]) == 65
    assert capsys.readouterr().err.count("\n") == 1
    assert main(arguments) == 0
    before = (tmp_path / "store" / "meta.json").read_bytes()
    assert main([*arguments, "--data.max_source_tokens", "64"]) == 65
    error = capsys.readouterr().err
    assert "data.max_source_tokens 512 -> 64" in error and "Traceback" not in error
    assert (tmp_path / "store" / "meta.json").read_bytes() == before


def test_a_prepare_that_is_killed_leaves_what_the_next_one_removes(arguments, tmp_path):
    """SIGKILL in the middle of the pass: no store; the same command removes the rest and makes the store of one call."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{note} {number}" for number in range(12) for note in NOTES), encoding="utf-8")
    kill = "import os, signal; from resilient_t5.data.store import build; w = build.Streams; add = w.add; calls = [];\n"
    kill += "w.add = lambda *a: (calls.append(1), len(calls) == 3 and os.kill(os.getpid(), signal.SIGKILL), add(*a))\n"
    kill += "import sys; from resilient_t5.commands.prepare import main; main(sys.argv[1:])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", kill, *arguments], env=environment, cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert list(tmp_path.glob(".store.making-*")) and not (tmp_path / "store").exists()
    assert main(arguments) == 0
    assert not list(tmp_path.glob(".store*"))
    assert main([*arguments[:-1], str(tmp_path / "whole")]) == 0
    for path in sorted((tmp_path / "whole").rglob("*")):
        if path.is_file() and path.name not in ("report.json", "meta.json"):
            assert path.read_bytes() == (tmp_path / "store" / path.relative_to(tmp_path / "whole")).read_bytes(), path.name


@pytest.mark.parametrize("flags", [["--shard", "1/2"], ["--merge", "2"]])
def test_a_corpus_is_not_prepared_in_parts(arguments, tmp_path, flags, capsys):
    """--shard and --merge, which an earlier version had, are unknown options."""
    assert main([*arguments, *flags]) == 2
    assert flags[0].strip("-") in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_a_run_directory_gives_the_store_its_place(arguments, tmp_path):
    """Without data.store the store lies in the run directory, where bin/train looks for it."""
    assert main([*arguments[:-2], "--run.dir", str(tmp_path / "run")]) == 0
    Store.open(tmp_path / "run" / "store")


def test_the_launcher_runs_through_a_link_from_any_folder(tmp_path):
    """bin/prepare --help works from another folder through a symbolic link."""
    (tmp_path / "link").symlink_to(ROOT / "bin" / "prepare")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "link"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "--data.store" in done.stdout


def test_sigterm_ends_it_with_143_and_no_trace(arguments, tmp_path):
    """A stopped prepare reports it, exits with the signal's code, and leaves no files."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{i} {note}" for i in range(300) for note in NOTES), encoding="utf-8")
    code = "import sys; from resilient_t5.commands.prepare import main; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(tmp_path.glob(".store.making-*/streams/train-tokens.bin")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143 and "partial files were removed" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["terms.txt", "text.txt"]


@pytest.fixture
def training(tmp_path):
    """bin/prepare in the middle of the training of its tokenizer, leader of its own group; and the ids of its children."""
    random = np.random.default_rng(1)
    lines = (random.bytes(450).hex() for _ in range(3400))  # no words in it, so a training takes many seconds
    (tmp_path / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    flags = [f"--data.train={tmp_path / 'text.txt'}", f"--data.store={tmp_path / 'store'}", "--tokenizer.train_vocab_size=8000"]
    code = "import sys; from resilient_t5.commands.prepare import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *flags],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not (trainers := children.read_text(encoding="ascii").split()):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.5)
    assert not any(map(is_over, trainers)), "the text is too small: it is trained on already"
    yield process, trainers
    process.kill()
    process.communicate()


def is_over(pid):
    """Whether a process has ended, though perhaps nobody has asked for its status yet."""
    try:
        return Path("/proc", pid, "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_ctrl_c_while_the_tokenizer_is_trained_ends_it_at_once_with_130(training, tmp_path):
    """SIGINT to the whole group, as a terminal sends it: no half store, no process left, and no wait for the training."""
    process, trainers = training
    asked_s = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "partial files were removed" in error and time.monotonic() - asked_s < 3
    assert all(map(is_over, trainers))
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_a_killed_prepare_leaves_no_training_behind(training):
    """SIGKILL lets it end nobody; the training sees by itself that nobody wants the model any more."""
    process, trainers = training
    process.kill()
    until_s = time.monotonic() + 10
    while not all(map(is_over, trainers)):
        assert time.monotonic() < until_s, "it trains for nobody"
        time.sleep(0.05)


@pytest.fixture
def foreign(tmp_path):
    """Writes notes with so many characters in a hundred that the tokenizer lacks; returns a command line over them."""

    def write(percent):
        lines = [f"dose {'abcdefghij'[number % 10]}{number // 10 * 'x'} fever gout" for number in range(100)]
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_prefix=str(tmp_path / "spiece"),
            vocab_size=40,
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            pad_piece="<pad>",
            eos_piece="</s>",
            unk_piece="<unk>",
            minloglevel=2,
        )
        (tmp_path / "tokenizer").mkdir(exist_ok=True)
        (tmp_path / "spiece.model").rename(tmp_path / "tokenizer" / "spiece.model")
        visible = sum(len(line.replace(" ", "")) for line in lines)
        lines[7] += "热" * round(visible * percent / (100 - percent))
        (tmp_path / "foreign.txt").write_text("\n".join(lines), encoding="utf-8")
        settings = {"data.train": "foreign.txt", "tokenizer.name_or_path": "tokenizer", "data.store": "foreign-store"}
        paths = [part for key, name in settings.items() for part in (f"--{key}", str(tmp_path / name))]
        return [*paths, "--data.document", "line"]

    return write


def training_of(arguments, tmp_path):
    """The command line of bin/train over the same corpus."""
    settings = ["--model.preset", "tiny", "--schedule.max_updates", "2", "--evaluation.examples", "4"]
    return [*arguments, *settings, "--hardware.threads", "1", "--run.dir", tmp_path / "run"]


def test_a_tokenizer_for_another_script_is_refused_with_65_by_prepare_and_train(foreign, tmp_path, fork_server, capsys):
    """One line with the share, the characters and the cures, and no store; a higher limit allows it, and is asked for again."""
    arguments = foreign(46)
    assert main(arguments) == 65
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "46 %" in error and "热" in error and "tokenizer.max_unknown_share" in error
    console = tmp_path / "console.txt"
    assert fork_server.run(training_of(arguments, tmp_path), console) == 65
    assert "46 %" in console.read_text(encoding="utf-8") and "Traceback" not in console.read_text(encoding="utf-8")
    assert not list(tmp_path.glob("*store*")) and not list(tmp_path.glob(".*store*"))
    assert main([*arguments, "--tokenizer.max_unknown_share", "0.5"]) == 0
    assert main(arguments) == 65
    assert "foreign-store" in capsys.readouterr().err


def test_some_unknown_characters_are_warned_of_by_prepare_and_train(foreign, tmp_path, fork_server, capsys):
    """Above 1 %: the report's row on stdout, a warning with the characters on stderr and in the banner, and it goes on."""
    arguments = foreign(5)
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert "unknown  5." in captured.out or "unknown  4." in captured.out
    assert "prepare warning: " in captured.err and "热" in captured.err and "mT5" in captured.err
    console = tmp_path / "console.txt"
    assert fork_server.run(training_of(arguments, tmp_path), console) == 0
    banner = console.read_text(encoding="utf-8")
    assert "of the characters without a piece" in banner and "plan warning: " in banner and "热" in banner


def test_a_few_unknown_characters_are_shown_without_a_warning(foreign, tmp_path, fork_server, capsys):
    """From 0.01 % to 1 %: in the report and in the banner."""
    arguments = foreign(0.5)
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert "most frequent: 热" in captured.out and captured.err == ""
    console = tmp_path / "console.txt"
    assert fork_server.run([*training_of(arguments, tmp_path), "--dry_run", "plan"], console) == 0
    assert "of the characters without a piece" in console.read_text(encoding="utf-8")
    assert "have no piece" not in console.read_text(encoding="utf-8")
