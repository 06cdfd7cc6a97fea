"""Fill the gaps of texts with a trained model: windows in passes, batches by length, answers with probabilities.

Nothing of a text is decoded but the answers; they are given with the place they belong to, and whoever writes the text
puts them there. The probability of a fill is that of its pieces and of its end, given the source and the answers
before it in its window, among all answers that the rules allow.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from resilient_t5 import hub
from resilient_t5.config.data import ModelConfig
from resilient_t5.data.tokenizer.tokenizer import SPACE, TextTokenizer, check_rows, load_tokenizer
from resilient_t5.errors import ConfigError, DataError
from resilient_t5.model.embeddings import T5Model
from resilient_t5.model.load import load_model
from resilient_t5.restoration.answer_rules import answer_rules
from resilient_t5.restoration.decode import Answer, DecodeSettings, Searcher, ask
from resilient_t5.restoration.gaps import Gap, document_ranges
from resilient_t5.restoration.restoration_config import DocumentMode, Usage, read_usage
from resilient_t5.restoration.sheet import Draft, GapDocument, Vocabulary, Window, make_draft, read_sheets, windows_of

MIN_SOURCE = 8


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
        return min(self.usage.max_sentinels, len(self.tokenizer.sentinel_ids), (self.usage.max_target_tokens - 1) // 2)

    def fill(
        self,
        texts: Sequence[tuple[str, Sequence[Gap]]],
        asking: DecodeSettings,
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
        drafts, homes = self._drafts(texts)
        answers: dict[int, Answer] = {}
        while drafts:
            counted = tally.vocabulary if tally.passes == 0 else None
            sheets = read_sheets(drafts, self.tokenizer, self.usage.trained_ids, counted)
            asked = [(draft, window) for draft, sheet in zip(drafts, sheets, strict=True) for window in self._windows(sheet)]
            tally.passes += 1
            tally.windows += len(asked)
            found = ask(searcher, [window for _, window in asked], asking, self.usage.max_target_tokens, should_stop)
            if found is None:
                return None
            for (draft, _), by_place in zip(asked, found, strict=True):
                answers |= {draft.numbers[place]: answer for place, answer in by_place.items()}
            for draft in drafts:
                settled = {number: answers[number].best[0] for number in draft.numbers if number in answers}
                draft.settle({number: partial(self.answer_text, ids) for number, ids in settled.items()})
            drafts = [draft for draft in drafts if draft.numbers]
        return self._fills(texts, homes, answers, asking.alternatives)

    def _drafts(self, texts: Sequence[tuple[str, Sequence[Gap]]]) -> tuple[list[Draft], list[tuple[int, Gap]]]:
        """The documents that hold gaps, and for every gap number the text and gap it means."""
        drafts: list[Draft] = []
        homes: list[tuple[int, Gap]] = []
        for number, (text, gaps) in enumerate(texts):
            ranges = _joined(document_ranges(text, self.usage.document), gaps) if gaps else []
            done = 0
            for start, end in ranges:
                first = done
                while done < len(gaps) and gaps[done].end <= end:
                    done += 1
                if done > first:
                    within = [(gap.start - start, gap.end - start) for gap in gaps[first:done]]
                    drafts.append(make_draft(text[start:end], within, len(homes)))
                    homes += [(number, gap) for gap in gaps[first:done]]
        return drafts, homes

    def _windows(self, sheet: GapDocument) -> list[Window]:
        return windows_of(sheet, self.tokenizer, self.usage.max_source_tokens, self.sentinels)

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
    on_hub = name.startswith("hub:")
    wanted = name.removeprefix("hub:")
    directory = hub.resolve(wanted, "model", setting=name) if on_hub else local_directory(name)
    model = load_model(str(directory), ModelConfig())
    tokenizer = load_tokenizer(wanted if on_hub else str(directory), setting=name)
    check_tokenizer_fits(tokenizer, model, name)
    found = read_usage(directory)
    usage = found or Usage()
    changes = {"max_source_tokens": max_source_tokens, "max_sentinels": max_sentinels, "document": document}
    usage = replace(usage, **{key: value for key, value in changes.items() if value is not None})  # type: ignore[arg-type]
    if usage.max_source_tokens < MIN_SOURCE or not 1 <= usage.max_sentinels <= 100:
        raise ConfigError(
            f"--max_source_tokens: at least {MIN_SOURCE}, --max_sentinels: 1 to 100; "
            f"got {usage.max_source_tokens} and {usage.max_sentinels}"
        )
    return Filler(model.to(device or torch.device("cpu")).eval(), tokenizer, usage), found is not None  # type: ignore[arg-type]


def check_tokenizer_fits(tokenizer: TextTokenizer, model: T5Model, where: str) -> None:
    """Raise DataError unless the model has a row for every id of the tokenizer, and the same padding and end mark."""
    check_rows(tokenizer, model.shared.weight.shape[0], where)
    ids, wanted = (tokenizer.eos_id, tokenizer.pad_id), (model.config.eos_token_id, model.config.pad_token_id)
    if ids != wanted:
        raise DataError(
            f"the tokenizer has end mark {ids[0]} and padding {ids[1]}, the model has {wanted[0]} and {wanted[1]}",
            where=where,
            hint="Put the model's own tokenizer beside it",
        )


def local_directory(name: str) -> Path:
    """The model directory that `name` means; of a run directory its best export.

    Raises:
        DataError: it is none.
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
