"""The planner. Run: python -m pytest tests/model/test_memory.py

`benchmarks/plan.py` compares its peaks with measured ones; here the numbers under them are held to the models themselves.
"""

import itertools
import time

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from resilient_t5.config.sections import ModelConfig, OptimConfig
from resilient_t5.errors import ConfigError
from resilient_t5.model.layers import install_lean_layers, one_hot_distances
from resilient_t5.model.load import PRESETS, Shape, SpecialIds, build_model, save_model
from resilient_t5.model.loss import forward_loss
from resilient_t5.model.memory import (
    GIB,
    OPTIMIZERS,
    Execution,
    Memory,
    MicroBatchShape,
    Task,
    choices,
    first_fit,
    kept_bytes,
    optimizer_bytes,
    smallest_card_gib,
    training_peak,
    walk,
)
from resilient_t5.model.optimizer import BLOCK_VALUES, MUON_STEP_BYTES, Muon, build_optimizer, named_state
from resilient_t5.model.shapes import sizes_of_checkpoint, sizes_of_settings, sizes_of_shape

SHAPES = {"t5": Shape(40, 72, 3, 2), "mt5": Shape(40, 72, 3, 2, mt5=True)}
ROWS = 300
LONG = Task(512, 256)


def small_model(kind, dropout=0.1):
    """A tiny model with lean layers, in training mode."""
    settings = ModelConfig(
        preset="tiny" if kind == "t5" else "mt5-small", d_model=40, d_ff=72, num_layers=3, num_heads=2, dropout=dropout
    )
    model = build_model(settings, vocabulary_rows=ROWS, special=SpecialIds(0, 1, 0), seed=1).train()
    install_lean_layers(model)
    return model


def sizes_of(kind, dropout=0.1):
    """The sizes of `small_model`."""
    shape = SHAPES[kind] if kind == "mt5" else Shape(40, 72, 3, 2, d_kv=16)
    return sizes_of_shape(shape, ROWS, dropout)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("mt5-small", 300_176_768), ("mt5-base", 582_401_280), ("mt5-large", 1_229_581_312), ("mt5-xl", 3_742_619_648)],
)
def test_parameters_are_those_of_the_published_models(name, parameters):
    """Untied, over all 250,112 rows."""
    assert sizes_of_shape(PRESETS[name], 250_112).parameters == parameters


@pytest.mark.parametrize("kind", ["t5", "mt5"])
def test_parameters_and_states_are_those_of_a_real_model(kind, tmp_path):
    """Counted tensor by tensor, from a shape and from a checkpoint's configuration."""
    model, sizes = small_model(kind), sizes_of(kind)
    assert sizes.parameters == sum(p.numel() for p in model.parameters())
    save_model(model, tmp_path / "model")
    read = sizes_of_checkpoint(tmp_path / "model")
    assert (read.parameters, read.tied, read.gated) == (sizes.parameters, kind == "t5", kind == "mt5")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for name in ("adamw", "muon"):
        optimizer = build_optimizer(model, OptimConfig(name=name), torch.device("cpu"))
        optimizer.step()
        state_bytes = sum(t.numel() * t.element_size() for t in named_state(optimizer, model)[0].values() if t.ndim)
        few = 2 * 4 * sizes.buckets * sizes.heads + 4 * 8 * sizes.d_model * 3  # position biases and norms have two moments
        assert 0 <= state_bytes - optimizer_bytes(sizes, name) <= (few if name == "muon" else 0)


@pytest.mark.parametrize("shape", [(512, 512), (1024, 512)])
def test_what_a_move_of_muon_takes_is_what_was_counted(shape):
    """Matrices for two blocks: the peak of an update above its gradients and states is that of one block."""
    matrices = [torch.nn.Parameter(torch.zeros(shape)) for _ in range(2 * BLOCK_VALUES // (shape[0] * shape[1]))]
    rest = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    optimizer = Muon({"params": matrices, "weight_decay": 0.0}, rest)
    for matrix in matrices:
        matrix.grad = torch.ones(shape)
    optimizer.step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        optimizer.step()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    assert 0.75 * MUON_STEP_BYTES * BLOCK_VALUES < peak <= 1.02 * MUON_STEP_BYTES * BLOCK_VALUES


@pytest.mark.parametrize("kind", ["t5", "mt5"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_autograd_keeps_is_what_was_counted(kind, precision, dropout):
    """Every saved tensor but parameters and the micro-batch's own ids, each storage once: within 2 %, the rest is ids."""
    model, sizes = small_model(kind, dropout), sizes_of(kind, dropout)
    source_BS, labels_BT = torch.randint(2, ROWS, (4, 33)), torch.randint(2, ROWS, (4, 18))
    mask_BS = torch.ones_like(source_BS)
    mask_BS[1, 20:] = 0
    constants = model.encoder.lean.constants
    one_hot_distances(model.encoder.block[0].layer[0].SelfAttention, 33, constants, torch.device("cpu"))
    one_hot_distances(model.decoder.block[0].layer[0].SelfAttention, 18, constants, torch.device("cpu"))
    outside = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *constants.distances.values())}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in outside:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        forward_loss(model, source_BS, mask_BS, labels_BT, divisor=10.0)
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    parts = list(walk(sizes, Execution(precision), MicroBatchShape(4, 33, 18)))
    block = 4 * 18 * ROWS * 4  # the last block of logits is held by the node itself
    assert kept_bytes(parts) - block == pytest.approx(found, rel=0.02)


def test_mt5_base_with_all_parameters_fits_six_gib_without_checkpointing():
    """Float32 AdamW over 32,768 active rows, 512 + 256 tokens, bf16 products; with the whole vocabulary it does not."""
    active = list(choices(sizes_of_shape(PRESETS["mt5-base"], 32_768), LONG, Memory(6 * GIB), "bf16", OPTIMIZERS))
    chosen = first_fit(active)
    assert (chosen.optimizer, chosen.checkpointing) == ("adamw", False)
    assert chosen.micro_tokens >= 2 * LONG.longest
    assert chosen.needed < 5.3 * GIB
    whole = list(choices(sizes_of_shape(PRESETS["mt5-base"], 250_112), LONG, Memory(6 * GIB), "bf16", ("adamw",)))
    assert first_fit(whole) is None


def test_a_plan_of_the_largest_model_takes_milliseconds():
    """Plain numbers: every choice for mT5-XL in under a tenth of a second, on a busy machine."""
    started_s = time.process_time()
    list(choices(sizes_of_shape(PRESETS["mt5-xl"], 250_112), LONG, Memory(24 * GIB), "bf16", OPTIMIZERS))
    assert time.process_time() - started_s < 0.1


@pytest.mark.slow
def test_more_memory_never_gives_a_smaller_or_less_exact_choice():
    """Over all mT5 sizes and cards from 2 to 96 GiB."""
    for name in ("mt5-small", "mt5-base", "mt5-large", "mt5-xl"):
        before = (len(OPTIMIZERS), True, 0)
        for gib in range(2, 97):
            chosen = first_fit(
                list(choices(sizes_of_shape(PRESETS[name], 32_768), LONG, Memory(gib * GIB), "bf16", OPTIMIZERS))
            )
            if chosen is None:
                assert before[0] == len(OPTIMIZERS)
                continue
            now = (OPTIMIZERS.index(chosen.optimizer), chosen.checkpointing, -chosen.micro_tokens)
            assert now <= before
            before = now


def test_the_smallest_card_is_where_the_first_choice_begins_to_fit():
    """A hundredth above it one example fits, a hundredth below it none."""
    sizes = sizes_of_shape(PRESETS["mt5-base"], 32_768)
    least = smallest_card_gib(sizes, LONG, "bf16", ("adamw",))
    for gib, fits in ((least * 1.01, True), (least * 0.99, False)):
        found = list(choices(sizes, LONG, Memory(gib * GIB), "bf16", ("adamw",)))
        assert (first_fit(found) is not None) == fits


def test_every_item_is_lower_where_it_was_meant_to_be():
    """Checkpointing lowers activations, Adafactor states, stepping inside the backward pass gradients, 16 bits products."""
    sizes, shape = sizes_of_shape(PRESETS["mt5-base"], 32_768), MicroBatchShape(2, 512, 256)

    def peak(optimizer, precision="fp32", checkpointing=False):
        return training_peak(sizes, optimizer, Execution(precision, checkpointing, on_gpu=True), shape)

    assert peak("adamw", checkpointing=True).activations < 0.2 * peak("adamw").activations
    assert peak("adamw8bit").optimizer < 0.26 * peak("adamw").optimizer
    assert peak("adafactor").optimizer < 0.01 * peak("adamw").optimizer
    assert peak("adafactor_in_backward").gradients < 0.2 * peak("adafactor").gradients
    assert peak("adamw", "bf16").activations < 0.7 * peak("adamw").activations


def test_a_hub_name_that_is_not_here_is_refused_without_a_network():
    """A plan downloads nothing."""
    with pytest.raises(ConfigError, match="not on this machine"):
        sizes_of_settings(ModelConfig(name_or_path="owner/missing"), None)
