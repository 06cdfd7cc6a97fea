"""Characters that the tokenizer has no piece for: counted, reported, warned of, and refused where they are too many.

The share is that of characters, not of tokens: neighbouring unknown characters become one `<unk>`, so the share of tokens
does not tell how much of the text is lost. White space is left out on both sides.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from resilient_t5.data.tokenizer import EncodedBatch
from resilient_t5.errors import DataError

SHARE = "unknown_character_share"
MOST_FREQUENT = "unknown_characters"
LISTED = 10
WORTH_SHOWING = 1e-4
WORTH_A_WARNING = 0.01
MARK = re.compile(r"<extra_id_\d+>")


def visible_characters(texts: Sequence[str]) -> int:
    """Characters that are not white space."""
    return sum(len("".join(text.split())) for text in texts)


def unknown_characters(texts: Sequence[str], batch: EncodedBatch, unk_id: int) -> Counter[str]:
    """The characters that unknown tokens stand for, with how often each does.

    Args:
        texts: the texts of the batch.
        batch: their tokens.
        unk_id: id of the unknown token.
    """
    tokens = batch.tokens
    unknown = np.flatnonzero(tokens.ids == unk_id)
    owners = np.searchsorted(batch.offsets, unknown, side="right") - 1
    spans = zip(owners.tolist(), tokens.starts[unknown].tolist(), tokens.ends[unknown].tolist(), strict=True)
    found = Counter("".join(texts[owner][start:end] for owner, start, end in spans))
    return Counter({character: count for character, count in found.items() if not character.isspace()})


def segments_between_marks(text: str) -> list[str]:
    """The parts of a text masked elsewhere that are text: what stands between its `<extra_id_k>`."""
    return MARK.split(text)


def unknown_figures(unknown: Mapping[str, int], visible: int) -> dict[str, Any]:
    """What `report.json` says of unknown characters: their share of `visible` characters and the most frequent ones."""
    order = sorted(unknown.items(), key=lambda item: (-item[1], item[0]))
    return {SHARE: sum(unknown.values()) / max(visible, 1), MOST_FREQUENT: dict(order[:LISTED])}


def most_frequent(report: Mapping[str, Any]) -> str:
    """The most frequent unknown characters with their counts; one that cannot be seen as its code point."""
    return ", ".join(f"{_shown(character)} {count:,}" for character, count in report[MOST_FREQUENT].items())


def unknown_warning(report: Mapping[str, Any]) -> str | None:
    """A warning where more than 1 % of the characters have no piece; None otherwise and for a report without the figure."""
    share = report.get(SHARE, 0.0)
    if share <= WORTH_A_WARNING:
        return None
    return (
        f"{percent(share)} of the corpus' characters have no piece in this tokenizer, so the model can neither read nor write"
        f" them (most frequent: {most_frequent(report)}); take a model with a tokenizer for this script, such as mT5, or train"
        " a tokenizer for a model from scratch (tokenizer.train_vocab_size)"
    )


def check_unknown(report: Mapping[str, Any], max_share: float, where: str) -> None:
    """Refuse a corpus with too many unknown characters; a report without the figure, of an older version, passes.

    Args:
        report: the content of `report.json`, or its figures from `unknown_figures`.
        max_share: the largest share that may have no piece (`tokenizer.max_unknown_share`).
        where: the corpus or store, for the message.

    Raises:
        DataError: the share is above `max_share`.
    """
    share = report.get(SHARE, 0.0)
    if share <= max_share:
        return
    raise DataError(
        f"{percent(share)} of the corpus' characters have no piece in this tokenizer, which is above"
        f" tokenizer.max_unknown_share {max_share:g}; most frequent: {most_frequent(report)}",
        where=where,
        mend="Take a model with a tokenizer for this script, such as mT5, train a tokenizer for a model from scratch"
        " (tokenizer.train_vocab_size), or raise tokenizer.max_unknown_share.",
    )


def percent(share: float) -> str:
    """A share in per cent, with three digits."""
    return f"{100 * share:.3g} %"


def _shown(character: str) -> str:
    # A combining mark would be drawn on what stands before it.
    seen = character.isprintable() and not unicodedata.category(character).startswith("M")
    return character if seen else f"U+{ord(character):04X}"
