"""Initialisation of a model from scratch: attention that starts near a trained pattern, and embeddings from the corpus.

With T5's own initialisation a small model spends its whole budget on learning to find the sentinel in the source and its
neighbours. So the attention weights are initialised like those of a trained model (mimetic initialisation, Trockman & Kolter
2023, arXiv 2305.09828). No parameter is added, all are trained, and an export is a plain T5:

* Cross-attention: queries and keys are the same matrix, so a decoder that reads a sentinel attends to that sentinel in the
  source.
* Self-attention of the encoder and cross-attention: the output matrix is the transpose of the values, whose rows are
  orthogonal, so attention copies the vectors that it attends to. A gap receives its neighbours' vectors, one subspace per
  head.
* Self-attention: the relative position bias of some heads selects one neighbour, the other heads average over everything.
  Queries start at zero and keys small, so that random scores do not disturb this, not even after the first updates of Adam,
  which are equally large for relevant and irrelevant weights.

Matrices that write into the residual stream start at STREAM_SCALE of T5's standard deviation. The stream is normalised
wherever it is read, so the function is the same. The decoder's last norm compensates, up to logits for which the loss is
still near that of a uniform guess. At this size AdamW with 1e-3 changes weights by a useful relative amount; T5's
embeddings, of deviation 1, hardly change.

The embeddings are initialised from co-occurrence counts. A model from scratch learns from the masked tokens alone, a few
hundred per update, but similarity of pieces can be counted in millions of tokens. The matrix of positive pointwise mutual
information is factored by a randomised eigendecomposition (Halko, Martinsson & Tropp 2011); the dot product of two vectors
then approximates the PMI of their pieces (Levy & Goldberg 2014).
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
# All layers of a stack together write less than the embedding, so that the token can still be recovered from the stream.
BRANCH_SCALE = 0.5
MAX_LOGIT_DEVIATION = 0.6
# The output of attention accumulates over the layers: after this many it may be as large as the token itself.
WRITTEN_LAYERS = 2
# In a tied model the logit of the input token is nearly sqrt(d) standard deviations.
MAX_LOGIT = 7.0
# Score of two equal tokens in cross-attention, and of the selected neighbour: e**8 and e**5 against a hundred others.
SAME_TOKEN_SCORE = 8.0
NEIGHBOUR_SCORE = 5.0
# Keys of self-attention relative to T5's: the smaller, the later content scores override position scores.
SELF_KEY_SCALE = 0.1


def first_value(name: str, config: Any, *, scaled: bool) -> tuple[float, float]:
    """Mean and standard deviation for the initialisation of a parameter; a norm has deviation 0.

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
    if name.endswith(".o.weight"):  # self-attention of the decoder; all others are transposed values
        return 0.0, branch * inner**-0.5
    if name.endswith(".wo.weight"):
        return 0.0, branch * config.d_ff**-0.5
    return 0.0, d**-0.5


def neighbour_of(head: int, heads: int, *, in_decoder: bool) -> int | None:
    """Offset in tokens (negative: left) of the neighbour that a head of self-attention attends to at first.

    None for a head that averages: at least a third of the encoder's heads, half of the decoder's.
    """
    if in_decoder:
        return -1 - head if head < heads // 2 else None
    return (-1 - head // 2 if head % 2 == 0 else 1 + head // 2) if head < 2 * (heads // 3) else None


def position_bias(buckets: int, heads: int, *, in_decoder: bool) -> torch.Tensor:
    """The relative position bias (buckets, heads): NEIGHBOUR_SCORE for the neighbour of each head, else 0.

    T5 has one bucket per distance for near tokens: bucket n for n tokens to the left, and in the bidirectional encoder
    buckets // 2 + n for n tokens to the right.
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
    """Initialise every parameter from its own generator, keyed by seed and name; no global generator is used."""
    config = model.config
    for name, parameter in model.named_parameters():
        if name.endswith(POSITION_BIAS):
            in_decoder = name.startswith("decoder.")
            parameter.copy_(position_bias(*parameter.shape, in_decoder=in_decoder))
            continue
        if is_transposed_values(name):
            values = model.get_parameter(name.replace(".o.weight", ".v.weight"))
            torch.nn.init.orthogonal_(values, generator=_generator(f"{seed} {name}"))
            parameter.copy_(min(1.0, WRITTEN_LAYERS / config.num_layers) * STREAM_SCALE * values.T)
            continue
        mean, deviation = first_value(name, config, scaled=scales_decoder_output(model))
        # The same key for both gives equal queries and keys of cross-attention.
        key = f"{seed} {name.replace(f'{CROSS_ATTENTION}.k', f'{CROSS_ATTENTION}.q')}"
        if deviation == 0.0:
            parameter.fill_(mean)
        else:
            parameter.normal_(mean, deviation, generator=_generator(key))


def is_transposed_values(name: str) -> bool:
    """Whether `name` is an output matrix that starts as its transposed values: of attention over the source."""
    return name.endswith(".o.weight") and (name.startswith("encoder.") or CROSS_ATTENTION in name)


def _generator(key: str) -> torch.Generator:
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


MAX_IDS = 16_384
"""Most ids that get a vector, the most frequent first."""
RANK = 256
"""Most components; for a wider model they are rotated at random into its width."""
OVERSAMPLED = 1.5
ROUNDS = 4
# A factored row shorter than this share of the longest is rounding noise: its id has no informative neighbours.
NOISE_SHARE = 1e-3


@torch.no_grad()
def set_initial_vectors(model: T5Model, ids: np.ndarray, vectors_nR: torch.Tensor, seed: int) -> None:
    """Set the rows `ids` of both vocabulary tables to these vectors, scaled to the norm of the random initialisation.

    Args:
        model: initialised by `fill_with_first_weights`; other rows are not changed.
        ids: int (n,), rows of the model.
        vectors_nR: float32, R at most the model's width; ids with a vector of nearly zero are not changed.
        seed: of the random rotation into the model's width.
    """
    table_VD = model.shared.weight
    width, rank = table_VD.shape[1], vectors_nR.shape[1]
    generator = torch.Generator().manual_seed(seed)
    rotation_RD = torch.nn.init.orthogonal_(torch.empty(rank, width), generator=generator)
    if not len(ids):
        return
    norm_n1 = vectors_nR.norm(dim=1, keepdim=True)
    used = (norm_n1[:, 0] > NOISE_SHARE * norm_n1.max()).nonzero()[:, 0]
    rotated_nD = (vectors_nR[used] / norm_n1[used] * STREAM_SCALE * width**0.5) @ rotation_RD
    rows = torch.from_numpy(np.asarray(ids, np.int64))[used].to(table_VD.device)
    for table in [table_VD] if is_tied(model) else [table_VD, model.lm_head.weight]:
        table[rows] = rotated_nD.to(table.device)


def factored(row_ends: np.ndarray, columns: np.ndarray, values: np.ndarray, rank: int, seed: int) -> torch.Tensor:
    """Vectors (n, rank) whose dot products approximate a symmetric CSR matrix without its first component.

    The first component only encodes frequency. Negative eigenvalues are dropped, since no real vectors have such products;
    with fewer positive ones than `rank` the last columns are zero.

    Args:
        row_ends: int (n + 1,)
        columns: int, the column of every value.
        values: float32
        rank: components.
        seed: of the random start of the iteration.
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
    vectors_nr = (basis_nk @ directions_kk[:, strongest]) * weights_k[strongest].clamp(min=0).sqrt()
    return torch.nn.functional.pad(vectors_nr, (0, rank - vectors_nr.shape[1]))
