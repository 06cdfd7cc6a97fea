"""An update that runs out of memory. Run: python -m pytest tests/training/test_out_of_memory.py

A subprocess builds a run, then lowers the limit of its address space, so that torch's allocator fails.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow

SCRIPT = """
import resource, sys
from pathlib import Path
from resilient_t5.checkpoint.manager import CheckpointManager
from resilient_t5.config.parse import parse_config
from resilient_t5.commands.failure import reported
from resilient_t5.data.store.prepare import prepare, store_directory
from resilient_t5.training.loop import train
from resilient_t5.training.telemetry.console import Console
from resilient_t5.training.build import build_run
from resilient_t5.training.telemetry.run_log import RunLog
from resilient_t5.training.signals import StopSignal

def main():
    share = float(sys.argv[1])
    config = parse_config(sys.argv[2:], "train", "")
    directory = Path(config.run.dir)
    directory.mkdir()
    log = RunLog(Console("plain", directory / "log"), directory)
    manager = CheckpointManager(directory, run_id="0" * 32, settings=config.checkpoint, audit=log.checkpoint_event)
    run = build_run(config, prepare(config, store_directory(config)), manager, None, log)
    run.state.evaluated_update = 0
    peak = run.fit.choice.peak
    room = peak.gradients + peak.optimizer + share * (peak.activations + peak.workspace)
    # An arena of a new thread takes address space of its own; nothing here starts one.
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + int(room), resource.RLIM_INFINITY))
    with StopSignal() as stop:
        train(run, stop)
    print("micro_tokens", run.batches.micro_tokens)
    return 0

raise SystemExit(reported(main))
"""
SETTINGS = """
data: {train: "builtin:clinical", sample_notes: 120, max_source_tokens: 96, max_target_tokens: 48, validation_share: 0.2}
tokenizer: {train_vocab_size: 700}
corruption: {max_sentinels: 10}
model: {preset: tiny, d_model: 64, d_ff: 768, num_layers: 3, num_heads: 8, dropout: 0.0}
batch: {examples_per_update: 64, micro_tokens: 4096, window_updates: 1, readers: 0}
schedule: {max_updates: 2, shape: constant, warmup: 0}
evaluation: {every: 1000, examples: 1, restore_examples: 0}
checkpoint: {every_minutes: 60, background: false}
telemetry: {log_every: 1, tensorboard: false}
hardware: {threads: 1}
"""


def run_with_room(share, tmp_path, name):
    """Train three updates with room for `share` of the planned activations; the finished process."""
    config = tmp_path / "config.yaml"
    config.write_text(SETTINGS, encoding="utf-8")
    argv = ["--config", config, "--run.dir", tmp_path / name, "--data.store", tmp_path / "store"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", SCRIPT, str(share), *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def rows(run: Path, kind: str):
    """The metric rows of one kind."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in found if row["kind"] == kind]


def test_an_update_that_runs_out_of_memory_is_done_again_with_half_the_micro_batches(tmp_path):
    """Without dropout the losses equal those of a run with enough memory; one guard row reports it."""
    roomy = run_with_room(4.0, tmp_path, "roomy")
    assert roomy.returncode == 0, roomy.stderr
    assert "micro_tokens 4096" in roomy.stdout
    # 0.7 of the planned activations is sometimes enough for the first try, and 0.5 not always for the second (heap).
    short = run_with_room(0.6, tmp_path, "short")
    assert short.returncode == 0, short.stderr
    (row,) = rows(tmp_path / "short", "guard")
    assert (row["action"], row["former_micro_tokens"]) == ("out of memory", 4096)
    assert 256 < row["micro_tokens"] <= 2048
    assert f"repeated with micro_tokens {row['micro_tokens']}" in short.stdout
    assert f"micro_tokens {row['micro_tokens']}" in short.stdout
    found, wanted = (rows(tmp_path / name, "train") for name in ("short", "roomy"))
    assert [row["target_tokens"] for row in found] == [row["target_tokens"] for row in wanted]
    for got, want in zip(found, wanted, strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-4)
        assert got["gradient_norm"] == pytest.approx(want["gradient_norm"], rel=1e-3)


def test_the_second_time_it_leaves_with_71_and_the_options_in_order_of_cost(tmp_path):
    """Smaller micro-batches, then checkpointing, then another optimizer, each with the memory it saves."""
    done = run_with_room(0.1, tmp_path, "run")
    assert done.returncode == 71, done.stdout + done.stderr
    message = done.stderr
    assert "out of memory" in message
    places = [message.index(option) for option in ("--batch.micro_tokens", "--model.gradient_checkpointing true", "adafactor")]
    assert places == sorted(places)
    assert "GiB)" in message


def test_memory_that_runs_out_anywhere_else_is_71_too(capsys):
    """Real errors of torch's and Python's allocators; any other error keeps its traceback and exits with 1."""
    import torch

    from resilient_t5.commands.failure import reported

    for refused in (lambda: torch.empty(2**59, dtype=torch.uint8), lambda: bytearray(2**62)):
        assert reported(refused) == 71
        assert "bin/plan" in capsys.readouterr().err
    assert reported(lambda: 1 // 0) == 1
