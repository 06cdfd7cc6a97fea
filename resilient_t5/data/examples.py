"""Cut encoded documents into examples that end at sentences, with the term occurrences in them. Pure.

All documents of a batch are handled as one long text, so that the cost per document is that of a few array elements.

A document's tokens are cut at sentence ends in Chinese and English, else at clause ends, else anywhere. The rules are our own.
A regular expression finds candidates; only Western stops, which are ambiguous, are examined in Python. Ends are before the
white space that follows them, where tokenizers begin their next token.
"""

import itertools
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from resilient_t5.data.terms import TermMatcher, token_spans
from resilient_t5.data.tokenizer.tokenizer import Encoded, EncodedBatch, TextTokenizer

CHINESE_STOPS = "\u3002\uff01\uff1f\uff1b\u2026\uff61"  # full stop, exclamation, question, semicolon, ellipsis, half width stop
CLOSERS = "[\"'\\u201d\\u2019\\u300d\\u300f\\uff09)\\]\\u3011\\u300b\\u3009]*"  # quotes and brackets, Chinese and Western
# Begins with one character class, which the regular expression engine searches without trying alternatives.
STOP = re.compile(rf"[{CHINESE_STOPS}!?.\n](?:(?<!\n)[{CHINESE_STOPS}!?.]*{CLOSERS})?")
HAS_CHINESE_STOP = re.compile(f"[{CHINESE_STOPS}]")
CLAUSE = re.compile(rf"[\uff0c\uff1a\u3001]+{CLOSERS}|[,;:]+{CLOSERS}(?![\d/])|\s+")
LAST_WORD = re.compile(r"[^\W_]+(?:\.[^\W_]+)*\Z")
MAX_WORD = 24  # longer than any abbreviation below
SPACES = re.compile(r"\s*")
# Words whose full stop ends no sentence.
ABBREVIATION = re.compile(
    "dr|mrs?|ms|prof|st|[sj]r|vs|cf|al|eg|ie|viz|approx|ca|nos?|figs?|vol|eds?|pp|ch|sec|eq|refs?|dept|univ|inc|ltd|co|corp"
    "|gen|lt|col|capt|sgt|rev|hon|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|resp|incl|esp|wt|ht|spp?|var|subsp",
    re.IGNORECASE,
)


def sentence_ends(text: str) -> np.ndarray:
    """Where sentences end: ascending character positions, exclusive, int32; the last is `len(text)`.

    Chinese stops with closing quotes and brackets after them, line breaks, and Western stops that are not part of a number, an
    abbreviation, an initial, a list number or a link.
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
    word = LAST_WORD.search(text, max(0, start - MAX_WORD), start)
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
        # "J. Smith" and "hepatitis B. The": a lower-case word comes before a kind, not before an initial.
        return not text[max(0, start - 2) : max(0, start - 1)].islower()
    if spelled.isdigit():
        return len(spelled) <= 3 and (start == 0 or text[start - 1] == "\n")
    return ABBREVIATION.fullmatch(spelled) is not None


def cut_chunks(encoded: Encoded, text: str, max_tokens: int, overlap_tokens: int) -> list[tuple[int, int]]:
    """Cut a document into chunks of at most `max_tokens`: token ranges [begin, end), in order.

    A chunk is filled with whole sentences as far as they fit; a sentence too long for one is cut at its clauses, and a
    clause too long at a character. Every chunk after the first begins up to `overlap_tokens` before the end of the one
    before it, never inside a character; without these the chunks tile the document exactly.
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
    """Whether `token` shares a character with the token before it (bytes, expanded ligatures)."""
    return token > 0 and bool(encoded.starts[token] < encoded.ends[token - 1])


def _token_positions(ends: np.ndarray, encoded: Encoded) -> list[int]:
    """For character positions the first token that begins there or later; ascending."""
    return np.searchsorted(encoded.starts, ends, side="left").tolist()


def _last(positions: list[int], limit: int) -> int:
    """Largest of the ascending `positions` up to `limit`; 0 when there is none."""
    index = bisect_right(positions, limit)
    return positions[index - 1] if index else 0


@dataclass(frozen=True)
class Examples:
    """Concatenated examples.

    tokens: int32, full-vocabulary ids of all examples.
    lengths: int32 (n,), tokens of each example.
    documents: int32 (n,), number of the document of each, never decreasing.
    pairs: int32 (n,), tokens of the source of a pair, -1 for text.
    terms: int32 (m, 4): example, first token in it, token after the last, term id; sorted.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    documents: np.ndarray
    pairs: np.ndarray
    terms: np.ndarray

    def chosen(self, documents: np.ndarray) -> "Examples":
        """The examples of the documents for which the bool array `documents` is True; those are numbered from 0."""
        keep = documents[self.documents]
        if keep.all():
            return self
        number = np.cumsum(keep, dtype=np.int32) - 1
        rows = keep[self.terms[:, 0]]
        terms = self.terms[rows]
        terms[:, 0] = number[terms[:, 0]]
        renumbered = (np.cumsum(documents, dtype=np.int32) - 1)[self.documents[keep]]
        return Examples(self.tokens[np.repeat(keep, self.lengths)], self.lengths[keep], renumbered, self.pairs[keep], terms)


def find_terms(matcher: TermMatcher | None, texts: Sequence[str], batch: EncodedBatch) -> tuple[np.ndarray, int]:
    """Find every term occurrence of the texts.

    Returns:
        int32 (m, 3): first token, token after the last (in the whole batch), term id; and how many were widened.
    """
    if matcher is None:
        return np.zeros((0, 3), dtype=np.int32), 0
    # Positions are in all texts joined by line breaks.
    begins = np.cumsum([0, *(len(text) + 1 for text in texts[:-1])], dtype=np.int32)
    shift = np.repeat(begins, np.diff(batch.offsets))
    tokens = batch.tokens
    placed = Encoded(tokens.ids, tokens.starts + shift, tokens.ends + shift)
    return token_spans(matcher.find_together(texts), placed)


def cut_examples(
    texts: Sequence[str],
    batch: EncodedBatch,
    terms: np.ndarray,
    *,
    tokenizer: TextTokenizer,
    max_tokens: int,
    overlap_tokens: int,
) -> tuple[Examples, int]:
    """Cut every text of a batch into examples. An example inside a text is encoded like the beginning of a text.

    Args:
        texts: the documents, numbered from 0.
        batch: their tokens.
        terms: as `find_terms` returns them.
        max_tokens: longest example, without end mark.
        overlap_tokens: tokens that a chunk repeats of the one before it.

    Returns:
        the examples, and the number of term occurrences that cuts divide.
    """
    counts = np.diff(batch.offsets)
    limit = max(max_tokens - 1, overlap_tokens + 1)  # a word-start mark may be added in front
    short = np.flatnonzero((counts > 0) & (counts <= max_tokens))
    ranges = [np.stack([batch.offsets[short], batch.offsets[short + 1], short], axis=1)]
    for number in np.flatnonzero(counts > max_tokens).tolist():
        chunks = np.array(cut_chunks(batch[number], texts[number], limit, overlap_tokens), dtype=np.int64)
        ranges.append(np.column_stack([chunks + batch.offsets[number], np.full(len(chunks), number)]))
    chunks = np.concatenate(ranges)
    chunks = chunks[np.argsort(chunks[:, 0], kind="stable")]
    lengths = chunks[:, 1] - chunks[:, 0]
    before = np.concatenate([[0], np.cumsum(lengths)[:-1]]) if len(lengths) else lengths
    positions = np.arange(int(lengths.sum())) + np.repeat(chunks[:, 0] - before, lengths)
    found, lost = _terms_of_chunks(terms, chunks)
    examples = Examples(
        tokens=batch.tokens.ids[positions],
        lengths=lengths.astype(np.int32),
        documents=chunks[:, 2].astype(np.int32),
        pairs=np.full(len(chunks), -1, dtype=np.int32),
        terms=found,
    )
    continued = np.flatnonzero((chunks[:, 0] > batch.offsets[chunks[:, 2]]) & (lengths > 0))
    return _start_as_texts(examples, continued, tokenizer, max_tokens), lost


def _start_as_texts(examples: Examples, continued: np.ndarray, tokenizer: TextTokenizer, max_tokens: int) -> Examples:
    """Encode examples that begin inside a word again as the beginning of a text, unless they become too long."""
    ends = np.cumsum(examples.lengths, dtype=np.int64)
    lengths, terms = examples.lengths.copy(), examples.terms.copy()
    first_term = np.searchsorted(terms[:, 0], np.arange(len(lengths) + 1))
    parts, done = [], 0
    for number in continued.tolist():
        first, last = int(ends[number] - lengths[number]), int(ends[number])
        ids = examples.tokens[first:last]
        new, replaced = tokenizer.starts_as_text(ids)
        old, more = ids[:replaced], len(new) - replaced
        if not len(new) or len(ids) + more > max_tokens:
            continue
        parts += [examples.tokens[done:first], new]
        done = first + len(old)
        lengths[number] += more
        _move_terms(terms[first_term[number] : first_term[number + 1], 1:3], _changed_head(old, new), more)
    if not parts:
        return examples
    tokens = np.concatenate([*parts, examples.tokens[done:]])
    return Examples(tokens, lengths, examples.documents, examples.pairs, terms)


def _changed_head(old: np.ndarray, new: np.ndarray) -> int:
    """Number of tokens of `old` before its common suffix with `new`."""
    shared = min(len(old), len(new))
    differs = np.flatnonzero(old[len(old) - shared :][::-1] != new[len(new) - shared :][::-1])
    return len(old) - (int(differs[0]) if len(differs) else shared)


def _move_terms(bounds: np.ndarray, head: int, more: int) -> None:
    """Move term bounds (start, end) by `more` tokens, in place; a term that begins in the changed head begins the example."""
    starts, ends = bounds[:, 0], bounds[:, 1]
    starts[:] = np.where(starts < head, 0, starts + more)
    ends[:] = np.maximum(ends, head) + more


def _terms_of_chunks(terms: np.ndarray, chunks: np.ndarray) -> tuple[np.ndarray, int]:
    """Occurrences that a chunk contains whole, one row for each such chunk, and the number that no chunk contains."""
    if not len(terms) or not len(chunks):
        return np.zeros((0, 4), dtype=np.int32), len(terms)
    newest = np.searchsorted(chunks[:, 0], terms[:, 0], side="right") - 1
    rows, kept_whole = [], np.zeros(len(terms), dtype=bool)
    for back in itertools.count():  # one round without overlap, two or three with it
        number = np.maximum(newest - back, 0)
        reached = (newest >= back) & (terms[:, 0] < chunks[number, 1])
        if not reached.any():
            break
        inside = reached & (terms[:, 1] <= chunks[number, 1])
        kept_whole |= inside
        within = terms[inside, :2] - chunks[number[inside], :1]
        rows.append(np.column_stack([number[inside], within, terms[inside, 2]]))
    found = np.concatenate(rows).astype(np.int32) if rows else np.zeros((0, 4), dtype=np.int32)
    if len(rows) > 1:
        found = found[np.lexsort((found[:, 1], found[:, 0]))]
    return found, int((~kept_whole).sum())
