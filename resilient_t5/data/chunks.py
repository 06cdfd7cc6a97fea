"""A document's tokens to chunks: cut at sentence ends in Chinese and English, else at clause ends, else hard.

The rules are our own. A regular expression finds the candidate marks; only the Western ones, which mean several things,
are looked at in Python. Ends lie before the white space that follows them, where tokenizers begin their next token.
"""

import re
from bisect import bisect_right

import numpy as np

from resilient_t5.data.tokenizer import Encoded

CHINESE_STOPS = "\u3002\uff01\uff1f\uff1b\u2026\uff61"  # full stop, exclamation, question, semicolon, ellipsis, half width stop
CLOSERS = "[\"'\\u201d\\u2019\\u300d\\u300f\\uff09)\\]\\u3011\\u300b\\u3009]*"  # quotes and brackets, Chinese and Western
# Begins with one character class, which the regular expression engine searches without trying alternatives.
STOP = re.compile(rf"[{CHINESE_STOPS}!?.\n](?:(?<!\n)[{CHINESE_STOPS}!?.]*{CLOSERS})?")
HAS_CHINESE_STOP = re.compile(f"[{CHINESE_STOPS}]")
CLAUSE = re.compile(rf"[\uff0c\uff1a\u3001]+{CLOSERS}|[,;:]+{CLOSERS}(?![\d/])|\s+")
LAST_WORD = re.compile(r"[^\W_]+(?:\.[^\W_]+)*\Z")
LONGEST_WORD = 24  # longer than any abbreviation below
SPACES = re.compile(r"\s*")
# Words whose full stop ends no sentence.
ABBREVIATION = re.compile(
    "dr|mrs?|ms|prof|st|[sj]r|vs|cf|al|eg|ie|viz|approx|ca|nos?|figs?|vol|eds?|pp|ch|sec|eq|refs?|dept|univ|inc|ltd|co|corp"
    "|gen|lt|col|capt|sgt|rev|hon|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|resp|incl|esp|wt|ht|spp?|var|subsp",
    re.IGNORECASE,
)


def sentence_ends(text: str) -> np.ndarray:
    """Where sentences end: ascending character positions, exclusive, int32; the last is `len(text)`.

    Chinese stops end a sentence together with closing quotes and brackets behind them, line breaks end one, and Western
    stops do unless they stand in a number, an abbreviation, an initial, a list mark or a link.
    """
    ends = []
    for match in STOP.finditer(text):
        mark = match[0]
        if mark == "\n":
            ends.append(match.start())
        elif mark[0] in CHINESE_STOPS or _western_end(text, match):
            ends.append(match.end())
    return _closed(ends, len(text))


def clause_ends(text: str) -> np.ndarray:
    """Where clauses end: ascending character positions, exclusive, int32; the last is `len(text)`.

    After commas, colons and semicolons outside numbers, and before white space.
    """
    ends = [match.start() if match[0].isspace() else match.end() for match in CLAUSE.finditer(text)]
    return _closed(ends, len(text))


def _closed(ends: list[int], length: int) -> np.ndarray:
    """`ends` as an array without a position at 0, with the end of the text."""
    positions = np.array([*ends, length], dtype=np.int32)
    keep = positions > 0
    keep[:-1] &= positions[:-1] < positions[1:]
    keep[-1] = True
    return positions[keep]


def _western_end(text: str, match: re.Match[str]) -> bool:
    """True when a run of stops that begins with `.`, `!` or `?` ends a sentence."""
    end = match.end()
    following = text[end : end + 1]
    if HAS_CHINESE_STOP.search(match[0]) or not following:
        return True
    if "." not in match[0]:
        return following.isspace() or not following.isascii()
    if not following.isspace() and not _is_han(following):
        return False
    start = match.start()
    word = LAST_WORD.search(text, max(0, start - LONGEST_WORD), start)
    if word is not None and _holds_its_stop(text, word):
        return False
    if _is_han(following):
        return word is not None and not word[0][-1].isdigit()
    after = SPACES.match(text, end)
    return after is None or not text[after.end() : after.end() + 1].islower()


def _is_han(character: str) -> bool:
    return "\u3400" <= character <= "\u9fff"


def _holds_its_stop(text: str, word: re.Match[str]) -> bool:
    """True for abbreviations, letters with stops between them, initials of names, and numbers that open a line."""
    spelled, start = word[0], word.start()
    if "." in spelled:
        return all(len(part) == 1 for part in spelled.split("."))  # e.g. and U.S., but not 3.5
    if len(spelled) == 1 and spelled.isupper():
        # "J. Smith" against "hepatitis B. The": a word in small letters stands before a kind, not before an initial.
        return not text[max(0, start - 2) : max(0, start - 1)].islower()
    if spelled.isdigit():
        return len(spelled) <= 3 and (start == 0 or text[start - 1] == "\n")
    return ABBREVIATION.fullmatch(spelled) is not None


def cut_chunks(encoded: Encoded, text: str, max_tokens: int, overlap_tokens: int) -> list[tuple[int, int]]:
    """Cut a document into chunks of at most `max_tokens`: token ranges [begin, end), in order.

    A chunk is filled with whole sentences as far as they fit; a sentence too long for one is cut at its clauses, and a
    clause too long at a character. Every chunk after the first begins up to `overlap_tokens` before the end of the one
    before it, never inside a character; without these the chunks tile the document exactly.

    Args:
        encoded: the document's tokens, with offsets into `text`.
        text: the document.
        max_tokens: the longest chunk.
        overlap_tokens: context repeated, below `max_tokens`.
    """
    if not 0 <= overlap_tokens < max_tokens:
        raise ValueError(f"overlap_tokens: {overlap_tokens} is not between 0 and max_tokens {max_tokens}")
    tokens = len(encoded.ids)
    if tokens <= max_tokens:
        return [(0, tokens)] if tokens else []
    sentences = _token_positions(sentence_ends(text), encoded)
    clauses: list[int] | None = None  # most documents never need them
    chunks: list[tuple[int, int]] = []
    begin = done = 0
    while tokens - begin > max_tokens:
        limit = begin + max_tokens
        end = _last(sentences, limit)
        if end <= done:
            clauses = _token_positions(clause_ends(text), encoded) if clauses is None else clauses
            end = _last(clauses, limit)
        if end <= done:
            end = limit
            while end > done and _inside_character(encoded, end):
                end -= 1
        if end <= done:
            end = limit  # one character of more than max_tokens tokens
        chunks.append((begin, end))
        done = end
        begin = max(0, end - overlap_tokens)
        while begin < end and _inside_character(encoded, begin):
            begin += 1
    chunks.append((begin, tokens))
    return chunks


def _inside_character(encoded: Encoded, token: int) -> bool:
    """True when `token` shares a character with the token before it (bytes, expanded ligatures)."""
    return token > 0 and bool(encoded.starts[token] < encoded.ends[token - 1])


def _token_positions(ends: np.ndarray, encoded: Encoded) -> list[int]:
    """For character positions the first token that begins there or later; ascending."""
    return np.searchsorted(encoded.starts, ends, side="left").tolist()


def _last(positions: list[int], limit: int) -> int:
    """The last of the ascending `positions` that is not above `limit`; 0 when there is none."""
    index = bisect_right(positions, limit)
    return positions[index - 1] if index else 0
