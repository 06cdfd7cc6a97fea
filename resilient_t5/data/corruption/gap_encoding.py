"""Encoder input for a masked text: the ids that the tokenizer gives for the text with gaps.

Corruption masks tokens, a tokenizer reads text. The two differ at gaps:

* White space directly before a gap is not read, so a token of white space only is dropped there.
* T5's tokenizers begin a new word after a gap ("hyper<extra_id_0>sion" continues with U+2581 "sion"). A gap inside a word
  therefore changes the tokens of the rest of the word, which is encoded again as the beginning of a text. mT5's tokenizers and
  those trained here do not begin a new word.

So training sees the ids that AutoTokenizer gives for the same text, and inference matches training.
"""

from dataclasses import dataclass

import numpy as np

from resilient_t5.data.ragged import offsets_of
from resilient_t5.data.tokenizer.sentencepiece import SPACE
from resilient_t5.data.tokenizer.tokenizer import TextTokenizer


@dataclass(frozen=True, eq=False)
class GapEncoding:
    """The rules of one tokenizer, in active ids."""

    sentinel: np.ndarray
    """bool (size,)"""
    ignored: np.ndarray
    """bool (size,): white space that is dropped before a sentinel."""
    inside_word: np.ndarray
    """bool (size,): pieces without a word-start mark, except unknown characters and bytes."""
    starts_word: np.ndarray
    """bool (size,): tokens that get a word-start mark after a gap; none for tokenizers that do not begin a new word."""
    active_to_full: np.ndarray
    full_to_active: np.ndarray
    """int32: -1 for ids that are not active."""
    tokenizer: TextTokenizer

    def encode(self, source: np.ndarray, offsets: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids that the encoder reads for masked sources.

        Args:
            source: int32, ragged: row r has [offsets[r], offsets[r + 1]), each with its end mark.
            offsets: int64 (rows + 1,)
            longest: maximum tokens of a row. The last gaps of a row that would become longer are encoded without a word start.

        Returns:
            ids and offsets of the same rows.
        """
        source, offsets = self._without_ignored(source, offsets)
        if self.starts_word.any():
            source, offsets = self._with_word_starts(source, offsets, longest)
        return source, offsets

    def _without_ignored(self, source: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ignored = np.flatnonzero(self.ignored[source])[::-1]
        dropped = np.zeros(len(source), bool)
        for place in ignored.tolist():  # backwards, to drop whole runs of spaces; every row has an end mark
            dropped[place] = self.sentinel[source[place + 1]] or dropped[place + 1]
        if not dropped.any():
            return source, offsets
        before = offsets_of(dropped)
        return source[~dropped], offsets - before[offsets]

    def _with_word_starts(self, source: np.ndarray, offsets: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray]:
        after_gap = np.flatnonzero(self.sentinel[source]) + 1
        after_gap = after_gap[self.starts_word[source[after_gap]]]
        inside = self.inside_word[source]
        row_of = np.searchsorted(offsets, after_gap, "right") - 1
        free = longest - np.diff(offsets)
        parts, done = [], 0
        grown = np.zeros(len(offsets) - 1, np.int64)
        for start, row in zip(after_gap.tolist(), row_of.tolist(), strict=True):
            end = start
            while inside[end]:
                end += 1
            full = self.tokenizer.text_start(tuple(self.active_to_full[source[start:end]].tolist()))
            word = self.full_to_active[list(full)].astype(np.int32)
            more = len(word) - (end - start)
            if grown[row] + more > free[row]:
                continue
            grown[row] += more
            parts += [source[done:start], word]
            done = end
        encoded = np.concatenate([*parts, source[done:]])
        return encoded, offsets_of(np.diff(offsets) + grown)


def build_gap_encoding(tokenizer: TextTokenizer, active_to_full: np.ndarray, sentinel_ids: np.ndarray) -> GapEncoding | None:
    """Rules for the active ids, those of the sentinels given; None where the masked source needs no change."""
    size = len(active_to_full)
    ignored = np.isin(active_to_full, tokenizer.ignored_before_gap)
    starts_word = tokenizer.continues_word[active_to_full] & tokenizer.gap_starts_word
    if not ignored.any() and not starts_word.any():
        return None
    sentinel = np.zeros(size, bool)
    sentinel[sentinel_ids] = True
    full_to_active = np.full(tokenizer.size, -1, np.int32)
    full_to_active[active_to_full] = np.arange(size, dtype=np.int32)
    return GapEncoding(
        sentinel=sentinel,
        ignored=ignored,
        inside_word=tokenizer.inside_word[active_to_full],
        starts_word=starts_word,
        active_to_full=active_to_full,
        full_to_active=full_to_active,
        tokenizer=tokenizer,
    )


def reachable_after_gaps(tokenizer: TextTokenizer, active: np.ndarray) -> np.ndarray:
    """bool (vocabulary,): `active` and every piece that can result from a gap inside a word.

    The rest of a word after a gap is divided into other pieces; these consist of the same characters.
    """
    if not tokenizer.gap_starts_word:
        return active
    pieces = tokenizer.pieces()
    characters = set().union(*(pieces[number] for number in np.flatnonzero(active).tolist())) | {SPACE}
    spelled = np.fromiter((characters.issuperset(piece) for piece in pieces), bool, len(pieces))
    return active | spelled
