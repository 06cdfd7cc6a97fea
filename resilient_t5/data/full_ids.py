"""A split read in full-vocabulary ids, for runs that train every row of the vocabulary."""

from dataclasses import replace
from typing import Any

import numpy as np

from resilient_t5.data.store import Split


class FullIdTokens:
    """Reads like the token array of a split and maps what is read to full ids; the map on disk stays as it is."""

    def __init__(self, tokens: np.ndarray, active_to_full: np.ndarray):
        self._tokens, self._active_to_full = tokens, active_to_full
        self.dtype = active_to_full.dtype

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: Any) -> np.ndarray:
        return self._active_to_full[self._tokens[index]]


def in_full_ids(split: Split, active_to_full: np.ndarray) -> Split:
    """The same split, its tokens read as full ids.

    Args:
        split: a split of a store, in active ids.
        active_to_full: int32 (active,), the store's.
    """
    return replace(split, tokens=FullIdTokens(split.tokens, active_to_full))  # type: ignore[arg-type]
