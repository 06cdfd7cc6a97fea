"""The built-in corpus `builtin:clinical`: synthetic clinical notes in Chinese and English.

A note is about one disease, and the disease settles every other term of it: two symptoms, an examination and its
finding, a drug, its dose and its course. Each term stands once, so a masked term cannot be copied from elsewhere in
the note; and the sentences, their order and the fillers are drawn apart from the disease, so that the words around a
gap tell which kind of term is missing and never which one. A model restores it from the other terms or not at all.

Note i is a function of (seed, i) alone, drawn from Philox's raw words, which no release of numpy may change.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from resilient_t5.data.sample_facts import FACTS, PART_ORDERS, TEMPLATES, Language

Choice = TypeVar("Choice")
_WORD = 1 << 64
_DRAWS = 12  # more than a note takes
_YOUNGEST, _OLDEST = 18, 89


@dataclass(frozen=True)
class Note:
    """One synthetic clinical note."""

    text: str
    """The note, one line."""
    language: Language
    """`zh` at even positions, `en` at odd ones: equal shares at every even count."""
    facts: tuple[str, ...]
    """Its terms: disease, complaint, sign, examination, finding, drug, dose, course; each stands once in `text`."""


def generate_notes(count: int, seed: int) -> Iterator[Note]:
    """Notes 0 to `count` - 1 of a seed, in order; a longer corpus begins with the shorter one.

    Args:
        count: notes to generate; none when 0.
        seed: any integer; taken modulo 2**64.

    Raises:
        ValueError: `count` is negative.
    """
    if count < 0:
        raise ValueError(f"count is {count}; it must not be negative")
    return (_note(seed, index) for index in range(count))


def clinical_terms() -> list[str]:
    """Every term that a note can state, without repetition, in a fixed order: Chinese first, disease by disease."""
    return list(dict.fromkeys(term for rows in FACTS.values() for facts in rows for term in facts))


def _note(seed: int, index: int) -> Note:
    key = np.array([seed % _WORD, index], dtype=np.uint64)
    draws = iter(np.random.Philox(key=key).random_raw(_DRAWS).tolist())

    def pick(choices: Sequence[Choice]) -> Choice:  # the bias of a modulo is below 1e-17 here
        return choices[next(draws) % len(choices)]

    language: Language = "zh" if index % 2 == 0 else "en"
    templates = TEMPLATES[language]
    facts = pick(FACTS[language])
    parts = [getattr(templates, part) for part in pick(PART_ORDERS)]
    if next(draws) % 2 == 0:
        parts.append(templates.remark)
    fillers = {"age": _YOUNGEST + next(draws) % (_OLDEST - _YOUNGEST + 1), "sex": pick(templates.sex)}
    fillers["since"] = pick(templates.since)
    sentences = [pick(ways).format(**facts._asdict(), **fillers) for ways in parts]
    return Note(("" if language == "zh" else " ").join(sentences), language, tuple(facts))
