"""What corruption must know of the vocabulary, in active ids: marks, classes of tokens, look-alikes."""

import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from resilient_t5.config.schema import CorruptionConfig
from resilient_t5.data.confusions import built_in_confusions, read_confusions
from resilient_t5.data.gap_encoding import GapEncoding, build_gap_encoding
from resilient_t5.data.tokenizer import TextTokenizer
from resilient_t5.errors import ConfigError, DataError

METASPACE = "\u2581"


@dataclass(frozen=True)
class TokenTable:
    """The vocabulary as corruption sees it; every id is an active id."""

    size: int
    """Active ids: 0 to `size` - 1."""
    pad_id: int
    eos_id: int
    sentinel_ids: np.ndarray
    """int32 (sentinels,): element k is the id of sentinel k; T5 has 100."""
    punctuation: np.ndarray
    """bool (size,): punctuation, symbols, space, and single bytes of a character; never masked but inside a term."""
    special: np.ndarray
    """bool (size,): marks without text; never masked, never noised."""
    byte: np.ndarray
    """bool (size,): single bytes of a character; noise would break the character, so they are never noised."""
    confusions: np.ndarray
    """int32 (m,): look-alikes of all ids, one id's after another's."""
    confusion_offsets: np.ndarray
    """int64 (size + 1,): id i has the look-alikes [confusion_offsets[i], confusion_offsets[i + 1])."""
    gap_encoding: GapEncoding | None = None
    """How the tokenizer reads a text with gaps; None: the masked tokens as they are."""


def build_token_table(tokenizer: TextTokenizer, active_to_full: np.ndarray, confusions_path: Path | None) -> TokenTable:
    """Classify the active pieces and map the look-alikes that are pieces themselves.

    A look-alike counts only where both it and what it replaces are whole active pieces, with or without the mark of a
    space before them; so one token replaces one token.

    Args:
        active_to_full: int32 (active,), ascending full-vocabulary ids.
        confusions_path: the user's own table, added to the built-in one.

    Raises:
        DataError: the end mark, the padding or a sentinel is not active, or the user's table cannot be read.
    """
    size = len(active_to_full)
    all_pieces = tokenizer.pieces()
    if size == 0 or active_to_full[-1] >= len(all_pieces):
        raise DataError("the active vocabulary does not belong to this tokenizer", mend="Prepare the store again.")
    pieces = [all_pieces[full_id] for full_id in active_to_full.tolist()]
    special = np.isin(active_to_full, tokenizer.special_ids)
    byte = np.isin(active_to_full, tokenizer.byte_ids)
    punctuation = np.fromiter((_is_punctuation(piece) for piece in pieces), bool, size)
    confusions, confusion_offsets = _map_confusions(pieces, special | byte, confusions_path)
    sentinel_ids = _active(active_to_full, tokenizer.sentinel_ids, "a sentinel")
    return TokenTable(
        size=size,
        pad_id=int(_active(active_to_full, np.array([tokenizer.pad_id]), "the padding")[0]),
        eos_id=int(_active(active_to_full, np.array([tokenizer.eos_id]), "the end mark")[0]),
        sentinel_ids=sentinel_ids,
        punctuation=(punctuation | byte) & ~special,
        special=special,
        byte=byte,
        confusions=confusions,
        confusion_offsets=confusion_offsets,
        gap_encoding=build_gap_encoding(tokenizer, active_to_full, sentinel_ids),
    )


def check_sentinels(tokenizer: TextTokenizer, settings: CorruptionConfig) -> None:
    """Raise ConfigError when the settings ask for more sentinels than the tokenizer has."""
    has = len(tokenizer.sentinel_ids)
    if settings.task == "restore" and settings.max_sentinels > has:
        raise ConfigError(f"corruption.max_sentinels: {settings.max_sentinels}, but the tokenizer has {has}; set it to {has}")


def _is_punctuation(piece: str) -> bool:
    """Whether a piece is nothing but punctuation, symbols, space and control characters."""
    categories = (unicodedata.category(character) for character in piece.replace(METASPACE, ""))
    return all(category[0] in "PSZ" or category in ("Cc", "Cf") for category in categories)


def _active(active_to_full: np.ndarray, full_ids: np.ndarray, name: str) -> np.ndarray:
    """The active ids of full ids, int32; all of them must be active."""
    places = np.minimum(np.searchsorted(active_to_full, full_ids), len(active_to_full) - 1)
    if np.any(active_to_full[places] != full_ids):
        raise DataError(f"{name} is not in the active vocabulary", mend="Prepare the store again.")
    return places.astype(np.int32)


def _map_confusions(pieces: list[str], untouched: np.ndarray, path: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Look-alikes by id as a ragged array: ids int32 (m,), offsets int64 (size + 1,)."""
    table = built_in_confusions()
    for character, look_alikes in (read_confusions(path) if path is not None else {}).items():
        table.setdefault(character, set()).update(look_alikes)
    ids = {piece: number for number, piece in enumerate(pieces) if not untouched[number]}
    confusions: list[int] = []
    counts = np.zeros(len(pieces) + 1, np.int64)
    for piece, number in ids.items():
        text = piece.removeprefix(METASPACE)
        space = piece[: len(piece) - len(text)]
        # Sorted: the order of a set of strings differs from process to process.
        found = sorted(ids[space + other] for other in table.get(text, ()) if space + other in ids)
        confusions.extend(found)
        counts[number + 1] = len(found)
    return np.array(confusions, np.int32), np.cumsum(counts)
