"""A text as bytes: decoded with proof, and given back with some places replaced and every other byte as it was.

What stands outside the replaced places is never encoded again: it is copied from the bytes that were read. That the
result reads as the text with its replacements is checked before it is given out.
"""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from resilient_t5.data.corpus.encodings import MARKS, HeldText, read_text, resolve_encoding
from resilient_t5.errors import DataError

# Codecs that write a mark of their own in front of whatever they encode, and the ones that do not.
WITHOUT_MARK = {"utf-8-sig": "utf-8", "utf-16": "utf-16-le", "utf-32": "utf-32-le"}


@dataclass(frozen=True)
class TextBytes:
    """Bytes, the codec that they are in, and the text they spell, its byte order mark and line breaks included."""

    raw: bytes
    encoding: str
    text: str
    name: str

    @classmethod
    def read(cls, raw: bytes, name: str, encoding: str = "auto") -> "TextBytes":
        """Decode `raw`.

        Args:
            raw: the whole file.
            name: what messages call it.
            encoding: a codec, or `auto`, which decides by evidence as for a corpus.

        Raises:
            ConfigError: no such codec.
            DataError: the bytes are not in that encoding, or in none; names the first bad byte.
        """
        held = HeldText(raw, name)
        found = codecs.lookup(resolve_encoding(held, encoding)).name
        if found in WITHOUT_MARK:
            marked = [codec for mark, codec in MARKS if raw.startswith(mark) and codec.startswith(found[:6])]
            found = next(iter(marked), WITHOUT_MARK[found])
        try:
            return cls(raw, found, raw.decode(found), name)
        except UnicodeDecodeError:
            for _ in read_text(held, found):  # says which byte, and in which line
                pass
            raise

    def replaced(self, places: Sequence[tuple[int, int, str]]) -> bytes:
        """The bytes with characters [start, end) of each place, in order and apart, replaced by its text.

        Raises:
            DataError: a replacement does not fit the encoding, or the encoding does not let a part be replaced.
        """
        if not places:
            return self.raw
        borders = self._byte_offsets([border for start, end, _ in places for border in (start, end)])
        parts, done, wanted, read = [], 0, [], 0
        for (start, end, text), first, last in zip(places, borders[::2], borders[1::2], strict=True):
            parts += [self.raw[done:first], self._encoded(text)]
            wanted += [self.text[read:start], text]
            done, read = last, end
        result = b"".join([*parts, self.raw[done:]])
        try:
            same = result.decode(self.encoding) == "".join([*wanted, self.text[read:]])
        except UnicodeDecodeError:
            same = False
        if not same:
            raise DataError(
                f"text in {self.encoding} cannot be changed in one place without changing others",
                where=self.name,
                hint="Convert it to utf-8 first",
            )
        return result

    def _encoded(self, text: str) -> bytes:
        try:
            return text.encode(self.encoding)
        except UnicodeEncodeError as error:
            raise DataError(
                f"{text!r} cannot be written in {self.encoding}", where=self.name, hint="Convert the text to utf-8 first"
            ) from error

    def _byte_offsets(self, characters: Sequence[int]) -> list[int]:
        """Where these characters (ascending) begin in the bytes."""
        offsets, done, length = [], 0, 0
        for character in characters:
            length += len(self.text[done:character].encode(self.encoding))
            offsets.append(length)
            done = character
        if length + len(self.text[done:].encode(self.encoding)) == len(self.raw) and self._at(offsets, characters):
            return offsets
        return self._offsets_byte_by_byte(characters)

    def _at(self, offsets: Sequence[int], characters: Sequence[int]) -> bool:
        """Whether encoding piece by piece gives the very bytes that were read."""
        done = read = 0
        for offset, character in zip([*offsets, len(self.raw)], [*characters, len(self.text)], strict=True):
            if self.text[read:character].encode(self.encoding) != self.raw[done:offset]:
                return False
            done, read = offset, character
        return True

    def _offsets_byte_by_byte(self, characters: Sequence[int]) -> list[int]:
        """As `_byte_offsets`, for encodings with several spellings or with shifts; a character begins where the last ended."""
        decoder = codecs.getincrementaldecoder(self.encoding)("strict")
        offsets, read, wanted = [], 0, iter(characters)
        character = next(wanted, None)
        for offset in range(len(self.raw) + 1):
            while character is not None and character <= read:
                offsets.append(offset)
                character = next(wanted, None)
            if offset < len(self.raw):
                read += len(decoder.decode(self.raw[offset : offset + 1]))
        return offsets
