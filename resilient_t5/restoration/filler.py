"""Fill the gaps of texts with a trained model: windows in passes, batches by length, answers with probabilities.

Only answers are decoded; they are returned with their places, and the caller inserts them into the text. The probability
of an answer is that of its pieces and its end, given the source and the earlier answers in its window, among all answers
that the rules permit.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from resilient_t5 import hub
from resilient_t5.config.sections import DocumentMode, ModelConfig
from resilient_t5.data.tokenizer.sentencepiece import SPACE
from resilient_t5.data.tokenizer.tokenizer import TextTokenizer, check_rows, load_tokenizer
from resilient_t5.errors import ConfigError, DataError
from resilient_t5.model.embeddings import T5Model
from resilient_t5.model.load import load_model
from resilient_t5.restoration.answer_rules import answer_rules
from resilient_t5.restoration.beam_search import BeamSearch, DecodeSettings, SearchRequest
from resilient_t5.restoration.gaps import Gap, OpenDocument, Window, document_ranges, encode_documents, make_windows
from resilient_t5.restoration.restoration_config import RestorationConfig, read_restoration_config

MIN_SOURCE_TOKENS = 8
Candidate = tuple[np.ndarray, float]
"""Full ids of an answer and their probability."""


@dataclass(frozen=True)
class GapPrediction:
    """The answer to one gap, as the text that replaces its mark."""

    gap: Gap
    text: str
    probability: float
    alternatives: tuple[tuple[str, float], ...]
    """Alternative texts and their probabilities, likeliest first."""


@dataclass
class FillStatistics:
    """Counts of one call: windows, passes over the text, and tokens read, some of them outside the trained vocabulary."""

    passes: int = 0
    windows: int = 0
    tokens: int = 0
    unknown: int = 0
    """Characters without a piece."""
    untrained: int = 0
    """Pieces whose embedding rows were not trained."""
    byte_pieces: int = 0
    """Byte pieces: parts of characters without a piece of their own."""

    def count_tokens(self, ids: np.ndarray, tokenizer: TextTokenizer, trained_ids: np.ndarray | None) -> None:
        """Add the tokens `ids`."""
        self.tokens += len(ids)
        self.unknown += int((ids == tokenizer.unk_id).sum())
        self.byte_pieces += int(np.isin(ids, tokenizer.byte_ids).sum())
        self.untrained += 0 if trained_ids is None else int((~np.isin(ids, trained_ids)).sum())


@dataclass(frozen=True, eq=False)
class Filler:
    """A model with its tokenizer and restoration config; create it with `open_filler`."""

    model: T5Model
    tokenizer: TextTokenizer
    config: RestorationConfig

    @cached_property
    def pieces(self) -> list[str]:
        """Piece of every id."""
        return self.tokenizer.pieces()

    @property
    def max_gaps(self) -> int:
        """Maximum gaps in one source, limited by training, tokenizer and output length."""
        return min(self.config.max_sentinels, len(self.tokenizer.sentinel_ids), (self.config.max_target_tokens - 1) // 2)

    def fill(
        self,
        texts: Sequence[tuple[str, Sequence[Gap]]],
        settings: DecodeSettings,
        statistics: FillStatistics | None = None,
    ) -> list[list[GapPrediction]]:
        """Return the predictions for every text, in the order of its gaps.

        Args:
            texts: each with its gaps, in order and disjoint.
            settings: settings of the search.
            statistics: counts are added to it.

        Raises:
            DataError: no piece of the vocabulary fits the encoding.
        """
        statistics, config = statistics or FillStatistics(), self.config
        rules = answer_rules(self.tokenizer, config.trained_ids, self.max_gaps, settings.encoding)
        search = BeamSearch(self.model, rules)
        documents, origins = self._open_documents(texts)
        candidates: dict[int, list[Candidate]] = {}
        while documents:
            windows: list[tuple[OpenDocument, Window]] = []
            for document, encoded in zip(documents, encode_documents(documents, self.tokenizer), strict=True):
                if statistics.passes == 0:
                    statistics.count_tokens(encoded.tokens[encoded.tokens >= 0], self.tokenizer, config.trained_ids)
                own = make_windows(encoded, self.tokenizer, config.max_source_tokens, self.max_gaps)
                windows += [(document, window) for window in own]
            statistics.passes += 1
            statistics.windows += len(windows)
            predictions = predict_gaps(search, [window for _, window in windows], settings, config.max_target_tokens)
            for (document, _), by_gap in zip(windows, predictions, strict=True):
                candidates |= {document.numbers[gap]: found for gap, found in by_gap.items()}
            for document in documents:
                best = {number: candidates[number][0][0] for number in document.numbers if number in candidates}
                document.fill({number: partial(self.answer_text, ids) for number, ids in best.items()})
            documents = [document for document in documents if document.numbers]
        return self._predictions(texts, origins, candidates, settings.alternatives)

    def _open_documents(self, texts: Sequence[tuple[str, Sequence[Gap]]]) -> tuple[list[OpenDocument], list[tuple[int, Gap]]]:
        """Documents that contain gaps, and the text and gap of every gap number."""
        documents: list[OpenDocument] = []
        origins: list[tuple[int, Gap]] = []
        for number, (text, gaps) in enumerate(texts):
            ranges = _joined(document_ranges(text, self.config.document), gaps) if gaps else []
            done = 0
            for start, end in ranges:
                first = done
                while done < len(gaps) and gaps[done].end <= end:
                    done += 1
                if done > first:
                    within = [(gap.start - start, gap.end - start) for gap in gaps[first:done]]
                    documents.append(OpenDocument.of(text[start:end], within, len(origins)))
                    origins += [(number, gap) for gap in gaps[first:done]]
        return documents, origins

    def _predictions(
        self,
        texts: Sequence[tuple[str, Sequence[Gap]]],
        origins: Sequence[tuple[int, Gap]],
        candidates: dict[int, list[Candidate]],
        alternatives: int,
    ) -> list[list[GapPrediction]]:
        predictions: list[list[GapPrediction]] = [[] for _ in texts]
        for number, (origin, gap) in enumerate(origins):
            text, done = texts[origin][0], predictions[origin]
            touches = done and done[-1].gap.end == gap.start
            before = done[-1].text if touches else text[max(0, gap.start - 1) : gap.start]
            after = text[gap.end : gap.end + 1]
            decoded: dict[str, float] = {}
            for ids, probability in candidates[number]:
                decoded.setdefault(self.answer_text(ids, before, after), probability)
            (best, probability), *others = decoded.items()
            done.append(GapPrediction(gap, best, probability, tuple(others[:alternatives])))
        return predictions

    def answer_text(self, ids: np.ndarray, before: str, after: str) -> str:
        """Decode an answer; omit a space at its border next to white space or the end of the text."""
        text = self.tokenizer.decode(ids.tolist())
        if self.pieces[int(ids[0])].startswith(SPACE):
            text = f" {text.lstrip(' ')}"
        text = text.lstrip(" ") if not before or before[-1].isspace() else text
        return text.rstrip(" ") if not after or after.isspace() else text


def _joined(ranges: list[tuple[int, int]], gaps: Sequence[Gap]) -> list[tuple[int, int]]:
    """Merge ranges that a gap spans."""
    joined: list[tuple[int, int]] = []
    starts = [gap.start for gap in gaps]
    for start, end in ranges:
        before = bisect_left(starts, start) - 1
        if joined and before >= 0 and gaps[before].end > start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def predict_gaps(
    search: BeamSearch, windows: Sequence[Window], settings: DecodeSettings, limit_tokens: int
) -> list[dict[int, list[Candidate]]]:
    """Return for each window the answers to its own gaps, by gap.

    The first candidate is the answer in the best output of the window. With `settings.alternatives`, answers to the same
    gap after the same earlier answers follow, likeliest first.
    """
    run = partial(search.search_all, batch_tokens=settings.batch_tokens)
    first_sentinel = search.mark_ids[:1]
    requests = [SearchRequest(window.source, len(window.gaps), first_sentinel, len(window.gaps)) for window in windows]
    outputs = run(requests, limit_tokens, beams=settings.beams)
    predictions: list[dict[int, list[Candidate]]] = []
    searched: list[tuple[list[Candidate], SearchRequest]] = []
    for window, (best, *_) in zip(windows, outputs, strict=True):
        marks = np.flatnonzero(np.isin(best.ids, search.mark_ids)).tolist()
        predictions.append({})
        for k, gap in enumerate(window.gaps):
            if gap not in window.own:
                continue
            start, end = marks[k] + 1, marks[k + 1]
            candidates = [(best.ids[start:end], math.exp(best.log_probabilities[start : end + 1].sum()))]
            predictions[-1][gap] = candidates
            searched.append((candidates, SearchRequest(window.source, len(window.gaps), best.ids[:start], k + 1)))
    if settings.alternatives:
        beams = max(settings.beams, settings.alternatives + 1)
        alternatives = run([request for _, request in searched], limit_tokens, beams=beams)
        for (candidates, request), hypotheses in zip(searched, alternatives, strict=True):
            candidates += [(h.ids[len(request.prefix) : -1], math.exp(h.score)) for h in hypotheses]
    return predictions


def open_filler(
    name: str,
    *,
    device: torch.device | None = None,
    max_source_tokens: int | None = None,
    max_sentinels: int | None = None,
    document: DocumentMode | None = None,
) -> tuple[Filler, bool]:
    """Load a model for filling gaps; also return whether its directory has a restoration config.

    Args:
        name: a model directory, or `hub:NAME` for a model of the Hugging Face hub.
        device: device to compute on; the CPU if None.
        max_source_tokens, max_sentinels, document: override the restoration config.

    Raises:
        ConfigError: a limit is out of range.
        DataError: no T5 or mT5 with its tokenizer.
    """
    on_hub = name.startswith("hub:")
    repository = name.removeprefix("hub:")
    directory = hub.resolve(repository, "model", setting=name) if on_hub else local_directory(name)
    model = load_model(str(directory), ModelConfig())
    tokenizer = load_tokenizer(repository if on_hub else str(directory), setting=name)
    check_tokenizer_fits(tokenizer, model, name)
    stored = read_restoration_config(directory)
    overrides = {"max_source_tokens": max_source_tokens, "max_sentinels": max_sentinels, "document": document}
    overrides = {key: value for key, value in overrides.items() if value is not None}
    config = replace(stored or RestorationConfig(), **overrides)  # type: ignore[arg-type]
    if config.max_source_tokens < MIN_SOURCE_TOKENS or not 1 <= config.max_sentinels <= 100:
        raise ConfigError(
            f"--max_source_tokens: at least {MIN_SOURCE_TOKENS}, --max_sentinels: 1 to 100; "
            f"got {config.max_source_tokens} and {config.max_sentinels}"
        )
    return Filler(model.to(device or torch.device("cpu")).eval(), tokenizer, config), stored is not None  # type: ignore[arg-type]


def check_tokenizer_fits(tokenizer: TextTokenizer, model: T5Model, where: str) -> None:
    """Raise DataError unless the model has a row for every id of the tokenizer, and the same padding and end token."""
    check_rows(tokenizer, model.shared.weight.shape[0], where)
    ids, expected = (tokenizer.eos_id, tokenizer.pad_id), (model.config.eos_token_id, model.config.pad_token_id)
    if ids != expected:
        raise DataError(
            f"the tokenizer has end token {ids[0]} and padding {ids[1]}, the model has {expected[0]} and {expected[1]}",
            where=where,
            hint="Use the tokenizer that belongs to the model",
        )


def local_directory(name: str) -> Path:
    """Return the model directory `name`, or the best export of the run directory `name`.

    Raises:
        DataError: neither exists.
    """
    path = Path(name).expanduser()
    if not path.is_dir():
        raise DataError(
            "no such model directory", where=name, hint="Give a directory, or hub:NAME for a model of the Hugging Face hub"
        )
    if not (path / "config.yaml").is_file() or (path / "config.json").is_file():
        return path
    export = path / "export" / "best"
    if not (export / "config.json").is_file():
        raise DataError("this run has no export yet", where=name, hint=f"Write one with bin/export {name}")
    return export
