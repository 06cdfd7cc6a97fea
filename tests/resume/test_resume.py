"""An interrupted run is the same run. Run: python -m pytest tests/resume/test_resume.py

Real processes, real signals: a run is stopped, started again with the same command, and compared with one that was left
alone: final weights and optimizer state bit for bit, and every metric that does not depend on the clock.
"""

import json
import os
import signal
import time

import pytest
from safetensors.numpy import load_file

from tests.conftest import read_summary

pytestmark = pytest.mark.slow

CLOCK = ("_s", "_per_s", "_mib", "_share")


def final_tensors(run):
    """Every tensor of the newest checkpoint as bytes, by file and name."""
    newest = max((run / "checkpoints").glob("u*-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    files = [path for path in newest.glob("*.safetensors") if path.stem != "rng"]
    assert {path.stem for path in files} == {"model", "optimizer"}
    return {f"{path.stem}/{name}": value.tobytes() for path in files for name, value in load_file(path).items()}


def rows(run, kind):
    """Metric rows of one kind without what depends on the clock."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in row.items() if key != "time" and not key.endswith(CLOCK)}
        for row in found
        if row["kind"] == kind
    ]


def assert_same_run(run, reference):
    """Weights, optimizer state, training and evaluation rows and the summary's results are those of the reference."""
    assert final_tensors(run) == final_tensors(reference)
    for kind in ("train", "evaluation", "restoration", "phase"):
        assert rows(run, kind) == rows(reference, kind), kind
    for key in ("updates", "best", "last", "target_tokens", "stop_reason"):
        assert read_summary(run)[key] == read_summary(reference)[key], key


@pytest.fixture(scope="module")
def reference(fork_server, tiny_config, tmp_path_factory):
    """A run that was left alone."""
    run = tmp_path_factory.mktemp("reference") / "run"
    output = run.with_name("console.txt")
    status = fork_server.run(["--config", tiny_config, "--run.dir", run], output)
    assert status == 0, output.read_text()
    return run


def stop_when(server, argv, run, sign, number=signal.SIGTERM):
    """Start a run, send it `number` as soon as metrics.jsonl holds a row like `sign`, return its exit status."""
    output = run.with_name("console.txt")
    pid = server.start(argv, output)
    until = time.monotonic() + 60
    while not any(sign.items() <= row.items() for row in read_whole_rows(run)):
        assert server.poll(pid) is None, output.read_text()
        assert time.monotonic() < until, output.read_text()
        time.sleep(0.002)
    os.kill(pid, number)
    return server.wait(pid)


def read_whole_rows(run):
    """Rows written so far; the last line may be half."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    "sign",
    [
        {"kind": "train", "update": 2},
        {"kind": "train", "update": 4},
        {"kind": "evaluation", "update": 8},
    ],
    ids=["in-training", "before-an-evaluation", "in-an-evaluation"],
)
def test_a_run_stopped_by_sigterm_ends_in_the_same_weights(fork_server, tiny_config, tmp_path, reference, sign):
    """Stopped at three places, dropout on, several micro-batches an update: bit for bit the undisturbed run."""
    run = tmp_path / "run"
    argv = ["--config", tiny_config, "--run.dir", run]
    assert stop_when(fork_server, argv, run, sign) == -signal.SIGTERM
    assert read_summary(run)["status"] == "interrupted"
    assert read_summary(run)["exit_code"] == 143
    assert read_summary(run)["updates"] < 12
    assert fork_server.run(argv, tmp_path / "console.txt") == 0
    assert_same_run(run, reference)


def test_a_second_and_third_resume_inside_one_epoch_see_the_same_batches(fork_server, tiny_config, tmp_path, reference):
    """Ctrl-C, SIGTERM, SIGHUP one after the other; what drifts at the second resume is found here."""
    run = tmp_path / "run"
    argv = ["--config", tiny_config, "--run.dir", run]
    for update, number in ((2, signal.SIGINT), (5, signal.SIGTERM), (9, signal.SIGHUP)):
        assert stop_when(fork_server, argv, run, {"kind": "train", "update": update}, number) == -number
    assert fork_server.run(argv, tmp_path / "console.txt") == 0
    assert_same_run(run, reference)


def test_a_killed_run_goes_back_to_its_newest_checkpoint_and_ends_the_same(fork_server, tiny_config, tmp_path, reference):
    """SIGKILL leaves no time for anything; the save of update 6 or an older one is enough."""
    run = tmp_path / "run"
    argv = ["--config", tiny_config, "--run.dir", run]
    assert stop_when(fork_server, argv, run, {"kind": "train", "update": 8}, signal.SIGKILL) == -signal.SIGKILL
    assert fork_server.run(argv, tmp_path / "console.txt") == 0
    assert_same_run(run, reference)


def test_resuming_a_finished_run_changes_nothing(fork_server, tiny_config, tmp_path, reference):
    """It says that nothing is left to do and leaves with 0; summary, weights and metrics stay as they are."""
    before = {path: path.read_bytes() for path in reference.rglob("*") if path.is_file() and path.suffix in (".json", ".jsonl")}
    output = tmp_path / "console.txt"
    assert fork_server.run(["--config", tiny_config, "--run.dir", reference], output) == 0
    assert "nothing left to do" in output.read_text()
    assert {path: path.read_bytes() for path in before} == before


def test_the_cut_into_micro_batches_does_not_change_the_optimizer_batches(fork_server, tiny_config, tmp_path, reference):
    """Resumed with another micro_tokens and no reader thread, every update has the tokens that it had.

    Dropout is keyed by micro-batch, so losses may differ a little; sums of tokens after every update may not.
    """
    run = tmp_path / "run"
    argv = ["--config", tiny_config, "--run.dir", run]
    stop_when(fork_server, argv, run, {"kind": "train", "update": 3})
    other = [*argv, "--batch.micro_tokens", "100", "--batch.readers", "0"]
    assert fork_server.run(other, tmp_path / "console.txt") == 0
    for found, expected in zip(rows(run, "train"), rows(reference, "train"), strict=True):
        assert found["target_tokens"] == expected["target_tokens"]
        assert found["loss"] == pytest.approx(expected["loss"], rel=0.05)


def test_a_changed_mathematics_is_refused_with_78_and_nothing_written(fork_server, tiny_config, tmp_path, reference):
    """The message names the key, and the run directory keeps every byte but its log and the name of the holder in the lock."""
    before = {
        path: path.read_bytes()
        for path in reference.rglob("*")
        if path.is_file() and path.name not in ("train.log", "run.lock")
    }
    output = tmp_path / "console.txt"
    assert fork_server.run(["--config", tiny_config, "--run.dir", reference, "--optim.lr", "0.5"], output) == 78
    assert "optim.lr: 0.002 -> 0.5" in output.read_text()
    assert {path: path.read_bytes() for path in before} == before


def test_a_run_of_a_version_without_a_setting_goes_on_by_its_default_and_by_no_other(
    fork_server, tiny_config, tmp_path, reference
):
    """A key that neither run directory nor checkpoint knows: its default changes nothing, another value is refused by name."""
    run, console = tmp_path / "run", tmp_path / "console.txt"
    argv = ["--config", tiny_config, "--run.dir", run]
    faults = [
        ("tests.resume.placing:forget_setting", {"key": "corruption.mask_ratio_spread"}),
        ("tests.resume.placing:signal_at", {"place": "micro-batch", "number": int(signal.SIGTERM), "call": 20}),
    ]
    assert fork_server.run(argv, console, faults) == -signal.SIGTERM, console.read_text()
    assert fork_server.run([*argv, "--corruption.mask_ratio_spread", "0.1"], console) == 78
    assert "corruption.mask_ratio_spread: 0.0 -> 0.1" in console.read_text()
    assert fork_server.run(argv, console) == 0, console.read_text()
    assert_same_run(run, reference)


def test_a_fork_starts_a_new_run_from_the_weights_of_a_checkpoint(fork_server, tiny_config, tmp_path, reference):
    """Its first loss is the reference's last one; its updates, order and optimizer begin anew; the same command resumes it."""
    newest = max((reference / "checkpoints").glob("u*-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    run, console = tmp_path / "run", tmp_path / "console.txt"
    argv = ["--config", tiny_config, "--run.dir", run, "--run.fork", newest, "--data.store", reference / "store"]
    assert fork_server.run(argv, console) == 0, console.read_text()
    assert rows(run, "evaluation")[0]["loss"] == rows(reference, "evaluation")[-1]["loss"]
    assert [row["update"] for row in rows(run, "train")] == list(range(1, 13))
    assert fork_server.run(argv, console) == 0
    assert "nothing left to do" in console.read_text()


@pytest.mark.parametrize(
    "optimizer",
    [
        ("--optim.name", "adafactor"),
        ("--optim.name", "muon"),
        ("--optim.name", "adafactor_in_backward", "--optim.clip_norm", "0", "--batch.groups_per_update", "1"),
    ],
    ids=["adafactor", "muon", "adafactor_in_backward"],
)
def test_every_optimizer_resumes_in_the_middle_bit_for_bit(fork_server, tiny_config, tmp_path, optimizer):
    """Stopped after update 5 and started again: weights, optimizer state and rows of the undisturbed run."""
    runs = [tmp_path / "whole", tmp_path / "stopped"]
    store = ["--data.store", tmp_path / "store", "--batch.micro_tokens", "auto"]
    argvs = [["--config", tiny_config, "--run.dir", run, *store, *optimizer] for run in runs]
    assert fork_server.run(argvs[0], tmp_path / "console.txt") == 0, (tmp_path / "console.txt").read_text()
    assert stop_when(fork_server, argvs[1], runs[1], {"kind": "train", "update": 5}) == -signal.SIGTERM
    assert fork_server.run(argvs[1], tmp_path / "console.txt") == 0
    assert_same_run(runs[1], runs[0])
