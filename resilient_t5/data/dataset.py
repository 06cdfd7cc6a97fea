"""A store as one run sees it: the splits in active ids, or in full ids when every row of the vocabulary is trained."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from resilient_t5.config.schema import Config
from resilient_t5.data.corruption.token_table import TokenTable, build_token_table, check_sentinels
from resilient_t5.data.store.store import Split, Store


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


@dataclass(frozen=True)
class Dataset:
    """A store as this run sees it: in active ids, or in full ids when the whole vocabulary is trained."""

    store: Store
    train: Split
    validation: Split
    active_to_full: np.ndarray
    table: TokenTable

    @classmethod
    def over(cls, store: Store, config: Config) -> "Dataset":
        """The corpus of `store` in the ids of `model.active_vocabulary`.

        Raises:
            ConfigError: the tokenizer has fewer sentinels than the settings ask for.
        """
        check_sentinels(store.tokenizer, config.corruption)
        confusions = None if config.corruption.confusions is None else Path(config.corruption.confusions)
        if config.model.active_vocabulary == "corpus":
            table = build_token_table(store.tokenizer, store.active_to_full, confusions, encodes_gaps=store.encodes_gaps)
            return cls(store, store.train, store.validation, store.active_to_full, table)
        identity, encodes = np.arange(store.tokenizer.size, dtype=np.int32), store.encodes_gaps
        train, validation = (in_full_ids(split, store.active_to_full) for split in (store.train, store.validation))
        return cls(
            store,
            train,
            validation,
            identity,
            build_token_table(store.tokenizer, identity, confusions, encodes_gaps=encodes),
        )

    def decode(self, ids: np.ndarray) -> str:
        """Text of ids of this corpus; marks are left out, and so is an id that no piece has (rows beyond the tokenizer)."""
        known = np.asarray(ids)[np.asarray(ids) < len(self.active_to_full)]
        return self.store.tokenizer.decode(self.active_to_full[known].tolist())
