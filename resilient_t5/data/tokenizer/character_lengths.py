"""How many characters a tokenizer's normaliser makes of each character, so that positions can be counted."""

import base64
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import normalizers

NEVER_COUNTED = 255  # character whose normalised length depends on its neighbours
NOT_LOOKED_UP = 254


class CharacterLengths:
    """Normalised length of each character, looked up once per character.

    Args:
        normalizer: the `normalizer` of a `tokenizer.json`. Of the kinds that T5 tokenizers do not use nothing is counted.
    """

    def __init__(self, normalizer: dict[str, Any] | None):
        parts = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
        kinds = {part["type"] for part in parts}
        maps = [part["precompiled_charsmap"] for part in parts if part["type"] == "Precompiled"]
        self._supported = kinds <= {"Precompiled", "Strip", "Replace", "Prepend"} and len(maps) <= 1
        self._map = normalizers.Precompiled(base64.b64decode(maps[0])) if maps and self._supported else None
        self._table = np.full(0x110000, NOT_LOOKED_UP, dtype=np.uint8) if self._map else np.zeros(0, dtype=np.uint8)

    def origins(self, texts: Sequence[str], bounds: np.ndarray) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
        """Where normalised characters come from.

        Returns:
            origin: position in the joined texts of each normalised character; None when it is its own.
            wanted: normalised characters of each text.
            counted: bool, texts in which every character has a length of its own.
        """
        sizes = np.diff(bounds)
        if not self._supported or self._map is None:
            return None, sizes, np.full(len(texts), self._supported)
        codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        lengths = self._table[codes]
        for code in np.unique(codes[lengths == NOT_LOOKED_UP]).tolist():
            self._table[code] = self._look_up(chr(code))
        lengths = self._table[codes]
        uncounted = np.concatenate([[0], np.cumsum(lengths == NEVER_COUNTED)])[bounds]
        lengths = np.where(lengths == NEVER_COUNTED, 1, lengths).astype(np.int64)
        ends = np.concatenate([[0], np.cumsum(lengths)])[bounds]
        origin = None if int(ends[-1]) == len(codes) and lengths.all() else np.repeat(np.arange(len(codes)), lengths)
        return origin, np.diff(ends), np.diff(uncounted) == 0

    def _look_up(self, character: str) -> int:
        hangul_part = (
            "\u1100" <= character <= "\u11ff" or "\ua960" <= character <= "\ua97f" or "\ud7b0" <= character <= "\ud7ff"
        )
        joins = unicodedata.category(character)[0] in "MC" or unicodedata.category(character) == "Sk" or hangul_part
        flags = "\U0001f1e6" <= character <= "\U0001f1ff"
        if self._map is None or (joins and character not in "\n\t") or flags:
            return NEVER_COUNTED
        return min(len(self._map.normalize_str(f"a{character}a")) - 2, NEVER_COUNTED)
