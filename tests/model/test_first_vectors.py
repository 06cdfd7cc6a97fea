"""Vectors of a vocabulary from its neighbours. Run: python -m pytest tests/model/test_first_vectors.py"""

import numpy as np
import pytest
import torch

from resilient_t5.config.sections import ModelConfig
from resilient_t5.model.initial_weights import STREAM_SCALE, factored, set_initial_vectors
from resilient_t5.model.load import SpecialIds, build_model


def compressed(matrix_nn):
    """(row_ends, columns, values) of a dense matrix."""
    rows, columns = np.nonzero(matrix_nn)
    ends = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(matrix_nn)))])
    return ends, columns.astype(np.int32), matrix_nn[rows, columns].astype(np.float32)


def symmetric(weights, size=60):
    """A symmetric matrix with these eigenvalues, and its eigenvectors as columns."""
    turn_nn = np.linalg.qr(np.random.default_rng(2).normal(size=(size, size)))[0]
    weights_n = np.zeros(size)
    weights_n[: len(weights)] = weights
    return turn_nn * weights_n @ turn_nn.T, turn_nn


def test_products_of_vectors_are_the_matrix_without_its_first_component():
    """Against the eigendecomposition of numpy."""
    matrix_nn, turn_nn = symmetric([50.0, 9.0, 7.0, 5.0, 3.0])
    vectors_n4 = factored(*compressed(matrix_nn), rank=4, seed=0).numpy()
    rest_nn = matrix_nn - 50.0 * np.outer(turn_nn[:, 0], turn_nn[:, 0])
    assert np.allclose(vectors_n4 @ vectors_n4.T, rest_nn, atol=1e-4)


def test_negative_directions_are_left_out_and_missing_ones_are_zero():
    """No real vectors have a negative product with themselves."""
    matrix_nn, turn_nn = symmetric([50.0, 9.0, -30.0])
    vectors_n6 = factored(*compressed(matrix_nn), rank=6, seed=0).numpy()
    assert np.allclose(vectors_n6 @ vectors_n6.T, 9.0 * np.outer(turn_nn[:, 1], turn_nn[:, 1]), atol=1e-3)
    assert factored(np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32), 6, 0).shape == (0, 6)


@pytest.mark.parametrize("preset", ["tiny", "mt5-small"])
def test_vectors_keep_their_angles_and_the_length_of_first_weights_and_other_rows_their_bits(preset):
    """In a tied table, and in both tables of an untied model."""
    model = build_model(ModelConfig(preset=preset), vocabulary_rows=50, special=SpecialIds(0, 1, 0), seed=1)
    before_VD = model.shared.weight.detach().clone()
    vectors_3R = torch.randn(3, 16, generator=torch.Generator().manual_seed(4))
    vectors_3R[1] = 0.0
    set_initial_vectors(model, np.array([7, 9, 30]), vectors_3R, seed=0)
    for table_VD in (model.shared.weight, model.lm_head.weight):
        placed_2D = table_VD[[7, 30]]
        lengths = placed_2D.norm(dim=1)
        assert torch.allclose(lengths, torch.full((2,), STREAM_SCALE * table_VD.shape[1] ** 0.5), rtol=1e-5)
        expected = torch.cosine_similarity(vectors_3R[0], vectors_3R[2], dim=0)
        assert torch.isclose(torch.cosine_similarity(*placed_2D, dim=0), expected, atol=1e-5)
    untouched = [row for row in range(50) if row not in (7, 30)]
    assert torch.equal(model.shared.weight[untouched], before_VD[untouched])


def test_rounding_noise_about_an_id_is_no_vector():
    """An id without informative neighbours gets a vector of nearly zero, and keeps its random row."""
    model = build_model(ModelConfig(preset="tiny"), vocabulary_rows=50, special=SpecialIds(0, 1, 0), seed=1)
    before_D = model.shared.weight[9].detach().clone()
    vectors_2R = torch.randn(2, 16, generator=torch.Generator().manual_seed(4))
    vectors_2R[1] *= 1e-5
    set_initial_vectors(model, np.array([7, 9]), vectors_2R, seed=0)
    set_initial_vectors(model, np.zeros(0, np.int64), torch.zeros(0, 16), seed=0)
    assert torch.equal(model.shared.weight[9], before_D)
