"""A text as bytes, in which places can be replaced while every other byte stays as it is.

Bytes outside the replaced places are copied from the input and never encoded again. Before the result is returned, it is
decoded and compared with the expected text.
"""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from resilient_t5.data.corpus.encodings import MARKS, HeldText, read_text, resolve_encoding
from resilient_t5.errors import DataError

WITHOUT_MARK = {"utf-8-sig": "utf-8", "utf-16": "utf-16-le", "utf-32": "utf-32-le"}
"""Codecs that write a byte order mark each time they encode, and their counterparts that do not."""
STATEFUL = ("utf-7", "iso2022", "hz")
"""Encodings with shift sequences, in which the bytes of a character depend on its neighbours."""


@dataclass(frozen=True)
class TextBytes:
    """Bytes, their codec, and the decoded text, byte order mark and line breaks included."""

    raw: bytes
    encoding: str
    text: str
    name: str

    @classmethod
    def read(cls, raw: bytes, name: str, encoding: str = "auto") -> "TextBytes":
        """Decode the content of a file.

        Args:
            raw: the content.
            name: name for messages.
            encoding: a codec, or `auto` for detection as for a corpus.

        Raises:
            ConfigError: unknown codec.
            DataError: the bytes are not in that encoding (names the first bad byte), or the encoding has shift sequences.
        """
        held = HeldText(raw, name)
        codec = codecs.lookup(resolve_encoding(held, encoding)).name
        if codec.startswith(STATEFUL):
            raise DataError(
                f"text in {codec} cannot be changed in one place without changing others",
                where=name,
                hint=f"Convert it to UTF-8 first, such as with iconv -f {encoding.upper()} -t UTF-8",
            )
        if codec in WITHOUT_MARK:
            marked = [other for mark, other in MARKS if raw.startswith(mark) and other.startswith(codec[:6])]
            codec = next(iter(marked), WITHOUT_MARK[codec])
        try:
            return cls(raw, codec, raw.decode(codec), name)
        except UnicodeDecodeError:
            for _ in read_text(held, codec):  # raises DataError with the bad byte and its line
                pass
            raise

    def replaced(self, places: Sequence[tuple[int, int, str]]) -> bytes:
        """Return the bytes with characters [start, end) of each place, in order and disjoint, replaced by its text.

        Raises:
            DataError: a replacement cannot be encoded, or the bytes of a place cannot be located.
        """
        parts: list[bytes] = []
        expected: list[str] = []
        byte = character = 0
        for start, end, replacement in places:
            first = byte + len(self._encoded(self.text[character:start]))
            parts += [self.raw[byte:first], self._encoded(replacement)]
            expected += [self.text[character:start], replacement]
            byte, character = first + len(self._encoded(self.text[start:end])), end
        # Correct offsets are proven by the decoded result: an encoding may have two spellings of different length.
        result = b"".join([*parts, self.raw[byte:]])
        try:
            is_correct = result.decode(self.encoding) == "".join([*expected, self.text[character:]])
        except UnicodeDecodeError:
            is_correct = False
        if not is_correct:
            raise DataError(
                f"this text in {self.encoding} cannot be changed in one place without changing others",
                where=self.name,
                hint="Convert it to UTF-8 first",
            )
        return result

    def _encoded(self, text: str) -> bytes:
        try:
            return text.encode(self.encoding)
        except UnicodeEncodeError as error:
            raise DataError(
                f"{text[error.start : error.end]!r} cannot be encoded in {self.encoding}",
                where=self.name,
                hint="Convert the text to UTF-8 first",
            ) from error
