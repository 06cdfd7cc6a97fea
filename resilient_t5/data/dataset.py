"""A store as a run uses it: the splits in active ids, or in full ids when all rows of the vocabulary are trained."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from resilient_t5.config.schema import Config
from resilient_t5.data.corruption.token_table import TokenTable, build_token_table, check_sentinels
from resilient_t5.data.ragged import Split
from resilient_t5.data.store.store import Store


class FullIdTokens:
    """Token array of a split that maps ids to full ids on access; the file on disk is unchanged."""

    def __init__(self, tokens: np.ndarray, active_to_full: np.ndarray):
        self._tokens, self._active_to_full = tokens, active_to_full

    def __getitem__(self, index: Any) -> np.ndarray:
        return self._active_to_full[self._tokens[index]]


def in_full_ids(split: Split, active_to_full: np.ndarray) -> Split:
    """The split of a store with its tokens as full ids."""
    return replace(split, tokens=FullIdTokens(split.tokens, active_to_full))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Dataset:
    """A store in active ids, or in full ids when the whole vocabulary is trained."""

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
        ids, train, validation = store.active_to_full, store.train, store.validation
        if config.model.active_vocabulary != "corpus":
            ids = np.arange(store.tokenizer.size, dtype=np.int32)
            train, validation = (in_full_ids(split, store.active_to_full) for split in (train, validation))
        table = build_token_table(store.tokenizer, ids, confusions, encodes_gaps=store.encodes_gaps)
        return cls(store, train, validation, ids, table)

    def decode(self, ids: np.ndarray) -> str:
        """Text of ids of this corpus, without special ids and ids without a piece (rows beyond the tokenizer)."""
        known = np.asarray(ids)[np.asarray(ids) < len(self.active_to_full)]
        return self.store.tokenizer.decode(self.active_to_full[known].tolist())
