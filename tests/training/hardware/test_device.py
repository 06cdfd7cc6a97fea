"""The number format that a run settles on. Run: python -m pytest tests/training/hardware/test_device.py"""

import dataclasses

import pytest
import torch

from resilient_t5.config.parse import parse_config
from resilient_t5.data.dataset import Dataset
from resilient_t5.data.store.prepare import prepare
from resilient_t5.model.precision import Precision
from resilient_t5.training.build import build_for_plan
from resilient_t5.training.hardware.device import settle_precision

CPU = torch.device("cpu")
CANDIDATE = Precision("bf16", "the device does it natively")


@pytest.fixture(scope="module")
def parts(tiny_config, tmp_path_factory):
    """A configuration, and the model and batches that a run over it would have."""
    config = parse_config(["--config", str(tiny_config)], "train", "")
    corpus = Dataset.over(prepare(config, tmp_path_factory.mktemp("store") / "store"), config)
    _, model, _, batches = build_for_plan(config, corpus, CPU, CANDIDATE)
    return config, model, batches


def test_a_format_that_was_chosen_is_tried_on_the_first_batches(parts):
    """It stays where it comes close, with the figure in the reason; a format that was asked for is not questioned."""
    config, model, batches = parts
    settled = settle_precision(config, model, batches, CANDIDATE, CPU)
    assert settled.name == "bf16"
    assert "probe on" in settled.why
    hardware = dataclasses.replace(config.hardware, precision="bf16")
    asked = settle_precision(dataclasses.replace(config, hardware=hardware), model, batches, CANDIDATE, CPU)
    assert asked == CANDIDATE


def test_a_format_that_overflows_gives_way_to_float32_and_says_why(parts):
    """fp16 with a first feed-forward product beyond 65,504, which is no float32 island."""
    config, model, batches = parts
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "DenseReluDense.wi" in name:
                parameter.copy_(1e6 * torch.ones_like(parameter))
    settled = settle_precision(config, model, batches, Precision("fp16", "no bf16"), CPU)
    assert settled.name == "fp32"
    assert "overflow" in settled.why
