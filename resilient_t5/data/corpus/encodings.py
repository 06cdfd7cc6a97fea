"""Bytes on disk to text, in blocks: decompression, detection of the encoding, strict incremental decoding.

`auto` tries, in this order: a byte order mark; UTF-16, when the NUL bytes are where UTF-16 puts them; UTF-8, when it decodes;
GB18030, when the whole file decodes *and* the share of common characters in the result is high and above the share of bytes
that are valid UTF-8. So a UTF-8 file with one damaged byte, or a Big5 or Western file, is an error that names the byte, never
text silently read as GB18030. EUC-JP and EUC-KR are too similar to GB18030 to be distinguished from it.
Memory is a few blocks, whatever the size of the file; compressed files are only streamed.
"""

import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from resilient_t5.errors import ConfigError, DataError, StorageError

PACKED_SUFFIXES = (".gz", ".xz")
BLOCK_BYTES = 1 << 18  # measured: larger blocks do not fit into the cache and are slower
HEAD_BYTES = 1 << 20
PROOF_CHARACTERS = 256  # after this many valid multi-byte characters the file is UTF-8; a later error is damage
UTF16_PLAUSIBLE_SHARE = 0.95
COMMON_SHARE = 0.45  # measured: simplified text 0.8 to 1, traditional about 0.6; Big5 read as GB18030 0.1 to 0.2, Shift-JIS 0

MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark is its prefix
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (b"\x84\x31\x95\x33", "gb18030"),
)
# Code units of ordinary text: ASCII, Latin, Greek, Cyrillic, punctuation, CJK and kana, Hangul, full width forms.
UTF16_ORDINARY = (
    (0x09, 0x0A),
    (0x0D, 0x0D),
    (0x20, 0x7E),
    (0xA0, 0x24F),
    (0x370, 0x52F),
    (0x2010, 0x206F),
    (0x3000, 0x30FF),
    (0x3400, 0x9FFF),
    (0xAC00, 0xD7A3),
    (0xFF00, 0xFFEF),
)


@dataclass(frozen=True)
class HeldText:
    """Bytes in memory instead of a file; never decompressed. `name` is used in messages."""

    content: bytes
    name: str
    suffix: str = ""

    def __str__(self) -> str:
        return self.name


TextSource = Path | HeldText


class Undecodable(DataError):
    """The text is not in any of the encodings that were tried."""


@dataclass(eq=False)
class BadByte(Exception):
    """First byte that does not decode: its value, its offset in the (decompressed) file and its line, from 1."""

    encoding: str
    offset: int
    line: int
    value: int
    cut_off: bool

    def __str__(self) -> str:
        name = self.encoding.upper()
        if self.cut_off:
            return f"not {name}: ends inside the character at byte {self.offset}, line {self.line}"
        return f"not {name}: first bad byte 0x{self.value:02x} at byte {self.offset}, line {self.line}"


def unpacked_blocks(path: TextSource) -> Iterator[bytes]:
    """Bytes of the file in blocks, decompressed when its name ends in .gz or .xz.

    Raises:
        DataError: a compressed file that is damaged or truncated.
        StorageError: the file cannot be read.
    """
    try:
        with _opened(path) as stream:
            while block := stream.read(BLOCK_BYTES):
                yield block
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path} cannot be unpacked: {error}",
            hint="Copy it again, or decompress it with gzip or xz to see where it ends",
        ) from error
    except OSError as error:
        raise StorageError(
            f"{path} cannot be read: {error.strerror or error}", hint="Check the file and its permissions"
        ) from error


def _opened(path: TextSource) -> BinaryIO:
    if isinstance(path, HeldText):
        return io.BytesIO(path.content)
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if suffix == ".xz":
        return cast(BinaryIO, lzma.open(path, "rb"))
    return open(path, "rb")


def decoded_blocks(path: TextSource, encoding: str) -> Iterator[tuple[str, int]]:
    """Strictly decoded text in blocks, each with its number of bytes; line breaks become a line feed.

    A leading byte order mark is dropped. All other characters are kept, also control characters.

    Raises:
        BadByte: at the first byte that does not decode.
        DataError, StorageError: as `unpacked_blocks`.
    """
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    fed, line, first = 0, 1, True
    for block in _then_end(unpacked_blocks(path)):
        fed += len(block)
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            # error.object is the block, preceded by the bytes of a split character from the previous block.
            start = error.start
            before = error.object[:start].decode(encoding, errors="replace")
            raise BadByte(
                encoding,
                offset=fed - len(error.object) + start,
                line=line + before.count("\n"),
                value=error.object[start],
                cut_off=not block,
            ) from None
        if first and text:
            text, first = text.removeprefix("\ufeff"), False
        line += text.count("\n")
        yield newlines.decode(text, final=not block), len(block)


def _then_end(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The blocks, then an empty block, on which decoders report an incomplete character."""
    yield from blocks
    yield b""


def read_text(path: TextSource, encoding: str) -> Iterator[tuple[str, int]]:
    """Like `decoded_blocks`, but a byte that does not decode is a DataError."""
    try:
        yield from decoded_blocks(path, encoding)
    except BadByte as fault:
        raise _undecodable(path, fault) from None


def resolve_encoding(path: TextSource, encoding: str) -> str:
    """Encoding of `path`: `encoding` itself, or the detected one when it is `auto`.

    Raises:
        ConfigError: `encoding` is neither `auto` nor a text encoding that Python knows.
        DataError: no encoding fits (names the first bad byte), or the file is binary.
        StorageError: the file cannot be read.
    """
    if encoding == "auto":
        return _detected(path)
    try:
        b"ab".decode(encoding, errors="replace")  # not empty: that would pass with any codec
        codecs.getincrementaldecoder(encoding)
    except (LookupError, ValueError):
        raise ConfigError(f"data.encoding: {encoding!r} is neither auto nor a text encoding such as utf-8 or gb18030") from None
    return encoding


def _detected(path: TextSource) -> str:
    head = _head(path)
    for mark, name in MARKS:
        if head.startswith(mark):
            return name
    nuls = head.count(0)
    if nuls:
        wide = _utf16_by_nuls(head)
        if wide:
            return wide
        if nuls > 8 + len(head) // 64:
            raise DataError(
                f"{path} is a binary file, not text: {nuls} NUL bytes in its first {len(head)} bytes",
                hint="Export it as plain text, .csv or .jsonl, or leave it out of the inputs",
            )
    fault = _utf8_fault(path)
    if fault is None:
        return "utf-8"
    second = _gb18030_fault(path)
    if second is None:
        return "gb18030"
    raise _undecodable(path, fault, second)


def _head(path: TextSource) -> bytes:
    head = bytearray()
    for block in unpacked_blocks(path):
        head += block
        if len(head) >= HEAD_BYTES:
            break
    return bytes(head)


def _utf16_by_nuls(head: bytes) -> str | None:
    """`utf-16-le` or `utf-16-be` when a text without a byte order mark reads as ordinary text in it, else None."""
    even = len(head) // 2 * 2
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        pass
    else:
        # Valid UTF-8: could only be Latin text in UTF-16, where every second byte is NUL.
        if head.count(0) < 0.2 * len(head):
            return None
    shares = {}
    for name, unit in (("utf-16-le", "<u2"), ("utf-16-be", ">u2")):
        units = np.frombuffer(head[:even], dtype=unit)
        ordinary = sum(int(np.count_nonzero((units >= low) & (units <= high))) for low, high in UTF16_ORDINARY)
        shares[name] = ordinary / max(1, len(units))
    best = max(shares, key=lambda name: shares[name])
    return best if shares[best] >= UTF16_PLAUSIBLE_SHARE else None


def _utf8_fault(path: TextSource) -> BadByte | None:
    """None when the file is UTF-8 up to `PROOF_CHARACTERS`; an ASCII file is read to its end."""
    characters = 0
    try:
        for text, _ in decoded_blocks(path, "utf-8"):
            if not text.isascii():
                characters += len(text) - len(text.encode("ascii", errors="ignore"))
            if characters >= PROOF_CHARACTERS:
                return None
    except BadByte as fault:
        return fault
    return None


def _gb18030_fault(path: TextSource) -> BadByte | str | None:
    """None when the whole file is GB18030 text, else the reason why it is not."""
    decoder = codecs.getincrementaldecoder("utf-8")("ignore")
    high = valid = characters = common = 0
    try:
        for (text, _), block in zip(decoded_blocks(path, "gb18030"), _then_end(unpacked_blocks(path)), strict=True):
            codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
            characters += int(np.count_nonzero(codes >= 0x80))
            common += int(np.count_nonzero(_common_chinese()[np.minimum(codes, 0xFFFF)]))
            utf8 = decoder.decode(block)
            valid += len(utf8.encode()) - len(utf8.encode("ascii", errors="ignore"))
            high += int(np.count_nonzero(np.frombuffer(block, dtype=np.uint8) & 0x80))
    except BadByte as fault:
        return fault
    if common < COMMON_SHARE * characters:
        return "not GB18030 either: it would read as rare characters"
    if common * high <= valid * characters:
        return "not GB18030 either: most of its bytes above 0x7f are UTF-8"
    return None


@cache
def _common_chinese() -> np.ndarray:
    """bool (0x10000,): the 3,755 most common characters (GB 2312, level 1) and the signs of its rows 1 to 3."""
    table = np.zeros(0x10000, dtype=bool)
    for lead in (*range(0xA1, 0xA4), *range(0xB0, 0xD8)):
        for trail in range(0xA1, 0xFF):
            character = bytes((lead, trail)).decode("gb2312", errors="ignore")
            if character:
                table[ord(character)] = True
    return table


def _undecodable(path: TextSource, fault: BadByte, second: BadByte | str | None = None) -> Undecodable:
    also = f"; {second}" if second is not None else ""
    unpacked = " once unpacked" if path.suffix.lower() in PACKED_SUFFIXES else ""
    return Undecodable(
        f"{path}{unpacked} is {fault}{also}",
        hint="Fix that byte, or set data.encoding to the file's encoding, for example gb18030, big5 or cp1252",
    )
