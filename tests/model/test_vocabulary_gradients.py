"""The two in-place Functions against autograd. Run: python -m pytest tests/model/test_vocabulary_gradients.py"""

import pytest
import torch
from torch.nn import functional

from resilient_t5.model.vocabulary_gradients import (
    BLOCK_ROWS,
    BLOCK_VALUES,
    EmbeddingInPlace,
    HeadLossInPlace,
    LossTerms,
    rows_of_block,
)

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}
ROWS, WIDTH = 37, 8


def case(dtype, labels=(0, 36, 5, 5, 20, 16)):
    """Hidden states, a head and labels, with gradients on."""
    generator = torch.Generator().manual_seed(4)
    hidden_ND = torch.randn(len(labels), WIDTH, generator=generator, dtype=dtype).requires_grad_()
    weight_VD = torch.randn(ROWS, WIDTH, generator=generator, dtype=dtype).requires_grad_()
    return hidden_ND, weight_VD, torch.tensor(labels)


def plain(hidden_ND, weight_VD, labels_N, terms):
    """The same loss from whole logits."""
    logits_NV = hidden_ND @ weight_VD.T
    loss = functional.cross_entropy(logits_NV, labels_N, reduction="sum", label_smoothing=terms.label_smoothing)
    return terms.scale * (loss + terms.z_loss * torch.logsumexp(logits_NV, 1).square().sum())


@pytest.mark.parametrize("block_rows", [1, 5, 16, 36, 37, 38, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("label_smoothing", "z_loss"), [(0.0, 0.0), (0.2, 0.0), (0.0, 0.1), (0.3, 0.05)])
def test_blocks_of_any_size_equal_whole_logits(block_rows, dtype, label_smoothing, z_loss):
    """Blocks smaller than, dividing, not dividing, equal to and beyond the vocabulary; upstream factor 3."""
    terms = LossTerms(0.25, label_smoothing, z_loss, dtype, block_rows=block_rows)
    hidden_ND, weight_VD, labels_N = case(dtype)
    expected = plain(hidden_ND, weight_VD, labels_N, terms)
    expected_gradients = torch.autograd.grad(3.0 * expected, (hidden_ND, weight_VD))
    loss, nll_N, _ = HeadLossInPlace.apply(hidden_ND, weight_VD, labels_N, terms)
    (3.0 * loss).backward()
    assert torch.allclose(loss, expected, rtol=TOLERANCE[dtype])
    assert torch.allclose(nll_N, functional.cross_entropy(hidden_ND @ weight_VD.T, labels_N, reduction="none"), rtol=1e-5)
    for found, expected_gradient in zip((hidden_ND.grad, weight_VD.grad), expected_gradients, strict=True):
        assert float((found - expected_gradient).norm() / expected_gradient.norm()) <= TOLERANCE[dtype]


@pytest.mark.parametrize("labels", [(3,), (0, 1, 2, 3), (36, 35, 36), ()])
def test_labels_in_one_block_one_label_and_no_label(labels):
    """All labels in the first or the last block, N = 1, N = 0."""
    terms = LossTerms(1.0, product_dtype=torch.float64, block_rows=9)
    hidden_ND, weight_VD, labels_N = case(torch.float64, labels)
    labels_N = labels_N.long()
    loss, _, _ = HeadLossInPlace.apply(hidden_ND, weight_VD, labels_N, terms)
    loss.backward()
    expected = plain(hidden_ND, weight_VD, labels_N, terms)
    expected_gradient = torch.autograd.grad(expected, (hidden_ND, weight_VD))
    assert torch.allclose(loss, expected, rtol=1e-13)
    assert torch.allclose(hidden_ND.grad, expected_gradient[0], atol=1e-13)
    assert torch.allclose(weight_VD.grad, expected_gradient[1], atol=1e-13)


@pytest.mark.parametrize("block_rows", [10, 100])
def test_gradients_accumulate_over_micro_batches_and_over_a_second_backward(block_rows):
    """Three losses add up in .grad; a graph that is kept gives the same gradient twice."""
    terms = LossTerms(1.0, product_dtype=torch.float64, block_rows=block_rows)
    hidden_ND, weight_VD, labels_N = case(torch.float64)
    loss, _, _ = HeadLossInPlace.apply(hidden_ND, weight_VD, labels_N, terms)
    loss.backward(retain_graph=True)
    once = weight_VD.grad.clone()
    loss.backward()
    HeadLossInPlace.apply(hidden_ND, weight_VD, labels_N, terms)[0].backward()
    assert torch.allclose(weight_VD.grad, 3 * once, rtol=1e-12)
    assert torch.allclose(hidden_ND.grad, torch.autograd.grad(3 * plain(hidden_ND, weight_VD, labels_N, terms), hidden_ND)[0])


def test_large_logits_do_not_overflow():
    """Logits of +-2,000 in float32: the running maximum keeps the sum of exponentials finite."""
    hidden_ND, weight_VD, labels_N = case(torch.float32)
    terms = LossTerms(1.0, block_rows=10)
    loss, _, _ = HeadLossInPlace.apply(hidden_ND * 1000, weight_VD, labels_N, terms)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(weight_VD.grad).all()
    assert torch.allclose(loss, plain(hidden_ND * 1000, weight_VD, labels_N, terms), rtol=1e-5)


def test_the_running_argmax_is_that_of_the_whole_logits():
    """The best row over all blocks decides; the first of equal ones, as in torch."""
    hidden_ND, weight_VD, _ = case(torch.float32, tuple(range(30)))
    best_N = (hidden_ND @ weight_VD.T).argmax(1)
    labels_N = torch.where(torch.arange(30) % 2 == 0, best_N, (best_N + 1) % ROWS)
    with torch.no_grad():
        terms = LossTerms(1.0, count_correct=True, block_rows=7)
        _, _, correct_N = HeadLossInPlace.apply(hidden_ND, weight_VD, labels_N, terms)
        level = torch.zeros_like(weight_VD)
        _, _, first_N = HeadLossInPlace.apply(hidden_ND, level, torch.zeros_like(labels_N), terms)
    assert torch.equal(correct_N, torch.arange(30) % 2 == 0)
    assert first_N.all()


def test_the_embedding_adds_the_rows_that_autograd_would():
    """Repeated ids add up; what was in .grad stays; a tied table takes the head's share too."""
    weight_VD = torch.randn(ROWS, WIDTH, dtype=torch.float64).requires_grad_()
    ids, upstream = torch.tensor([[3, 3, 0], [36, 3, 5]]), torch.randn(2, 3, WIDTH, dtype=torch.float64)
    (expected_gradient,) = torch.autograd.grad(functional.embedding(ids, weight_VD), weight_VD, upstream)
    for _ in range(2):
        EmbeddingInPlace.apply(weight_VD, ids).backward(upstream)
    assert torch.allclose(weight_VD.grad, 2 * expected_gradient, rtol=1e-14)
    hidden_ND, _, labels_N = case(torch.float64)
    terms = LossTerms(1.0, product_dtype=torch.float64)
    (head,) = torch.autograd.grad(plain(hidden_ND, weight_VD, labels_N, terms), weight_VD)
    HeadLossInPlace.apply(hidden_ND, weight_VD, labels_N, terms)[0].backward()
    assert torch.allclose(weight_VD.grad, 2 * expected_gradient + head, rtol=1e-12)


def test_no_new_tensor_of_the_size_of_the_vocabulary_is_made():
    """With gradients in place, forward and backward allocate less than half of one table."""
    rows, width = 20_000, 16
    weight_VD = torch.randn(rows, width).requires_grad_()
    weight_VD.grad = torch.zeros_like(weight_VD)
    hidden_ND, labels_N = torch.randn(8, width).requires_grad_(), torch.randint(rows, (8,))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                is_view = isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() in owned
                if isinstance(tensor, torch.Tensor) and not is_view:
                    largest = max(largest, tensor.untyped_storage().nbytes())
            return result

    owned = {weight_VD.untyped_storage().data_ptr(), weight_VD.grad.untyped_storage().data_ptr()}
    with Watch():
        loss, _, _ = HeadLossInPlace.apply(hidden_ND, weight_VD, labels_N, LossTerms(1.0, block_rows=512))
        (loss + EmbeddingInPlace.apply(weight_VD, labels_N).sum()).backward()
    assert 0 < largest < rows * width * 4 / 2


def test_a_block_takes_as_many_rows_as_its_buffer_holds():
    """Few tokens: more rows, up to all; many: never fewer than BLOCK_ROWS; no token at all is no division by zero."""
    assert rows_of_block(512, 250_112) == BLOCK_ROWS
    assert rows_of_block(5000, 250_112) == BLOCK_ROWS
    assert rows_of_block(64, 250_112) == BLOCK_VALUES // 64
    assert rows_of_block(64, 32_100) == 32_100
    assert rows_of_block(0, 37) == 37
    assert all(rows_of_block(tokens, 250_112) * tokens <= BLOCK_VALUES for tokens in range(1, 513))
