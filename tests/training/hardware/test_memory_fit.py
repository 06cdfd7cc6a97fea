"""How a run is cut to fit. Run: python -m pytest tests/training/hardware/test_memory_fit.py"""

import dataclasses
import re

import numpy as np
import pytest
import torch

from resilient_t5.config.parse import parse_config
from resilient_t5.config.schema import trajectory_settings
from resilient_t5.data.batches import Batches
from resilient_t5.data.dataset import Dataset
from resilient_t5.data.store.prepare import prepare
from resilient_t5.errors import ConfigError
from resilient_t5.host_memory import available_bytes
from resilient_t5.model.load import PRESETS
from resilient_t5.model.memory import GIB, Memory, Task
from resilient_t5.model.shapes import sizes_of_shape
from resilient_t5.training.hardware.memory_fit import fit, fit_run, task_of

CPU = torch.device("cpu")


def settings(tiny_config, *argv):
    """The tiny run's configuration with the plan left to the planner."""
    return parse_config(["--config", str(tiny_config), "--batch.micro_tokens", "auto", *argv], "train", "")


@pytest.fixture(scope="module")
def store(tiny_config, tmp_path_factory):
    """The tiny run's prepared corpus."""
    return prepare(settings(tiny_config), tmp_path_factory.mktemp("store") / "store")


def test_a_cpu_with_room_takes_2048_tokens_and_recomputes_nothing(tiny_config, store):
    """However much memory is free: larger micro-batches bring a CPU no speed."""
    found = fit_run(settings(tiny_config), store, CPU, "fp32")
    assert (found.choice.micro_tokens, found.choice.checkpointing, found.choice.fits) == (2048, False, True)
    assert found.warnings() == []
    assert available_bytes() > 0.1 * GIB


def test_less_memory_takes_smaller_micro_batches_then_recomputes_then_warns():
    """In this order, as the memory that may be used goes down; what is asked for is never changed."""
    sizes, task = sizes_of_shape(PRESETS["mt5-base"], 32_768), Task(512, 256)
    config = parse_config(["--model.preset", "mt5-base"], "train", "")
    seen = []
    for gib in (8.0, 6.0, 5.4, 4.9, 4.6, 4.0):
        found = fit(config, sizes, task, Memory(gib * GIB), "bf16")
        seen.append((found.choice.fits, not found.choice.checkpointing, found.choice.micro_tokens))
    assert seen[0][:2] == (True, True)
    assert seen[-1][0] is False
    without = [tokens for fits, plain, tokens in seen if fits and plain]
    assert without == sorted(without, reverse=True)
    assert len(set(without)) > 1
    assert len(fit(config, sizes, task, Memory(4.0 * GIB), "bf16").warnings()) == 1
    asked = parse_config(
        ["--model.preset", "mt5-base", "--batch.micro_tokens", "4096", "--model.gradient_checkpointing", "true"], "train", ""
    )
    choice = fit(asked, sizes, task, Memory(24 * GIB), "bf16").choice
    assert (choice.micro_tokens, choice.checkpointing) == (4096, True)


def test_the_task_is_bounded_by_the_longest_example_of_the_store(tiny_config, store):
    """No source of three epochs is longer, nor any target; and the bound is not simply what the settings allow."""
    config = settings(tiny_config)
    task = task_of(config, store)
    corpus = Dataset.over(store, config)
    batches = Batches(corpus.train, corpus.table, config, seed=1, micro_tokens=10**6, pad_multiple=1)
    updates = range(int(3 * batches.updates_per_epoch))
    shapes = [(m.source_BS.shape[1], m.labels_BT.shape[1]) for update in updates for m in batches.at(update)]
    longest = np.array(shapes).max(0)
    assert longest[0] <= task.source_tokens <= config.data.max_source_tokens
    assert longest[1] <= task.target_tokens <= config.data.max_target_tokens


def test_what_is_planned_changes_no_mathematics(tiny_config):
    """A resume may change each of these settings, and the graphs of a GPU."""
    config = settings(tiny_config)
    other = settings(
        tiny_config, "--hardware.memory_gib", "3", "--model.gradient_checkpointing", "true", "--batch.micro_tokens", "64"
    )
    assert trajectory_settings(config) == trajectory_settings(other)
    graphs = dataclasses.replace(config, hardware=dataclasses.replace(config.hardware, graphs=True))
    assert trajectory_settings(config) == trajectory_settings(graphs)


def test_an_optimizer_inside_the_backward_pass_gets_its_update_in_one_micro_batch(tiny_config, store):
    """The plan holds all its examples; a smaller budget, clipping, several groups and fp16 are refused, each by its key."""
    inside = ("--optim.name", "adafactor_in_backward", "--optim.clip_norm", "0", "--batch.groups_per_update", "1")
    found = fit_run(settings(tiny_config, *inside), store, CPU, "fp32")
    assert found.choice.micro_tokens == found.task.longest * 8
    with pytest.raises(ConfigError, match=r"batch\.micro_tokens"):
        fit_run(settings(tiny_config, *inside, "--batch.micro_tokens", "300"), store, CPU, "fp32")
    with pytest.raises(ConfigError) as refused:
        settings(tiny_config, "--optim.name", "adafactor_in_backward", "--hardware.precision", "fp16")
    keys = set(re.findall(r"(optim\.clip_norm|batch\.groups_per_update|hardware\.precision): adafactor", str(refused.value)))
    assert len(keys) == 3


def test_graphs_leave_room_for_the_optimizer_and_evaluation(tiny_config, store):
    """Both the free memory of the device and the planned memory count, each without its reserve."""
    found = fit_run(settings(tiny_config, "--hardware.memory_gib", "4"), store, CPU, "fp32")
    peak = found.choice.peak
    beside = found.choice.evaluation - peak.weights - peak.gradients
    assert found.missing_beside_graphs(beside / 0.95, 0.0) == pytest.approx(0.0, abs=1.0)
    assert found.missing_beside_graphs(8 * GIB, found.memory.usable - beside) == pytest.approx(0.0, abs=1.0)
    assert found.missing_beside_graphs(8 * GIB, found.memory.usable - beside + GIB) == pytest.approx(GIB)
