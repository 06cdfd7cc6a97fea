"""Text correction with a model that rewrites the whole text, as edits of the original.

The ids that the model wrote are aligned with those it read. Where both are equal the original characters stay, including
all that a tokenizer does not keep; only tokens that differ become an edit. A place with a character that has no piece is
left alone, because the model cannot write it back.
"""

import math
import os.path
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from resilient_t5.data.examples import cut_chunks
from resilient_t5.data.tokenizer.sentencepiece import SPACE
from resilient_t5.data.tokenizer.tokenizer import Encoded
from resilient_t5.restoration.answer_rules import answer_rules
from resilient_t5.restoration.beam_search import BeamSearch, DecodeSettings, Hypothesis, SearchRequest
from resilient_t5.restoration.filler import Filler, FillStatistics
from resilient_t5.restoration.gaps import document_ranges
from resilient_t5.restoration.sentinels import Alignment


@dataclass(frozen=True)
class Edit:
    """Replacement of characters [start, end) of the text, `before`, by `after`, with the probability of its tokens."""

    start: int
    end: int
    before: str
    after: str
    probability: float


def correct(filler: Filler, text: str, settings: DecodeSettings, statistics: FillStatistics) -> list[Edit]:
    """Return the edits of `text`, in order and disjoint.

    Raises:
        DataError: no piece of the vocabulary fits the encoding.
    """
    config, tokenizer = filler.config, filler.tokenizer
    search = BeamSearch(filler.model, answer_rules(tokenizer, config.trained_ids, 1, settings.encoding))
    ranges = document_ranges(text, config.document)
    encoded = tokenizer.encode_batch([text[start:end].rstrip() for start, end in ranges])
    max_tokens = min(config.max_source_tokens, config.max_target_tokens) - 1
    chunks: list[tuple[int, Encoded]] = []
    for (start, end), tokens in zip(ranges, encoded, strict=True):
        statistics.count_tokens(tokens.ids, tokenizer, config.trained_ids)
        for first, last in cut_chunks(tokens, text[start:end], max_tokens, 0):
            chunks.append((start, tokens.part(first, last)))
    no_prefix = np.zeros(0, np.int64)
    requests = [SearchRequest(np.append(chunk.ids.astype(np.int64), tokenizer.eos_id), 0, no_prefix, 0) for _, chunk in chunks]
    statistics.windows += len(requests)
    statistics.passes += bool(requests)
    limit, batch_tokens = config.max_target_tokens, settings.batch_tokens
    outputs = search.search_all(requests, limit, beams=settings.beams, batch_tokens=batch_tokens)
    edits: list[Edit] = []
    for (start, chunk), hypotheses in zip(chunks, outputs, strict=True):
        edits += _edits_of(filler, text, start, chunk, hypotheses[0])
    return edits


def _edits_of(filler: Filler, text: str, offset: int, chunk: Encoded, written: Hypothesis) -> list[Edit]:
    edits: list[Edit] = []
    ids = written.ids[:-1]
    without_piece = np.append(filler.tokenizer.byte_ids, filler.tokenizer.unk_id)
    for first, last, low, high in Alignment(chunk.ids, ids).replacements():
        if np.isin(chunk.ids[first:last], without_piece).any():
            continue
        start = offset + int(chunk.ends[first - 1] if first else chunk.starts[0] if len(chunk.starts) else 0)
        end = offset + int(chunk.ends[last - 1]) if last > first else start
        before = text[start:end]
        after = _decoded(filler, ids[low:high])
        if _decoded(filler, chunk.ids[first:last]) == after:
            continue
        if before[:1].isspace() and after.startswith(" "):  # keep the kind of white space of the original
            lead = len(before) - len(before.lstrip())
            start, before, after = start + lead, before[lead:], after[1:]
        elif first == 0 and not before[:1].isspace():
            after = after.lstrip(" ")  # the dummy space in front of a text
        start, before, after = _without_common_ends(start, before, after)
        if before != after:
            probability = math.exp(written.log_probabilities[low : high + 1].sum())
            edits.append(Edit(start, start + len(before), before, after, probability))
    return edits


def _decoded(filler: Filler, ids: Sequence[int] | np.ndarray) -> str:
    """Decode ids from the middle of a text, with the space that the first piece carries."""
    if len(ids) == 0:
        return ""
    text = filler.tokenizer.decode(list(map(int, ids)))
    return f" {text.lstrip(' ')}" if filler.pieces[int(ids[0])].startswith(SPACE) else text


def _without_common_ends(start: int, before: str, after: str) -> tuple[int, str, str]:
    head = len(os.path.commonprefix([before, after]))
    tail = len(os.path.commonprefix([before[head:][::-1], after[head:][::-1]]))
    return start + head, before[head : len(before) - tail], after[head : len(after) - tail]
