"""What the tests share: tiny real runs, a warm process that starts them, and the folder of real text."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.forkserver import ForkServer

ROOT = Path(__file__).parents[1]

TINY_RUN = """
data: {train: "builtin:clinical", sample_notes: 120, max_source_tokens: 96, max_target_tokens: 48, validation_share: 0.2}
tokenizer: {train_vocab_size: 700}
corruption: {max_sentinels: 10}
model: {preset: tiny, dropout: 0.1}
batch: {examples_per_update: 8, micro_tokens: 300, window_updates: 3}
optim: {lr: 0.002}
schedule: {max_updates: 12}
convergence: {preset: short}
evaluation: {every: 4, examples: 12, restore_examples: 4}
checkpoint: {every_minutes: null, every_updates: 3}
telemetry: {log_every: 1, progress: plain, samples: 1}
hardware: {threads: 1}
run: {seed: 7}
"""


def pytest_collection_modifyitems(items):
    """Files with slow tests first, so that no worker starts the longest file when the others are done."""
    slow_files = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow_files)


@pytest.fixture(scope="session", autouse=True)
def foreground():
    """Signals as in the foreground: a shell ignores SIGINT for what it starts in the background, and nohup SIGHUP.

    A run keeps to what was ignored when it began, and so would every test that sends one.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def denormals():
    """A command that ran inside the tests' own process has flushed them for good, and hypothesis wants them back."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


@pytest.fixture(scope="session")
def fork_server():
    """The warm process; one for all tests."""
    with ForkServer() as server:
        yield server


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory):
    """A configuration file of a run that takes a few seconds, dropout and accumulation included."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(TINY_RUN, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(fork_server, tiny_config, tmp_path_factory):
    """A run that went to its planned end."""
    run = tmp_path_factory.mktemp("finished") / "run"
    output = run.with_name("console.txt")
    assert fork_server.run(["--config", tiny_config, "--run.dir", run], output) == 0, output.read_text()
    return run


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real text that RESILIENT_T5_SHARED names (default: ../shared beside the repository)."""
    folder = Path(os.environ.get("RESILIENT_T5_SHARED", ROOT.parent / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip("no real text: set RESILIENT_T5_SHARED to a folder with data/")
    return folder


def read_summary(run_directory):
    """summary.json of a run."""
    return json.loads((run_directory / "summary.json").read_text(encoding="utf-8"))
