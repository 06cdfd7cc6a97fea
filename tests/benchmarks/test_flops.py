"""The counted operations against torch's own counter. Run: python -m pytest tests/benchmarks/test_flops.py"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers.flops import MicroShape, our_flops, peer_flops
from resilient_t5.config.sections import ModelConfig
from resilient_t5.model.layers import install_lean_layers
from resilient_t5.model.load import SpecialIds, build_model
from resilient_t5.model.loss import forward_loss
from resilient_t5.model.vocabulary_gradients import BLOCK_VALUES

ROWS = BLOCK_VALUES // 18 + 300  # two blocks for 18 labels
SIZES = {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 2}


def model_and_batch(preset, checkpointing):
    """A tiny model with more rows than a block for 18 labels, and three examples, one of them shorter."""
    settings = ModelConfig(preset=preset, **SIZES)
    model = build_model(settings, vocabulary_rows=ROWS, special=SpecialIds(0, 1, 0), seed=1)
    if checkpointing:
        model.gradient_checkpointing_enable()
    source_BS, labels_BT = torch.randint(2, 300, (3, 11)), torch.randint(2, 300, (3, 7))
    mask_BS = torch.ones_like(source_BS)
    mask_BS[2, 6:], labels_BT[2, 4:] = 0, -100
    return model.train(), source_BS, mask_BS, labels_BT


def addmm_in_place(_, a_shape, b_shape, **kwargs):
    """Operations of `grad.addmm_(a, b)`, which torch's counter does not know."""
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]


def counted(function):
    """Operations that torch counts."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_in_place}) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("preset", ["tiny", "mt5-small"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
def test_the_formula_of_a_peer_is_what_torch_counts(preset, checkpointing):
    """Whole logits over every target position, ReLU and gated layers, with and without recomputation: equal."""
    model, source_BS, mask_BS, labels_BT = model_and_batch(preset, checkpointing)
    found = counted(lambda: model(input_ids=source_BS, attention_mask=mask_BS, labels=labels_BT).loss.backward())
    assert found == peer_flops(model.config, MicroShape(3, 11, 7, 21), checkpointing=checkpointing)


@pytest.mark.parametrize("preset", ["tiny", "mt5-small"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
def test_the_formula_of_ours_is_what_torch_counts(preset, checkpointing):
    """Labels alone reach the head, in two blocks, the first of which is computed twice: equal."""
    model, source_BS, mask_BS, labels_BT = model_and_batch(preset, checkpointing)
    install_lean_layers(model)
    found = counted(lambda: forward_loss(model, source_BS, mask_BS, labels_BT, divisor=18.0).loss.backward())
    shape = MicroShape(3, 11, 7, 18)
    assert found == our_flops(model.config, shape, checkpointing=checkpointing)
