"""The first weights of a model from scratch: T5's shapes, and attention that looks at the right place from the start.

Drawn as T5 draws them, a small model spends its whole budget on finding which sentinel it is asked for and what stands
beside it. So the weights begin as trained attention looks (mimetic initialisation, Trockman & Kolter 2023, arXiv
2305.09828), with T5's own parameters only; everything is trained on and every export is a plain T5:

* Cross-attention: queries and keys are the same matrix, so a decoder that reads a sentinel looks at that sentinel in
  the source.
* What the encoder's self-attention and cross-attention see they write down as they read it: the output matrix is the
  transposed values, whose rows are orthogonal. So a gap knows its neighbours' vectors, each head in a part of its own.
* Self-attention: the relative position bias of some heads points at one neighbour, the other heads average over
  everything; queries begin at zero and keys small, so that no random score disturbs either, also not after Adam's
  first moves, which are as long for a weight that does not matter as for one that does.

Whatever writes into the residual stream starts at STREAM_SCALE of T5's deviation; the stream is normalised wherever it
is read, so every layer computes the same. The decoder's last norm makes up for it, up to logits that still leave the
loss near that of a uniform guess. Weights of that size move by a useful share under AdamW at 1e-3; T5's embeddings, of
deviation 1, hardly do.

The first vectors of the vocabulary are what its pieces stand beside, factored, instead of noise. A model from scratch
learns from the masked tokens alone, a few hundred an update; which pieces resemble one another can be counted beforehand
from millions of tokens. The matrix of positive pointwise mutual information is factored by a randomised
eigendecomposition (Halko, Martinsson & Tropp 2011); the product of two vectors then says how much more often their pieces
stand together than chance has it (Levy & Goldberg 2014).
"""

import hashlib
import warnings
from typing import Any

import numpy as np
import torch

from resilient_t5.model.embeddings import HEAD, SHARED, T5Model, is_tied, scales_decoder_output

LAST_NORM = "decoder.final_layer_norm.weight"
POSITION_BIAS = "relative_attention_bias.weight"
CROSS_ATTENTION = "EncDecAttention"
STREAM_SCALE = 0.04
# All layers of a stack together write less than the embedding, so that a token can still be told behind them.
BRANCH_SCALE = 0.5
MAX_LOGIT_DEVIATION = 0.6
# What attention writes down adds up over the layers: in as many as these it may be as large as the token itself.
WRITTEN_LAYERS = 2
# A tied model sees its own input token with a logit of nearly sqrt(d) deviations.
MAX_LOGIT = 7.0
# Scores of two equal tokens in cross-attention, and of a neighbour above all else: e**8 and e**5 against a hundred others.
SAME_TOKEN_SCORE = 8.0
NEIGHBOUR_SCORE = 5.0
# Keys of self-attention, as a share of T5's: the smaller, the later scores by content disturb what positions tell.
SELF_KEY_SCALE = 0.1


def first_value(name: str, config: Any, *, scaled: bool) -> tuple[float, float]:
    """Mean and standard deviation that a parameter of this name is drawn with; a norm has deviation 0.

    `scaled`: the decoder's output is multiplied by d_model**-0.5 before the head.
    """
    d, inner = config.d_model, config.num_heads * config.d_kv
    branch = BRANCH_SCALE * STREAM_SCALE * config.num_layers**-0.5
    if name == LAST_NORM:
        deviation = min(MAX_LOGIT_DEVIATION, MAX_LOGIT * d**-0.5)
        return deviation / STREAM_SCALE * (1.0 if scaled else d**-0.5), 0.0
    if name.endswith("layer_norm.weight"):
        return 1.0, 0.0
    if name in (SHARED, HEAD):
        return 0.0, STREAM_SCALE
    if name.endswith((f"{CROSS_ATTENTION}.q.weight", f"{CROSS_ATTENTION}.k.weight")):
        return 0.0, (SAME_TOKEN_SCORE / (d * config.d_kv)) ** 0.5
    if name.endswith(".q.weight"):
        return 0.0, 0.0
    if name.endswith(".k.weight"):
        return 0.0, SELF_KEY_SCALE * d**-0.5
    if name.endswith(".o.weight"):  # the decoder's self-attention; all others are transposed values
        return 0.0, branch * inner**-0.5
    if name.endswith(".wo.weight"):
        return 0.0, branch * config.d_ff**-0.5
    return 0.0, d**-0.5


def neighbour_of(head: int, heads: int, *, in_decoder: bool) -> int | None:
    """Distance in tokens, negative to the left, of the neighbour that a head of self-attention begins at.

    None for a head that averages: a third of the encoder's heads or more, half of the decoder's.
    """
    if in_decoder:
        return -1 - head if head < heads // 2 else None
    return (-1 - head // 2 if head % 2 == 0 else 1 + head // 2) if head < 2 * (heads // 3) else None


def position_bias(buckets: int, heads: int, *, in_decoder: bool) -> torch.Tensor:
    """The relative position bias (buckets, heads): NEIGHBOUR_SCORE for the neighbour of each head, else 0.

    T5 has one bucket a distance for near tokens: bucket n for n tokens to the left, and in the encoder, which looks
    both ways, buckets // 2 + n for n tokens to the right.
    """
    bias = torch.zeros(buckets, heads)
    for head in range(heads):
        distance = neighbour_of(head, heads, in_decoder=in_decoder)
        exact = buckets // (2 if in_decoder else 4)
        if distance is not None and abs(distance) < exact:
            bias[-distance if distance < 0 else buckets // 2 + distance, head] = NEIGHBOUR_SCORE
    return bias


@torch.no_grad()
def fill_with_first_weights(model: T5Model, seed: int) -> None:
    """Draw every parameter from a stream of its own, keyed by seed and name; no global stream is touched."""
    config = model.config
    for name, parameter in model.named_parameters():
        if name.endswith(POSITION_BIAS):
            in_decoder = name.startswith("decoder.")
            parameter.copy_(position_bias(*parameter.shape, in_decoder=in_decoder))
            continue
        if writes_what_it_read(name):
            values = model.get_parameter(name.replace(".o.weight", ".v.weight"))
            _draw_orthogonal(values, f"{seed} {name}")
            parameter.copy_(min(1.0, WRITTEN_LAYERS / config.num_layers) * STREAM_SCALE * values.T)
            continue
        mean, deviation = first_value(name, config, scaled=scales_decoder_output(model))
        # The keys of cross-attention are its queries.
        _draw(parameter, mean, deviation, f"{seed} {name.replace(f'{CROSS_ATTENTION}.k', f'{CROSS_ATTENTION}.q')}")


def writes_what_it_read(name: str) -> bool:
    """Whether `name` is the output matrix of an attention that looks at the source: what it sees there is what is told."""
    return name.endswith(".o.weight") and (name.startswith("encoder.") or CROSS_ATTENTION in name)


def _draw_orthogonal(parameter: torch.Tensor, key: str) -> None:
    torch.nn.init.orthogonal_(parameter, generator=_generator(key))


def _draw(parameter: torch.Tensor, mean: float, deviation: float, key: str) -> None:
    if deviation == 0.0:
        parameter.fill_(mean)
        return
    parameter.normal_(mean, deviation, generator=_generator(key))


def _generator(key: str) -> torch.Generator:
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


MAX_IDS = 16_384
"""Ids that get a vector at most, the most frequent first."""
RANK = 256
"""Components that are kept at most; a wider model holds them in its first directions, turned at random."""
OVERSAMPLED = 1.5
ROUNDS = 4
# A factored row shorter than this share of the longest is rounding noise about an id without telling neighbours.
NOISE_SHARE = 1e-3


@torch.no_grad()
def set_initial_vectors(model: T5Model, ids: np.ndarray, vectors_nR: torch.Tensor, seed: int) -> None:
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
