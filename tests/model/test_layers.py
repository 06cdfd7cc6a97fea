"""Layers that keep less: the same mathematics. Run: python -m pytest tests/model/test_layers.py"""

import copy

import pytest
import torch
from torch.nn import functional
from transformers.models.mt5.modeling_mt5 import MT5Block, MT5Stack

from resilient_t5.model.dropout import seed_dropout
from resilient_t5.model.layers import install_lean_layers
from resilient_t5.model.loss import forward_loss
from resilient_t5.model.precision import Precision, install_float32_islands

CPU = torch.device("cpu")


def shaken(model):
    """The model with every parameter moved at random: from its first weights some gradients are zero."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def plain_loss_and_gradients(model, batch):
    """The same by the forward pass of transformers and a whole matrix of logits."""
    source_BS, mask_BS, labels_BT = batch
    logits_BTV = model(input_ids=source_BS, attention_mask=mask_BS, labels=labels_BT).logits
    loss = functional.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=-100, reduction="sum") / 10
    loss.backward()
    taken = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return loss.item(), taken


def losses_and_gradients(model, batch):
    """The loss of one micro-batch and the gradients of all parameters, which are dropped from the model."""
    loss = forward_loss(model, *batch, divisor=10.0).loss
    loss.backward()
    taken = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return loss.item(), taken


@pytest.mark.parametrize("kind", ["t5", "mt5"])
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "unpadded"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_loss_and_gradients_are_those_of_transformers_layers(
    kind, padded, checkpointing, make_model, make_examples, collate, relative_error
):
    """To 1e-12 in float64, the shared position bias included, with and without padding and checkpointing."""
    plain = shaken(make_model(kind, dtype=torch.float64)).train()
    batch = collate(make_examples(5) if padded else make_examples(1) * 3)
    lean = copy.deepcopy(plain)
    if checkpointing:
        lean.gradient_checkpointing_enable()
    expected, expected_gradients = plain_loss_and_gradients(plain, batch)
    loss, found = losses_and_gradients(lean, batch)
    assert loss == pytest.approx(expected, rel=1e-12)
    assert relative_error(found, expected_gradients) < 1e-12


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_new", "silu", "swish"])
def test_every_activation_of_a_t5_has_its_gradient(activation, make_model, make_examples, collate, relative_error):
    """What a configuration may name as gate is computed as transformers does."""
    from transformers.activations import ACT2FN

    plain = shaken(make_model("mt5", dtype=torch.float64)).train()
    plain.config.dense_act_fn = activation
    for block in (*plain.encoder.block, *plain.decoder.block):
        block.layer[-1].DenseReluDense.act = ACT2FN[activation]
    lean = copy.deepcopy(plain)
    install_lean_layers(lean)
    batch = collate(make_examples(3))
    expected, expected_gradients = plain_loss_and_gradients(plain, batch)
    loss, found = losses_and_gradients(lean, batch)
    assert loss == pytest.approx(expected, rel=1e-12)
    assert relative_error(found, expected_gradients) < 1e-12


@pytest.mark.parametrize("kind", ["t5", "mt5"])
def test_gradients_with_dropout_are_those_of_the_function_that_was_drawn(kind, make_model, make_examples, collate):
    """With the stream fixed, a finite difference of the loss along a random direction is the gradient's product with it."""
    model = shaken(make_model(kind, dtype=torch.float64, dropout=0.3)).train()
    install_lean_layers(model)
    batch = collate(make_examples(4))
    generator = torch.Generator().manual_seed(5)
    direction = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in model.named_parameters()}

    def loss_at(distance):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter += distance * direction[name]
        seed_dropout(1, 2, 3)
        value = forward_loss(model, *batch, divisor=10.0).loss
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter -= distance * direction[name]
        return value

    seed_dropout(1, 2, 3)
    _, found = losses_and_gradients(model, batch)
    slope = sum(float((found[name] * direction[name]).sum()) for name in found)
    small = 1e-7
    assert (loss_at(small) - loss_at(-small)).item() / (2 * small) == pytest.approx(slope, rel=1e-5)


def test_checkpointing_draws_the_same_dropout_again(make_model, make_examples, collate):
    """Checkpointed or not, loss and gradients agree to the last bits of float64."""
    kept = shaken(make_model("mt5", dtype=torch.float64, dropout=0.2)).train()
    install_lean_layers(kept)
    again = copy.deepcopy(kept)
    again.gradient_checkpointing_enable()
    batch, results = collate(make_examples(4)), []
    for model in (kept, again):
        seed_dropout(1, 1, 1)
        results.append(losses_and_gradients(model, batch))
    assert results[0][0] == results[1][0]
    for name, gradient in results[0][1].items():
        assert torch.allclose(gradient, results[1][1][name], rtol=1e-12, atol=1e-14), name


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("islands_first", [True, False])
def test_under_autocast_gradients_are_no_further_from_float32_than_those_of_transformers(
    precision, islands_first, make_model, make_examples, collate
):
    """Lean layers round in the same places or in fewer; islands may be installed before or after them."""
    model, batch = shaken(make_model("mt5")).train(), collate(make_examples(6))
    plain = copy.deepcopy(model)
    exact, expected_gradients = losses_and_gradients(model, batch)
    if islands_first:
        install_float32_islands(model)
    install_lean_layers(model)
    if not islands_first:
        install_float32_islands(model)

    def offset(of_model):
        with Precision(precision, "").autocast(CPU):
            loss = forward_loss(of_model, *batch, divisor=10.0).loss
        (loss * 64).backward()
        assert loss.item() == pytest.approx(exact, rel=0.01)
        wrong = (float((p.grad / 64 - expected_gradients[name]).square().sum()) for name, p in of_model.named_parameters())
        return sum(wrong) ** 0.5

    assert offset(model) < 1.2 * offset(plain)


def test_under_autocast_no_16_bit_weight_is_kept(make_model, make_examples, collate):
    """transformers' layers keep a copy of each weight matrix until the backward pass; these keep none."""
    model, batch = make_model("mt5").train(), collate(make_examples(2))
    shapes = {tuple(p.shape) for p in model.parameters() if p.ndim == 2}
    shapes |= {shape[::-1] for shape in shapes}

    def copies(forward):
        found = []

        def pack(tensor):
            if tensor.dtype == torch.bfloat16 and tuple(tensor.shape) in shapes:
                found.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), Precision("bf16", "").autocast(CPU):
            forward()
        return len(found)

    assert copies(lambda: model(input_ids=batch[0], attention_mask=batch[1], labels=batch[2])) > 0
    assert copies(lambda: forward_loss(model, *batch, divisor=10.0)) == 0


def test_generation_and_evaluation_are_as_before_and_installing_twice_changes_nothing(make_model, make_examples, collate):
    """Greedy tokens of transformers' generate; names and parameters stay the same objects."""
    model, batch = make_model("mt5").eval(), collate(make_examples(4))
    for stack, kind in ((model.encoder, MT5Stack), (model.decoder, MT5Stack)):
        stack.__class__ = kind
        for block in stack.block:
            block.__class__ = MT5Block
    before = dict(model.named_parameters())
    expected = model.generate(input_ids=batch[0], attention_mask=batch[1], max_new_tokens=7, do_sample=False)
    install_lean_layers(model)
    install_lean_layers(model)
    assert type(model.encoder.block[0]).__name__ == "LeanMT5Block"
    assert torch.equal(model.generate(input_ids=batch[0], attention_mask=batch[1], max_new_tokens=7, do_sample=False), expected)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in after)
