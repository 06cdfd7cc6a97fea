"""Fill the gaps of texts with a trained model: windows in passes, batches by length, answers with probabilities.

Nothing of a text is decoded but the answers; they are given with the place they belong to, and whoever writes the text
puts them there. The probability of a fill is that of its pieces and of its end, given the source and the answers
before it in its window, among all answers that the rules allow.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from resilient_t5.config_data import ModelConfig
from resilient_t5.data.tokenizer import SPACE, TextTokenizer, load_tokenizer
from resilient_t5.errors import ConfigError, DataError
from resilient_t5.model.load import load_model
from resilient_t5.model.tables import T5Model
from resilient_t5.model.weights import resolve_directory
from resilient_t5.restoration.answers import answer_rules
from resilient_t5.restoration.asking import Answer, Asking, ask
from resilient_t5.restoration.marks import Gap, document_ranges
from resilient_t5.restoration.search import Searcher
from resilient_t5.restoration.sheet import Sheet, Vocabulary, Window, read_sheets, windows_of
from resilient_t5.restoration.usage import DocumentMode, Usage, read_usage

SHORTEST_SOURCE = 8


@dataclass(frozen=True)
class Fill:
    """The answer to one gap, as the text that takes the place of its mark."""

    gap: Gap
    text: str
    probability: float
    alternatives: tuple[tuple[str, float], ...]
    """Other texts and their probabilities, likeliest first."""


@dataclass
class Tally:
    """What filling took."""

    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    passes: int = 0
    windows: int = 0


@dataclass(frozen=True, eq=False)
class Filler:
    """A model that is ready to be asked; `open_filler` makes one."""

    model: T5Model
    tokenizer: TextTokenizer
    usage: Usage

    @cached_property
    def pieces(self) -> list[str]:
        """Piece of every id."""
        return self.tokenizer.pieces()

    @property
    def sentinels(self) -> int:
        """Most gaps in one source: what was trained, and what an answer can hold."""
        return min(self.usage.max_sentinels, (self.usage.max_target_tokens - 1) // 2)

    def fill(
        self,
        texts: Sequence[tuple[str, Sequence[Gap]]],
        asking: Asking,
        tally: Tally | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[list[Fill]] | None:
        """The fills of every text, in the order of its gaps; None when `should_stop` said so.

        Args:
            texts: each with its gaps, in order and apart.
            asking: how.
            tally: counts are added to it.
            should_stop: asked before every token.

        Raises:
            DataError: nothing of the vocabulary fits the encoding.
        """
        tally = tally or Tally()
        rules = answer_rules(self.tokenizer, self.usage.trained_ids, self.sentinels, asking.encoding)
        searcher = Searcher(self.model, rules)
        sheets, homes = self._sheets(texts, tally)
        answers: dict[int, Answer] = {}
        while open_sheets := [sheet for sheet in sheets if sheet.is_open()]:
            asked = [(sheet, window) for sheet in open_sheets for window in self._windows(sheet)]
            tally.passes += 1
            tally.windows += len(asked)
            found = ask(searcher, [window for _, window in asked], asking, self.usage.max_target_tokens, should_stop)
            if found is None:
                return None
            for (sheet, _), by_place in zip(asked, found, strict=True):
                for place, answer in by_place.items():
                    sheet.answers[place] = answer.best[0]
                    answers[sheet.numbers[place]] = answer
        return self._fills(texts, homes, answers, asking.alternatives)

    def _sheets(self, texts: Sequence[tuple[str, Sequence[Gap]]], tally: Tally) -> tuple[list[Sheet], list[tuple[int, Gap]]]:
        """The documents that hold gaps, and for every gap number the text and gap it means."""
        documents: list[tuple[str, list[Gap], int]] = []
        homes: list[tuple[int, Gap]] = []
        for number, (text, gaps) in enumerate(texts):
            ranges = _joined(document_ranges(text, self.usage.document), gaps) if gaps else []
            done = 0
            for start, end in ranges:
                first = done
                while done < len(gaps) and gaps[done].end <= end:
                    done += 1
                if done > first:
                    within = [Gap(gap.start - start, gap.end - start, gap.mark) for gap in gaps[first:done]]
                    documents.append((text[start:end], within, len(homes)))
                    homes += [(number, gap) for gap in gaps[first:done]]
        return read_sheets(documents, self.tokenizer, self.usage.trained_ids, tally.vocabulary), homes

    def _windows(self, sheet: Sheet) -> list[Window]:
        tokenizer = self.tokenizer
        return windows_of(sheet, tokenizer.sentinel_ids, tokenizer.eos_id, self.usage.max_source_tokens, self.sentinels)

    def _fills(
        self,
        texts: Sequence[tuple[str, Sequence[Gap]]],
        homes: Sequence[tuple[int, Gap]],
        answers: dict[int, Answer],
        alternatives: int,
    ) -> list[list[Fill]]:
        fills: list[list[Fill]] = [[] for _ in texts]
        for number, (home, gap) in enumerate(homes):
            text, done = texts[home][0], fills[home]
            touches = done and done[-1].gap.end == gap.start
            before = done[-1].text if touches else text[max(0, gap.start - 1) : gap.start]
            after = text[gap.end : gap.end + 1]
            spelled: dict[str, float] = {}
            for ids, probability in (answers[number].best, *answers[number].others):
                spelled.setdefault(self.answer_text(ids, before, after), probability)
            (best, probability), *others = spelled.items()
            done.append(Fill(gap, best, probability, tuple(others[:alternatives])))
        return fills

    def answer_text(self, ids: np.ndarray, before: str, after: str) -> str:
        """The text of an answer; a space at its border is left out where white space or nothing stands beside it."""
        text = self.tokenizer.decode(ids.tolist())
        if self.pieces[int(ids[0])].startswith(SPACE):
            text = f" {text.lstrip(' ')}"
        text = text.lstrip(" ") if not before or before[-1].isspace() else text
        return text.rstrip(" ") if not after or after.isspace() else text


def _joined(ranges: list[tuple[int, int]], gaps: Sequence[Gap]) -> list[tuple[int, int]]:
    """The ranges, those that a gap reaches across made one."""
    joined: list[tuple[int, int]] = []
    starts = [gap.start for gap in gaps]
    for start, end in ranges:
        before = bisect_left(starts, start) - 1
        if joined and before >= 0 and gaps[before].end > start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def open_filler(
    name: str,
    *,
    device: torch.device | None = None,
    max_source_tokens: int | None = None,
    max_sentinels: int | None = None,
    document: DocumentMode | None = None,
) -> tuple[Filler, bool]:
    """Load a model to fill gaps with, and whether its directory says how it was trained.

    Args:
        name: a directory with a model, or `hub:NAME` for one of the hub.
        device: where it computes; the CPU when None.
        max_source_tokens, max_sentinels, document: replace what the directory says.

    Raises:
        ConfigError: a limit out of range.
        DataError: no T5 or mT5 with its tokenizer.
    """
    hub = name.startswith("hub:")
    directory = resolve_directory(name.removeprefix("hub:")) if hub else local_directory(name)
    model = load_model(str(directory), ModelConfig())
    tokenizer = load_tokenizer(name.removeprefix("hub:") if hub else str(directory))
    rows, config = model.shared.weight.shape[0], model.config
    if tokenizer.size > rows or (config.eos_token_id, config.pad_token_id) != (tokenizer.eos_id, tokenizer.pad_id):
        raise DataError(
            f"the tokenizer ({tokenizer.size} ids, end mark {tokenizer.eos_id}) is not that of the model "
            f"({rows} rows, end mark {config.eos_token_id})",
            where=name,
            mend="Put the model's own tokenizer beside it",
        )
    found = read_usage(directory)
    usage = found or Usage()
    changes = {"max_source_tokens": max_source_tokens, "max_sentinels": max_sentinels, "document": document}
    usage = replace(usage, **{key: value for key, value in changes.items() if value is not None})  # type: ignore[arg-type]
    if usage.max_source_tokens < SHORTEST_SOURCE or not 1 <= usage.max_sentinels <= 100:
        raise ConfigError(
            f"--max_source_tokens: at least {SHORTEST_SOURCE}, --max_sentinels: 1 to 100; "
            f"got {usage.max_source_tokens} and {usage.max_sentinels}"
        )
    return Filler(model.to(device or torch.device("cpu")).eval(), tokenizer, usage), found is not None  # type: ignore[arg-type]


def local_directory(name: str) -> Path:
    """The model directory that `name` means; of a run directory its best export.

    Raises:
        DataError: it is none.
    """
    path = Path(name).expanduser()
    if not path.is_dir():
        raise DataError(
            "no such model directory", where=name, mend="Give a directory, or hub:NAME for a model of the Hugging Face hub"
        )
    if not (path / "config.yaml").is_file() or (path / "config.json").is_file():
        return path
    export = path / "export" / "best"
    if not (export / "config.json").is_file():
        raise DataError("this run has no export yet", where=name, mend=f"Write one with bin/export {name}")
    return export
