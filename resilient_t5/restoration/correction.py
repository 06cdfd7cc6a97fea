"""Correct a text with a model that writes the whole text anew: its changes as edits at places of the original.

What the model wrote is never taken as a text. Its ids are aligned with those it read; where both are equal the original
stands, with all that a tokenizer does not keep. Only tokens that differ become an edit. A place that holds a character
the model has no piece for is left alone, because the model cannot write it back.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from resilient_t5.data.examples import cut_chunks
from resilient_t5.data.tokenizer.tokenizer import SPACE, Encoded
from resilient_t5.restoration.answer_rules import answer_rules
from resilient_t5.restoration.decode import DecodeSettings, Hypothesis, Question, Searcher, in_batches
from resilient_t5.restoration.filler import Filler, Tally
from resilient_t5.restoration.gaps import document_ranges
from resilient_t5.restoration.sentinels import Alignment


@dataclass(frozen=True)
class Edit:
    """Characters [start, end) of the text, `before`, become `after`; the probability of the tokens that say so."""

    start: int
    end: int
    before: str
    after: str
    probability: float


def correct(
    filler: Filler, text: str, asking: DecodeSettings, tally: Tally, should_stop: Callable[[], bool] | None = None
) -> list[Edit] | None:
    """The edits that the model makes in `text`, in order and apart; None when `should_stop` said so.

    Raises:
        DataError: nothing of the vocabulary fits the encoding.
    """
    usage, tokenizer = filler.usage, filler.tokenizer
    rules = answer_rules(tokenizer, usage.trained_ids, 1, asking.encoding)
    ranges = document_ranges(text, usage.document)
    encoded = tokenizer.encode_batch([text[start:end].rstrip() for start, end in ranges])
    room = min(usage.max_source_tokens, usage.max_target_tokens) - 1
    chunks: list[tuple[int, Encoded]] = []
    for (start, end), tokens in zip(ranges, encoded, strict=True):
        tally.vocabulary.count(tokens.ids, tokenizer, usage.trained_ids)
        for first, last in cut_chunks(tokens, text[start:end], room, 0):
            chunks.append((start, Encoded(tokens.ids[first:last], tokens.starts[first:last], tokens.ends[first:last])))
    eos = np.array([tokenizer.eos_id], np.int64)
    nothing = np.zeros(0, np.int64)
    questions = [Question(np.concatenate([chunk.ids.astype(np.int64), eos]), 0, nothing, 0) for _, chunk in chunks]
    tally.windows += len(questions)
    tally.passes += bool(questions)
    found = in_batches(Searcher(filler.model, rules), questions, asking.beams, asking, usage.max_target_tokens, should_stop)
    if found is None:
        return None
    edits: list[Edit] = []
    for (start, chunk), hypotheses in zip(chunks, found, strict=True):
        edits += _edits_of(filler, text, start, chunk, hypotheses[0])
    return edits


def _edits_of(filler: Filler, text: str, offset: int, chunk: Encoded, written: Hypothesis) -> list[Edit]:
    edits: list[Edit] = []
    ids = written.ids[:-1]
    unknown = np.append(filler.tokenizer.byte_ids, filler.tokenizer.unk_id)
    for first, last, low, high in Alignment(chunk.ids, ids).replacements():
        if np.isin(chunk.ids[first:last], unknown).any():
            continue
        start = offset + int(chunk.ends[first - 1] if first else chunk.starts[0] if len(chunk.starts) else 0)
        end = offset + int(chunk.ends[last - 1]) if last > first else start
        before = text[start:end]
        after = spelled(filler, ids[low:high])
        if spelled(filler, chunk.ids[first:last]) == after:
            continue
        if before[:1].isspace() and after.startswith(" "):  # the same space, whatever kind it is in the original
            lead = len(before) - len(before.lstrip())
            start, before, after = start + lead, before[lead:], after[1:]
        elif first == 0 and not before[:1].isspace():
            after = after.lstrip(" ")  # the dummy space in front of a text
        start, before, after = _without_common_ends(start, before, after)
        if before != after:
            probability = math.exp(written.log_probabilities[low : high + 1].sum())
            edits.append(Edit(start, start + len(before), before, after, probability))
    return edits


def spelled(filler: Filler, ids: Sequence[int] | np.ndarray) -> str:
    """Text of ids in the middle of a text: with the space that the first piece carries."""
    if len(ids) == 0:
        return ""
    text = filler.tokenizer.decode(list(map(int, ids)))
    return f" {text.lstrip(' ')}" if filler.pieces[int(ids[0])].startswith(SPACE) else text


def _without_common_ends(start: int, before: str, after: str) -> tuple[int, str, str]:
    head = 0
    while head < min(len(before), len(after)) and before[head] == after[head]:
        head += 1
    tail = 0
    while tail < min(len(before), len(after)) - head and before[-1 - tail] == after[-1 - tail]:
        tail += 1
    return start + head, before[head : len(before) - tail], after[head : len(after) - tail]
