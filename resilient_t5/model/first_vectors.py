"""The first vectors of a vocabulary: what its pieces stand beside, factored, instead of noise.

A model from scratch learns from the masked tokens alone, a few hundred an update; which pieces resemble one another can
be counted beforehand from millions of tokens. The matrix of positive pointwise mutual information is factored by a
randomised eigendecomposition (Halko, Martinsson & Tropp 2011); the product of two vectors then says how much more often
their pieces stand together than chance has it (Levy & Goldberg 2014).
"""

import warnings

import numpy as np
import torch

from resilient_t5.model.first_weights import STREAM_SCALE
from resilient_t5.model.tables import T5Model, is_tied

MOST_IDS = 16_384
"""Ids that get a vector at most, the most frequent first."""
RANK = 256
"""Components that are kept at most; a wider model holds them in its first directions, turned at random."""
OVERSAMPLED = 1.5
ROUNDS = 4
# A factored row shorter than this share of the longest is rounding noise about an id without telling neighbours.
NOISE_SHARE = 1e-3


@torch.no_grad()
def put_first_vectors(model: T5Model, ids: np.ndarray, vectors_nR: torch.Tensor, seed: int) -> None:
    """Put vectors into the rows `ids` of both vocabulary tables; they keep the length that T5's first weights have.

    Args:
        model: from scratch, with first weights; other rows stay as they are.
        ids: int (n,), rows of the model.
        vectors_nR: float32, R at most the model's width; a row that is as good as zero leaves its id as it is.
        seed: of the turn into the model's width.
    """
    table_VD = model.shared.weight
    width, rank = table_VD.shape[1], vectors_nR.shape[1]
    generator = torch.Generator().manual_seed(seed)
    turn_RD = torch.nn.init.orthogonal_(torch.empty(rank, width), generator=generator)
    length_n1 = vectors_nR.norm(dim=1, keepdim=True)
    told = (length_n1[:, 0] > NOISE_SHARE * length_n1.max()).nonzero()[:, 0] if len(ids) else torch.zeros(0, dtype=torch.int64)
    placed_nD = (vectors_nR[told] / length_n1[told] * STREAM_SCALE * width**0.5) @ turn_RD
    rows = torch.from_numpy(np.asarray(ids, np.int64))[told].to(table_VD.device)
    for table in [table_VD] if is_tied(model) else [table_VD, model.lm_head.weight]:
        table[rows] = placed_nD.to(table.device)


def factored(row_ends: np.ndarray, columns: np.ndarray, values: np.ndarray, rank: int, seed: int) -> torch.Tensor:
    """Vectors (n, rank) whose products come nearest to a symmetric matrix in compressed rows, less its first component.

    The first component only says how frequent a piece is. Directions in which the matrix is negative are left out: no
    real vectors have such products. With fewer positive directions than `rank` the last columns are zero.

    Args:
        row_ends: int (n + 1,)
        columns: int, the column of every value.
        values: float32
        rank: components.
        seed: of the first guess.
    """
    size = len(row_ends) - 1
    tried = min(size, round((rank + 1) * OVERSAMPLED))
    if tried == 0:
        return torch.zeros(size, rank)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support")
        matrix_nn = torch.sparse_csr_tensor(
            torch.from_numpy(row_ends),
            torch.from_numpy(columns.astype(np.int64)),
            torch.from_numpy(values),
            (size, size),
            check_invariants=True,
        )
    basis_nk = torch.randn(size, tried, generator=torch.Generator().manual_seed(seed))
    for _ in range(ROUNDS):
        basis_nk = torch.linalg.qr(matrix_nn @ basis_nk)[0]
    weights_k, directions_kk = torch.linalg.eigh(basis_nk.T @ (matrix_nn @ basis_nk))
    strongest = weights_k.argsort(descending=True)[1 : rank + 1]
    found_nr = (basis_nk @ directions_kk[:, strongest]) * weights_k[strongest].clamp(min=0).sqrt()
    return torch.nn.functional.pad(found_nr, (0, rank - found_nr.shape[1]))
