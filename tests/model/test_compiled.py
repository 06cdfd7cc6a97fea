"""Compiled layers. Run: python -m pytest tests/model/test_compiled.py -m slow"""

import copy

import pytest
import torch

from resilient_t5.config.schema import Config, HardwareConfig, ModelConfig
from resilient_t5.errors import ConfigError
from resilient_t5.model.layers import install_lean_layers
from resilient_t5.model.loss import forward_loss
from resilient_t5.training.hardware.device import compile_layers

pytestmark = pytest.mark.slow


def test_nothing_is_compiled_unless_asked_for():
    """The default is false, and a combination with checkpointing is refused."""
    assert HardwareConfig().compile is False
    with pytest.raises(ConfigError, match="exclude each other"):
        Config(model=ModelConfig(preset="tiny", gradient_checkpointing=True), hardware=HardwareConfig(compile=True))


def test_a_machine_without_a_compiler_is_told_so(make_model, monkeypatch):
    """A ConfigError before training, not an error of the compiler in the first update."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler"):
        compile_layers(make_model("mt5"), torch.device("cpu"))


def test_compiled_layers_give_the_plain_losses_and_gradients_at_every_length(
    make_model, make_examples, collate, gradients_of, relative_error
):
    """Three batches of other lengths; four graphs in all, so no length compiles anew. About a minute and a half."""
    plain = make_model("mt5").train()
    install_lean_layers(plain)
    compiled = copy.deepcopy(plain)
    compile_layers(compiled, torch.device("cpu"))
    torch._dynamo.utils.counters.clear()
    for seed, count in ((0, 3), (1, 5), (2, 4)):
        batch = collate(make_examples(count, seed=seed))
        losses = []
        for model in (plain, compiled):
            loss = forward_loss(model, *batch, divisor=10.0).loss
            loss.backward()
            losses.append(loss.item())
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
        assert relative_error(gradients_of(compiled), gradients_of(plain)) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
    assert not torch._dynamo.utils.counters["graph_break"]
