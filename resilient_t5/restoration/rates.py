"""Rates of success with intervals that know that occurrences of one document are not independent.

A rate is successes over trials; its 95 % interval comes from resampling whole documents with replacement (the cluster
bootstrap; Efron and Tibshirani 1993, "An Introduction to the Bootstrap", percentile interval). The resamples are drawn
from a generator with a fixed key, so equal outcomes always give equal intervals.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
BOOTSTRAP_KEY = 0x7E570
# Most numbers of one block of resamples: 8 MiB of int64.
BLOCK_NUMBERS = 2**20


@dataclass(frozen=True)
class Rate:
    """A share of successes; `rate`, `low` and `high` are nan when there was nothing to count."""

    rate: float
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end of the 95 % interval."""
    n: int
    """Trials; for a mean over terms, the terms."""

    def text(self) -> str:
        """Such as `0.520 [0.480, 0.560] n=612`."""
        return f"{self.rate:.3f} [{self.low:.3f}, {self.high:.3f}] n={self.n}" if self.n else "- n=0"


NOTHING = Rate(math.nan, math.nan, math.nan, 0)


def rate_over_documents(success: np.ndarray, documents: np.ndarray) -> Rate:
    """Share of successes, with its interval over documents.

    Args:
        success: bool (n,), one per trial.
        documents: int (n,), the document of each trial.

    Returns:
        The rate. The interval is [0, 1] when all trials come from one document, which tells nothing about others.
    """
    if len(success) == 0:
        return NOTHING
    _, document = np.unique(documents, return_inverse=True)
    trials_D = np.bincount(document)
    successes_D = np.bincount(document, weights=success)
    low, high = bootstrap_interval(successes_D, trials_D)
    return Rate(float(np.mean(success)), low, high, len(success))


def bootstrap_interval(successes_D: np.ndarray, trials_D: np.ndarray) -> tuple[float, float]:
    """95 % interval of sum(successes) / sum(trials) when the D documents are drawn anew with replacement."""
    if len(trials_D) < 2:
        return 0.0, 1.0
    rates = [
        (weights_RD @ successes_D) / (weights_RD @ trials_D) for weights_RD in document_weights(len(trials_D), len(trials_D))
    ]
    return _percentiles(np.concatenate(rates))


def macro_rate(success: np.ndarray, documents: np.ndarray, groups: np.ndarray) -> Rate:
    """Mean over groups (terms) of each group's share of successes, with its interval over documents.

    A resample in which a group does not occur leaves that group out of its mean.

    Args:
        success: bool (n,).
        documents: int (n,).
        groups: int (n,), the term of each trial.
    """
    if len(success) == 0:
        return NOTHING
    _, group = np.unique(groups, return_inverse=True)
    mean = float(np.mean(np.bincount(group, weights=success) / np.bincount(group)))
    count_D, document = np.unique(documents, return_inverse=True)
    if len(count_D) < 2:
        return Rate(mean, 0.0, 1.0, int(group.max()) + 1)
    by_group = np.argsort(group, kind="stable")
    firsts = np.searchsorted(group[by_group], np.arange(group.max() + 1))
    resampled = []
    for weights_RD in document_weights(len(count_D), len(success)):
        weights_RN = weights_RD[:, document[by_group]]
        trials_RG = np.add.reduceat(weights_RN, firsts, axis=1)
        successes_RG = np.add.reduceat(weights_RN * success[by_group], firsts, axis=1)
        present_RG = trials_RG > 0
        rates_RG = successes_RG / np.where(present_RG, trials_RG, 1)
        resampled.append(rates_RG.sum(1) / present_RG.sum(1))
    return Rate(mean, *_percentiles(np.concatenate(resampled)), len(firsts))


def document_weights(documents: int, columns: int) -> Iterator[np.ndarray]:
    """How often each resample draws each document, in blocks int64 (R, documents); 1000 resamples in all.

    Args:
        documents: documents to draw from; each resample draws as many.
        columns: numbers that the caller needs for each resample; bounds the size of a block.
    """
    draws = np.random.Generator(np.random.Philox(key=BOOTSTRAP_KEY))
    per_block = max(1, BLOCK_NUMBERS // max(documents, columns))
    for first in range(0, RESAMPLES, per_block):
        count = min(per_block, RESAMPLES - first)
        drawn = draws.integers(0, documents, (count, documents)) + np.arange(count)[:, None] * documents
        yield np.bincount(drawn.ravel(), minlength=count * documents).reshape(count, documents)


def _percentiles(resampled: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(low), float(high)
