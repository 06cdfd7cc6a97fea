"""What an answer may be: the output ids, and an automaton over them that a constrained search follows.

    sentinel 0, answer, sentinel 1, answer, ..., end mark

An answer is a run of ordinary pieces with at least one that can be seen. Pieces that were never trained, that hold a
control character, or that the text's encoding cannot hold are no output ids at all. Characters spelled in byte pieces
come out whole: the automaton follows the byte ranges of well-formed UTF-8 (RFC 3629, section 4), without control
characters. Shapes: A output ids, N states.
"""

import re
from dataclasses import dataclass

import numpy as np

from resilient_t5.data.tokenizer.tokenizer import BYTE_PIECE, TextTokenizer
from resilient_t5.errors import DataError

SPACE = "\u2581"
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffd]")
# States: an answer with something to see; one just begun; one with only a space; inside a character of 2 to 4 bytes.
SEEN, BEGUN, SPACED, ONE_LEFT, TWO_LEFT, THREE_LEFT, AFTER_C2, AFTER_E0, AFTER_ED, AFTER_F0, AFTER_F4 = range(11)
FORBIDDEN = 127
# Pieces that a state still needs before its answer may end.
MIN_PIECES = np.array([0, 1, 1, 1, 2, 3, 1, 2, 2, 3, 3], np.int8)


@dataclass(frozen=True, eq=False)
class AnswerRules:
    """The output ids of a model and what may follow what."""

    output_ids: np.ndarray
    """Int64 (A,), ascending full-vocabulary ids: whatever an answer may hold, the sentinels and the end mark."""
    sentinels: np.ndarray
    """Int64 (max_sentinels,): place of sentinel k in `output_ids`."""
    end: int
    """Place of the end mark."""
    following_NA: np.ndarray
    """Int8: the state behind a piece; 0 for a forbidden one."""
    cost_NA: np.ndarray
    """Int8: pieces that the answer needs behind this one before it may end; 127 where the piece is forbidden."""


def answer_rules(
    tokenizer: TextTokenizer, trained_ids: np.ndarray | None, max_sentinels: int, encoding: str = "utf-8"
) -> AnswerRules:
    """The rules for the answers of one model in one encoding.

    Args:
        tokenizer: the model's.
        trained_ids: ascending full ids that answers may hold; None: every id of the tokenizer.
        max_sentinels: sentinels that sources may hold.
        encoding: a codec; a piece that it cannot encode is left out, byte pieces too unless it encodes all of Unicode.

    Raises:
        DataError: nothing is left to answer with.
    """
    pieces = tokenizer.pieces()
    marks = [*tokenizer.sentinel_ids[:max_sentinels].tolist(), tokenizer.eos_id]
    bytes_allowed = _encodes("\U0001f600", encoding)
    chosen = [(number, np.full(len(MIN_PIECES), -1, np.int8)) for number in marks]
    lines: dict[str | int, np.ndarray] = {}
    special = set(tokenizer.special_ids.tolist())
    for number in range(len(pieces)) if trained_ids is None else trained_ids.tolist():
        if number in special or number >= len(pieces):
            continue
        kind = _kind(pieces[number], encoding, bytes_allowed)
        if kind is not None:
            lines[kind] = lines[kind] if kind in lines else _following(kind)
            chosen.append((number, lines[kind]))
    if len(chosen) == len(marks):
        raise DataError("no piece of the vocabulary can be written in this encoding", where=encoding, hint="Use utf-8")
    chosen.sort(key=lambda entry: entry[0])
    output_ids = np.array([number for number, _ in chosen], np.int64)
    table_NA = np.stack([line for _, line in chosen], axis=1)
    places = np.searchsorted(output_ids, marks)
    cost_NA = np.where(table_NA < 0, np.int8(FORBIDDEN), MIN_PIECES[table_NA])
    return AnswerRules(output_ids, places[:-1], int(places[-1]), np.maximum(table_NA, 0), cost_NA)


def _kind(piece: str, encoding: str, bytes_allowed: bool) -> str | int | None:
    """`text`, `space`, the value of a byte piece, or None for a piece that no answer may hold."""
    byte = BYTE_PIECE.fullmatch(piece)
    if byte:
        value = int(byte[1], 16)
        return value if bytes_allowed and (0x20 <= value < 0x7F or 0x80 <= value < 0xC0 or 0xC2 <= value < 0xF5) else None
    text = piece.replace(SPACE, " ")
    if not text or CONTROL.search(text) or not _encodes(text, encoding):
        return None
    return "space" if text.isspace() else "text"


def _encodes(text: str, encoding: str) -> bool:
    try:
        return text.encode(encoding).decode(encoding) == text
    except UnicodeError:
        return False


def _following(kind: str | int) -> np.ndarray:
    """Int8 (N,): the state behind a piece of this kind, -1 where it is forbidden."""
    line = np.full(len(MIN_PIECES), -1, np.int8)
    if kind == "space" or kind == 0x20:
        line[[SEEN, BEGUN]] = SEEN, SPACED
    elif isinstance(kind, str) or kind < 0x80:
        line[[SEEN, BEGUN, SPACED]] = SEEN
    elif kind < 0xC0:
        line[[ONE_LEFT, TWO_LEFT, THREE_LEFT]] = SEEN, ONE_LEFT, TWO_LEFT
        line[AFTER_C2] = SEEN if kind >= 0xA0 else -1
        line[AFTER_E0] = ONE_LEFT if kind >= 0xA0 else -1
        line[AFTER_ED] = ONE_LEFT if kind < 0xA0 else -1
        line[AFTER_F0] = TWO_LEFT if kind >= 0x90 else -1
        line[AFTER_F4] = TWO_LEFT if kind < 0x90 else -1
    else:
        odd = {0xC2: AFTER_C2, 0xE0: AFTER_E0, 0xED: AFTER_ED, 0xF0: AFTER_F0, 0xF4: AFTER_F4}
        usual = ONE_LEFT if kind < 0xE0 else TWO_LEFT if kind < 0xF0 else THREE_LEFT
        line[[SEEN, BEGUN, SPACED]] = odd.get(kind, usual)
    return line
