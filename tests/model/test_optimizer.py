"""Optimizers, groups and named state. Run: python -m pytest tests/model/test_optimizer.py"""

import json

import pytest
import torch
from safetensors.torch import load, save
from transformers.optimization import Adafactor as TheirAdafactor

from resilient_t5.config.sections import OptimConfig
from resilient_t5.errors import ConfigError, ResumeMismatch
from resilient_t5.model.loss import forward_loss
from resilient_t5.model.optimizer import Adafactor, adafactor_update, build_optimizer, load_named_state, named_state, orthogonal

CPU = torch.device("cpu")
NAMES = ["adamw", "adafactor", "muon"]


def train(model, optimizer, batch, updates):
    """Plain updates, learning rate changing from outside."""
    for number in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (number + 1)
        forward_loss(model, *batch, divisor=10.0).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("kind", ["t5", "mt5"])
def test_norms_and_position_biases_are_never_decayed_and_every_parameter_stands_once(kind, make_model):
    """Matrices in the group with decay, the rest in the other, in the order of the model, a tied table once."""
    model = make_model(kind)
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.1), CPU)
    name_of = {id(p): name for name, p in model.named_parameters()}
    decayed, plain = ([name_of[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert all("layer_norm" in name or "relative_attention_bias" in name for name in plain)
    assert not any("layer_norm" in name or "relative_attention_bias" in name for name in decayed)
    order = [name for name, _ in model.named_parameters()]
    assert sorted(decayed + plain) == sorted(order)
    assert decayed == [name for name in order if name in decayed]
    assert optimizer.param_groups[0]["fused"] is True


def test_adamw_follows_the_settings(make_model):
    """Betas, eps and learning rate arrive."""
    group = build_optimizer(make_model("t5"), OptimConfig(lr=3e-4, beta1=0.8, beta2=0.95, eps=1e-6), CPU).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.8, 0.95), 1e-6)


def test_frozen_parameters_are_left_out(make_model):
    """What does not train has no place in the optimizer."""
    model = make_model("mt5")
    model.shared.weight.requires_grad_(False)
    optimizer = build_optimizer(model, OptimConfig(), CPU)
    assert all(p is not model.shared.weight for group in optimizer.param_groups for p in group["params"])


@pytest.mark.parametrize("name", NAMES)
def test_a_restored_optimizer_goes_on_bit_for_bit(name, make_model, make_examples, collate):
    """Three updates, state through safetensors and JSON, two more: equal to five without a break."""
    batch, settings = collate(make_examples(4)), OptimConfig(name=name)
    straight, broken = make_model("mt5"), make_model("mt5")
    first = build_optimizer(straight, settings, CPU)
    train(straight, first, batch, 3)
    tensors, description = named_state(first, straight)
    kept, words = save({key: value.clone() for key, value in tensors.items()}), json.dumps(description)
    broken.load_state_dict({key: value.clone() for key, value in straight.state_dict().items()})
    second = build_optimizer(broken, settings, CPU)
    load_named_state(second, broken, load(kept), json.loads(words))
    train(straight, first, batch, 2)
    train(broken, second, batch, 2)
    for (key, a), b in zip(straight.named_parameters(), broken.parameters(), strict=True):
        assert torch.equal(a, b), key
    again, _ = named_state(second, broken)
    assert all(torch.equal(value, again[key]) for key, value in named_state(first, straight)[0].items())


@pytest.mark.parametrize("name", NAMES)
def test_the_state_keeps_its_dtype_when_parameters_are_bf16(name, make_model, make_examples, collate):
    """float32 moments survive a load into a bf16 model; torch's own loading would round them."""
    model = make_model("t5")
    optimizer = build_optimizer(model, OptimConfig(name=name), CPU)
    train(model, optimizer, collate(make_examples(4)), 2)
    tensors, description = named_state(optimizer, model)
    narrow = make_model("t5", dtype=torch.bfloat16)
    target = build_optimizer(narrow, OptimConfig(name=name), CPU)
    load_named_state(target, narrow, tensors, description)
    loaded, _ = named_state(target, narrow)
    assert loaded.keys() == tensors.keys()
    for key, value in tensors.items():
        assert (loaded[key].dtype, torch.equal(loaded[key], value)) == (value.dtype, True), key
        assert loaded[key].data_ptr() == value.data_ptr()  # a copy would double the memory of a resume


def test_names_of_the_state_are_those_of_the_parameters(make_model, make_examples, collate):
    """<parameter>/<key> for every parameter, with a description in plain JSON; empty before the first update."""
    model = make_model("mt5")
    optimizer = build_optimizer(model, OptimConfig(), CPU)
    assert named_state(optimizer, model)[0] == {}
    train(model, optimizer, collate(make_examples(2)), 1)
    tensors, description = named_state(optimizer, model)
    assert set(tensors) == {f"{n}/{k}" for n, _ in model.named_parameters() for k in ("step", "exp_avg", "exp_avg_sq")}
    assert json.loads(json.dumps(description)) == description


def test_a_state_of_another_optimizer_or_model_is_refused(make_model, make_examples, collate):
    """Kind, groups, names and shapes are compared before anything is put in place."""
    model, batch = make_model("mt5"), collate(make_examples(2))
    optimizer = build_optimizer(model, OptimConfig(), CPU)
    train(model, optimizer, batch, 1)
    tensors, description = named_state(optimizer, model)
    other = build_optimizer(model, OptimConfig(name="adafactor"), CPU)
    with pytest.raises(ResumeMismatch, match="another optimizer"):
        load_named_state(other, model, tensors, description)
    tied = make_model("t5")
    with pytest.raises(ResumeMismatch, match="other parameters"):
        load_named_state(build_optimizer(tied, OptimConfig(), CPU), tied, tensors, description)
    for wrong in (
        {"shared.weight/exp_avg": torch.ones(3, 3)},
        {"nothing/exp_avg": torch.ones(1)},
        {"shared.weight": torch.ones(1)},
    ):
        with pytest.raises(ResumeMismatch, match="does not fit"):
            load_named_state(optimizer, model, tensors | wrong, description)
    assert named_state(optimizer, model)[0].keys() == tensors.keys()


@pytest.mark.parametrize("shape", [(7,), (40, 9), (3, 20, 5)])
@pytest.mark.parametrize("block_values", [2**22, 32])
def test_adafactor_is_that_of_transformers_with_an_absolute_rate(shape, block_values, monkeypatch):
    """Vectors, matrices and stacks of matrices, whole and by blocks of rows, with clipped and unclipped updates."""
    monkeypatch.setattr("resilient_t5.model.optimizer.BLOCK_VALUES", block_values)
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(shape, generator=generator)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    fixed = {"relative_step": False, "scale_parameter": False, "warmup_init": False}
    optimizers = (Adafactor([ours], lr=0.1), TheirAdafactor([theirs], lr=0.1, **fixed))
    for size in (1.0, 1.0, 50.0, 0.01):
        gradient = size * torch.randn(shape, generator=generator)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(ours.grad, gradient)
    assert (ours - start).abs().max().item() > 0.01
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_adafactor_keeps_its_state_in_float32_and_small():
    """A bf16 matrix has float32 row and column means, and nothing of its own size."""
    parameter, state = torch.randn(50, 30, dtype=torch.bfloat16), {}
    adafactor_update(parameter, torch.randn(50, 30, dtype=torch.bfloat16), state, lr=0.1)
    assert {key: (value.dtype, tuple(value.shape)) for key, value in state.items() if key != "count"} == {
        "row": (torch.float32, (50,)),
        "column": (torch.float32, (30,)),
    }
    assert int(state["count"]) == 1


def test_adafactor_survives_a_gradient_of_zeros():
    """A row that never occurs, and a whole gradient of zeros, give no NaN."""
    parameter, state = torch.randn(6, 4), {}
    before = parameter.clone()
    for gradient in (torch.zeros(6, 4), torch.eye(6, 4)):
        adafactor_update(parameter, gradient, state, lr=0.1)
    assert torch.isfinite(parameter).all()
    assert torch.equal(parameter[5], before[5])


@pytest.mark.parametrize("kind", ["t5", "mt5"])
def test_adafactor_in_the_backward_pass_is_adafactor_after_it(kind, make_model, make_examples, collate):
    """Bit for bit, tied and untied, the norm included; no gradient is left, and each parameter moves once a pass."""
    plain, direct = make_model(kind), make_model(kind)
    batch = collate(make_examples(5))
    after = build_optimizer(plain, OptimConfig(name="adafactor"), CPU)
    inside = build_optimizer(direct, OptimConfig(name="adafactor_in_backward", clip_norm=0.0), CPU)
    for number in range(3):
        lr = 0.01 / (number + 1)
        for group in after.param_groups:
            group["lr"] = lr
        forward_loss(plain, *batch, divisor=10.0).loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()])
        after.step()
        after.zero_grad(set_to_none=True)
        inside.begin(lr)
        forward_loss(direct, *batch, divisor=10.0).loss.backward()
        assert inside.end() == pytest.approx(float(norm), rel=1e-5)
        assert inside.moved == len(list(direct.parameters()))
        assert all(p.grad is None for p in direct.parameters())
    for (name, a), b in zip(plain.named_parameters(), direct.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_in_the_backward_pass_nothing_moves_after_a_gradient_that_is_not_finite(make_model, make_examples, collate):
    """Parameters before it were updated and are counted; those after it stay bitwise the same."""
    model, batch = make_model("mt5"), collate(make_examples(5))
    broken = model.encoder.block[1].layer[1].DenseReluDense.wo.weight

    def overflow(parameter):
        parameter.grad.mul_(float("inf"))

    broken.register_post_accumulate_grad_hook(overflow)  # before that of the optimizer
    optimizer = build_optimizer(model, OptimConfig(name="adafactor_in_backward", clip_norm=0.0), CPU)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.begin(0.01)
    forward_loss(model, *batch, divisor=10.0).loss.backward()
    assert optimizer.failed == tuple(broken.shape)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert "lm_head.weight" in moved
    assert len(moved) <= optimizer.moved < len(before)
    assert not any(name.startswith("encoder.block.0") or name == "shared.weight" for name in moved)


def test_adamw8bit_without_bitsandbytes_names_the_command_to_install_it(make_model, monkeypatch):
    """A ConfigError with the command, not an ImportError."""
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match="lowmem"):
        build_optimizer(make_model("mt5"), OptimConfig(name="adamw8bit"), CPU)


def test_adamw8bit_continues_bit_for_bit_after_a_resume(make_model, make_examples, collate):
    """With bitsandbytes: bytes, scales and counts are restored, lookup tables rebuilt; most moments take one byte."""
    pytest.importorskip("bitsandbytes")
    test_a_restored_optimizer_goes_on_bit_for_bit("adamw8bit", lambda kind: make_model(kind, rows=600), make_examples, collate)
    model = make_model("mt5", rows=600)
    optimizer = build_optimizer(model, OptimConfig(name="adamw8bit"), CPU)
    train(model, optimizer, collate(make_examples(3)), 1)
    tensors, _ = named_state(optimizer, model)
    assert tensors["shared.weight/state1"].dtype == torch.uint8
    assert not any("qmap" in name for name in tensors)


def test_muon_moves_what_is_inside_the_layers_and_adamw_the_rest(make_model, make_examples, collate):
    """No table, norm or bias has a momentum, every other matrix has nothing else; decay stays with the matrices."""
    model = make_model("mt5")
    optimizer = build_optimizer(model, OptimConfig(name="muon", weight_decay=0.1), CPU)
    train(model, optimizer, collate(make_examples(4)), 1)
    keys = {}
    for name, _, key in (name.rpartition("/") for name in named_state(optimizer, model)[0]):
        keys.setdefault(name, set()).add(key)
    inside = {name for name, found in keys.items() if found == {"momentum"}}
    assert inside == {name for name, p in model.named_parameters() if ".layer." in name and p.ndim == 2 and "bias" not in name}
    assert {"exp_avg", "exp_avg_sq", "step"} == set.union(*(found for name, found in keys.items() if name not in inside))
    assert {"shared.weight", "lm_head.weight", "encoder.final_layer_norm.weight"} <= keys.keys() - inside
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0, 0.1]


@pytest.mark.parametrize("product_dtype", [torch.float32, torch.bfloat16])
def test_muon_is_that_of_torch_with_the_rate_of_adamw(product_dtype, make_model, monkeypatch):
    """Three updates of every matrix, in blocks of two and more, within what bf16 rounds in torch's."""
    monkeypatch.setattr("resilient_t5.model.optimizer.BLOCK_VALUES", 3000)
    model, generator = make_model("mt5"), torch.Generator().manual_seed(1)
    optimizer = build_optimizer(model, OptimConfig(name="muon", weight_decay=0.1), CPU, product_dtype)
    matrices = optimizer.param_groups[-1]["params"]
    copies = [matrix.detach().clone().requires_grad_() for matrix in matrices]
    theirs = torch.optim.Muon(copies, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    before = [matrix.detach().clone() for matrix in matrices]
    for number in range(3):
        for group in (*optimizer.param_groups, *theirs.param_groups):
            group["lr"] = 0.01 / (number + 1)
        for matrix, copy in zip(matrices, copies, strict=True):
            matrix.grad = torch.randn(matrix.shape, generator=generator)
            copy.grad = matrix.grad.clone()
        optimizer.step()
        theirs.step()
    for first, ours, their in zip(before, matrices, copies, strict=True):
        assert torch.linalg.norm(ours - their) < 0.03 * torch.linalg.norm(their - first)


def test_an_orthogonal_move_has_equal_singular_values_and_nothing_gives_nothing():
    """Values down to a hundredth of the largest come between 0.6 and 1.3; zeros stay zeros."""
    generator = torch.Generator().manual_seed(1)
    left, _ = torch.linalg.qr(torch.randn(24, 24, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(40, 24, generator=generator))
    matrix = left @ torch.diag(torch.logspace(0, -2, 24)) @ right.T
    values = torch.linalg.svdvals(orthogonal(matrix[None], torch.float32)[0])
    assert values.min() > 0.6 and values.max() < 1.3
    assert torch.equal(orthogonal(torch.zeros(2, 3, 5), torch.float32), torch.zeros(2, 3, 5))
