"""Permitted outputs: a set of ids, and an automaton over them for constrained search.

    sentinel 0, answer, sentinel 1, answer, ..., end token

An answer is a sequence of ordinary pieces, at least one of them visible. Pieces that were never trained, contain a control
character, or cannot be encoded in the encoding of the text are excluded. Characters spelled in byte pieces are always
complete: the automaton follows the byte ranges of well-formed UTF-8 (RFC 3629, section 4), without control characters.
Shapes: A output ids, N states.
"""

import re
from dataclasses import dataclass
from functools import cache

import numpy as np

from resilient_t5.data.tokenizer.tokenizer import BYTE_PIECE, TextTokenizer
from resilient_t5.errors import DataError

SPACE = "\u2581"
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffd]")
# States: the answer has a visible character; has just begun; has only a space; is inside a character of 2 to 4 bytes.
SEEN, BEGUN, SPACED, ONE_LEFT, TWO_LEFT, THREE_LEFT, AFTER_C2, AFTER_E0, AFTER_ED, AFTER_F0, AFTER_F4 = range(11)
FORBIDDEN = 127
MIN_PIECES = np.array([0, 1, 1, 1, 2, 3, 1, 2, 2, 3, 3], np.int8)
"""Pieces needed from each state before the answer may end."""


@dataclass(frozen=True, eq=False)
class AnswerRules:
    """Output ids of a model, and the transitions between states."""

    output_ids: np.ndarray
    """Int64 (A,), ascending full-vocabulary ids: permitted pieces, sentinels and the end token."""
    sentinels: np.ndarray
    """Int64 (max_sentinels,): place of sentinel k in `output_ids`."""
    end: int
    """Place of the end token."""
    next_state_NA: np.ndarray
    """Int8: state after a piece; 0 for a forbidden one."""
    cost_NA: np.ndarray
    """Int8: pieces needed after this one before the answer may end; 127 for a forbidden one."""


def answer_rules(
    tokenizer: TextTokenizer, trained_ids: np.ndarray | None, max_sentinels: int, encoding: str = "utf-8"
) -> AnswerRules:
    """Build the rules for one model and one encoding.

    Args:
        tokenizer: the tokenizer of the model.
        trained_ids: ascending full ids that answers may hold; None for every id of the tokenizer.
        max_sentinels: maximum number of sentinels in a source.
        encoding: codec; a piece that it cannot encode is excluded, and byte pieces unless it encodes all of Unicode.

    Raises:
        DataError: no piece is permitted.
    """
    pieces = tokenizer.pieces()
    marks = [*tokenizer.sentinel_ids[:max_sentinels].tolist(), tokenizer.eos_id]
    allows_bytes = _encodes("\U0001f600", encoding)
    rows = {number: np.full(len(MIN_PIECES), -1, np.int8) for number in marks}
    transitions = cache(_transitions)
    special = set(tokenizer.special_ids.tolist())
    for number in range(len(pieces)) if trained_ids is None else trained_ids.tolist():
        if number in special or number >= len(pieces):
            continue
        kind = _kind(pieces[number], encoding, allows_bytes)
        if kind is not None:
            rows[number] = transitions(kind)
    if len(rows) == len(marks):
        raise DataError("no piece of the vocabulary can be encoded in this encoding", where=encoding, hint="Use utf-8")
    output_ids = np.array(sorted(rows), np.int64)
    states_NA = np.stack([rows[number] for number in output_ids.tolist()], axis=1)
    places = np.searchsorted(output_ids, marks)
    cost_NA = np.where(states_NA < 0, np.int8(FORBIDDEN), MIN_PIECES[states_NA])
    return AnswerRules(output_ids, places[:-1], int(places[-1]), np.maximum(states_NA, 0), cost_NA)


def _kind(piece: str, encoding: str, allows_bytes: bool) -> str | int | None:
    """Return `text`, `space`, the value of a byte piece, or None for a forbidden piece."""
    byte = BYTE_PIECE.fullmatch(piece)
    if byte:
        value = int(byte[1], 16)
        return value if allows_bytes and (0x20 <= value < 0x7F or 0x80 <= value < 0xC0 or 0xC2 <= value < 0xF5) else None
    text = piece.replace(SPACE, " ")
    if not text or CONTROL.search(text) or not _encodes(text, encoding):
        return None
    return "space" if text.isspace() else "text"


def _encodes(text: str, encoding: str) -> bool:
    try:
        return text.encode(encoding).decode(encoding) == text
    except UnicodeError:
        return False


def _transitions(kind: str | int) -> np.ndarray:
    """State (int8, N) after a piece of this kind; -1 where it is forbidden."""
    next_state = np.full(len(MIN_PIECES), -1, np.int8)
    if kind == "space" or kind == 0x20:
        next_state[[SEEN, BEGUN]] = SEEN, SPACED
    elif isinstance(kind, str) or kind < 0x80:
        next_state[[SEEN, BEGUN, SPACED]] = SEEN
    elif kind < 0xC0:
        next_state[[ONE_LEFT, TWO_LEFT, THREE_LEFT]] = SEEN, ONE_LEFT, TWO_LEFT
        next_state[AFTER_C2] = SEEN if kind >= 0xA0 else -1
        next_state[AFTER_E0] = ONE_LEFT if kind >= 0xA0 else -1
        next_state[AFTER_ED] = ONE_LEFT if kind < 0xA0 else -1
        next_state[AFTER_F0] = TWO_LEFT if kind >= 0x90 else -1
        next_state[AFTER_F4] = TWO_LEFT if kind < 0x90 else -1
    else:
        special = {0xC2: AFTER_C2, 0xE0: AFTER_E0, 0xED: AFTER_ED, 0xF0: AFTER_F0, 0xF4: AFTER_F4}
        usual = ONE_LEFT if kind < 0xE0 else TWO_LEFT if kind < 0xF0 else THREE_LEFT
        next_state[[SEEN, BEGUN, SPACED]] = special.get(kind, usual)
    return next_state
