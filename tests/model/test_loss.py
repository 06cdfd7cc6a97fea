"""The summed loss against plain autograd. Run: python -m pytest tests/model/test_loss.py"""

import math

import pytest
import torch
from torch.nn import functional

from resilient_t5.errors import DataError
from resilient_t5.model.embeddings import SpecialIds
from resilient_t5.model.loss import forward_loss, shift_right, token_nll

PRECISION = [(torch.float32, 1e-6), (torch.float64, 1e-12)]
KINDS = ["t5", "mt5"]


def plain_loss(model, batch, *, divisor, label_smoothing=0.0, z_loss=0.0):
    """What transformers' own forward and a whole logits matrix give."""
    source_BS, mask_BS, labels_BT = batch
    logits_BTV = model(input_ids=source_BS, attention_mask=mask_BS, labels=labels_BT).logits
    flat, labels = logits_BTV.flatten(0, 1), labels_BT.flatten()
    nll_sum = functional.cross_entropy(flat, labels, ignore_index=-100, reduction="sum", label_smoothing=label_smoothing)
    squares = torch.logsumexp(flat, -1).square()[labels != -100].sum()
    return (nll_sum + z_loss * squares) / divisor


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISION)
def test_the_gradient_of_an_update_does_not_depend_on_how_it_is_cut(
    kind, dtype, tolerance, make_model, make_examples, collate, gradients_of, relative_error
):
    """Eight examples of unequal length in 1, 2, 4 or 8 micro-batches, each padded for itself, give one gradient."""
    model, examples = make_model(kind, dtype=dtype), make_examples(8)
    tokens = sum(len(target) for _, target in examples)
    whole = None
    for parts in (1, 2, 4, 8):
        for first in range(0, 8, 8 // parts):
            forward_loss(model, *collate(examples[first : first + 8 // parts]), divisor=tokens).loss.backward()
        found = gradients_of(model)
        whole = whole or found
        assert relative_error(found, whole) <= tolerance


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISION)
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradient_equal_those_of_the_full_forward(
    kind, dtype, tolerance, checkpointing, make_model, make_examples, collate, gradients_of, relative_error
):
    """Tied with scaled decoder output and untied without, -100 labels, masks, with and without checkpointing."""
    model, batch = make_model(kind, dtype=dtype), collate(make_examples(5))
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    tokens = int((batch[2] != -100).sum())
    parts = forward_loss(model, *batch, divisor=tokens)
    parts.loss.backward()
    found = gradients_of(model)
    expected_loss = model(input_ids=batch[0], attention_mask=batch[1], labels=batch[2]).loss
    expected_loss.backward()
    assert abs(parts.loss.item() - expected_loss.item()) <= tolerance * expected_loss.item()
    assert math.isclose(float(parts.nll_sum) / tokens, expected_loss.item(), rel_tol=max(tolerance, 1e-6))
    assert relative_error(found, gradients_of(model)) <= tolerance


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISION)
def test_label_smoothing_and_z_loss_equal_a_plain_reference(
    kind, dtype, tolerance, make_model, make_examples, collate, gradients_of, relative_error
):
    """Smoothing as torch's cross_entropy defines it, z-loss as the squared log-partition of each label."""
    model, batch = make_model(kind, dtype=dtype), collate(make_examples(4))
    extra = {"divisor": 7.0, "label_smoothing": 0.1, "z_loss": 0.01}
    parts = forward_loss(model, *batch, **extra)
    parts.loss.backward()
    found = gradients_of(model)
    expected = plain_loss(model, batch, **extra)
    expected.backward()
    assert abs(parts.loss.item() - expected.item()) <= tolerance * abs(expected.item())
    assert relative_error(found, gradients_of(model)) <= tolerance
    assert float(parts.nll_sum) == pytest.approx(plain_loss(model, batch, divisor=1.0).item(), rel=1e-6)


def test_a_micro_batch_without_labels_adds_nothing(make_model, make_examples, collate):
    """Its loss is 0 and its gradients are 0, not NaN."""
    source_BS, mask_BS, labels_BT = collate(make_examples(2))
    model = make_model("mt5")
    parts = forward_loss(model, source_BS, mask_BS, torch.full_like(labels_BT, -100), divisor=5.0)
    parts.loss.backward()
    assert parts.loss.item() == 0.0
    assert float(parts.nll_sum) == 0.0
    assert all(float(p.grad.abs().max()) == 0.0 for p in model.parameters() if p.grad is not None)


def test_an_update_without_any_target_token_is_an_error_in_the_data(make_model, make_examples, collate):
    """A divisor of zero tokens raises an error."""
    with pytest.raises(DataError, match="target token"):
        forward_loss(make_model("t5"), *collate(make_examples(1)), divisor=0.0)


def test_a_scaled_backward_scales_every_gradient_by_exactly_that_factor(make_model, make_examples, collate, gradients_of):
    """A power of two, as a GradScaler uses, changes no bit of the gradients after it is divided out."""
    model, batch = make_model("mt5"), collate(make_examples(3))
    forward_loss(model, *batch, divisor=9.0).loss.backward()
    plain = gradients_of(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    scaler.scale(forward_loss(model, *batch, divisor=9.0).loss).backward()
    for name, gradient in gradients_of(model).items():
        assert torch.equal(gradient / 4096.0, plain[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_tables_get_no_gradient_and_the_rest_gets_the_same(kind, make_model, make_examples, collate, gradients_of):
    """With requires_grad False on the tables nothing is written into them."""
    model, batch = make_model(kind), collate(make_examples(3))
    forward_loss(model, *batch, divisor=9.0).loss.backward()
    whole = gradients_of(model)
    model.shared.weight.requires_grad_(False)
    model.lm_head.weight.requires_grad_(False)
    forward_loss(model, *batch, divisor=9.0).loss.backward()
    found = gradients_of(model)
    assert set(whole) - set(found) == ({"shared.weight", "lm_head.weight"} if kind == "mt5" else {"shared.weight"})
    assert all(torch.equal(found[name], whole[name]) for name in found)


def test_bf16_autocast_stays_close_to_float32(make_model, make_examples, collate, gradients_of):
    """The loss moves by less than 1 %, the whole gradient by less than 5 %, and all gradients are float32."""
    model, batch = make_model("mt5"), collate(make_examples(6))
    exact = forward_loss(model, *batch, divisor=20.0)
    exact.loss.backward()
    expected = gradients_of(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = forward_loss(model, *batch, divisor=20.0)
    parts.loss.backward()
    found = gradients_of(model)
    assert parts.loss.item() == pytest.approx(exact.loss.item(), rel=0.01)
    assert parts.loss.dtype == torch.float32
    difference = sum(float((found[name] - expected[name]).square().sum()) for name in expected)
    assert math.sqrt(difference / sum(float(g.square().sum()) for g in expected.values())) < 0.05
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}


def test_the_head_is_a_float32_island_under_fp16_autocast(make_model, make_examples, collate):
    """Logits beyond 65,504 stay finite, and so does the head's gradient; the layers below need the scaler's care."""
    model, batch = make_model("mt5"), collate(make_examples(3))
    with torch.no_grad():
        model.lm_head.weight *= 3e5
    exact = forward_loss(model, *batch, divisor=20.0).loss.item()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = forward_loss(model, *batch, divisor=20.0).loss
    loss.backward()
    assert loss.item() == pytest.approx(exact, rel=0.02)
    assert torch.isfinite(model.lm_head.weight.grad).all()


def test_every_parameter_is_announced_once_and_the_tables_last_and_first(make_model, make_examples, collate):
    """A hook after accumulation sees the head complete before any layer, and the embedding after all of them."""
    model, batch = make_model("mt5"), collate(make_examples(2))
    seen = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.append((name, float(p.grad.norm()))))
    forward_loss(model, *batch, divisor=3.0).loss.backward()
    names = [name for name, _ in seen]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert (names[0], names[-1]) == ("lm_head.weight", "shared.weight")
    assert all(norm == pytest.approx(float(model.get_parameter(name).grad.norm())) for name, norm in seen)


def test_evaluation_gives_sums_per_example_and_counts_what_is_asked_for(make_model, make_examples, collate):
    """nll, tokens and correct tokens of each example, over all labels and over a part of them, equal the plain ones."""
    model, examples = make_model("t5"), make_examples(6)
    source_BS, mask_BS, labels_BT = batch = collate(examples)
    with torch.no_grad():
        logits_BTV = model(input_ids=source_BS, attention_mask=mask_BS, labels=labels_BT).logits
    # Half of the labels are made right, so that the count of correct tokens is neither none nor all.
    best_BT = logits_BTV.argmax(-1)
    real_BT = labels_BT != -100
    nll_BT = functional.cross_entropy(logits_BTV.transpose(1, 2), labels_BT, ignore_index=-100, reduction="none")
    part_BT = real_BT & (torch.arange(labels_BT.shape[1]) % 2 == 0)
    assert token_nll(model, *batch).part is None
    whole = token_nll(model, *batch, part_BT=part_BT)
    for counted_BT, found in ((real_BT, whole), (part_BT, whole.part)):
        assert torch.allclose(found.nll_sum_B, (nll_BT * counted_BT).sum(1).double(), rtol=1e-6)
        assert torch.equal(found.tokens_B, counted_BT.sum(1))
        assert torch.equal(found.correct_B, ((best_BT == labels_BT) & counted_BT).sum(1))


def test_a_mask_may_be_left_out_when_nothing_is_padded(make_model, make_examples, collate):
    """No mask and a mask of ones give the same loss."""
    model, batch = make_model("t5"), collate(make_examples(1))
    with_mask = forward_loss(model, *batch, divisor=1.0).loss
    without = forward_loss(model, batch[0], None, batch[2], divisor=1.0).loss
    assert without.item() == pytest.approx(with_mask.item(), rel=1e-6)


def test_decoder_inputs_are_the_labels_shifted_right():
    """The start id comes first, the last label goes, -100 becomes the pad."""
    shifted = shift_right(torch.tensor([[5, 6, 1, -100], [7, 1, -100, -100]]), SpecialIds(0, 1, 9))
    assert shifted.tolist() == [[9, 5, 6, 1], [9, 7, 1, 0]]
