"""The built-in corpus of synthetic clinical notes. Run: python -m pytest tests/data/corpus/test_sample.py"""

import re
from collections import Counter, defaultdict

import pytest

from resilient_t5.data.corpus.sample import clinical_terms, generate_notes
from resilient_t5.data.terms import TermMatcher

SLOTS = ("disease", "complaint", "sign", "examination", "finding", "drug", "dose", "course")
NOTES = list(generate_notes(2000, seed=1))


def test_notes_are_a_function_of_seed_and_number():
    """The same seed gives the same notes, a longer corpus begins with the shorter one, another seed gives others."""
    assert list(generate_notes(2000, seed=1)) == NOTES
    assert list(generate_notes(50, seed=1)) == NOTES[:50]
    others = list(generate_notes(2000, seed=2))
    assert sum(a.text == b.text for a, b in zip(NOTES, others, strict=True)) < 20


def test_both_languages_have_equal_shares():
    """Half of the notes are Chinese, half English."""
    assert Counter(note.language for note in NOTES) == {"zh": 1000, "en": 1000}


def test_the_term_matcher_finds_exactly_the_facts_of_a_note():
    """Every fact occurs once in its note, and no template or filler contains a term."""
    matcher = TermMatcher(clinical_terms())
    for note in NOTES:
        found = [matcher.terms[term] for _, _, term in matcher.find(note.text)]
        assert sorted(found) == sorted(note.facts), note.text


def test_the_disease_determines_every_other_fact():
    """So the other terms determine a masked one."""
    for slot in range(1, len(SLOTS)):
        values = defaultdict(set)
        for note in NOTES:
            values[note.language, note.facts[0]].add(note.facts[slot])
        assert {len(found) for found in values.values()} == {1}, SLOTS[slot]


@pytest.mark.parametrize("slot", [name for name in SLOTS if name not in ("dose", "course")])
def test_each_telling_fact_names_its_disease(slot):
    """Symptoms, examination, finding and drug belong to one disease only."""
    diseases = defaultdict(set)
    for note in NOTES:
        diseases[note.language, note.facts[SLOTS.index(slot)]].add(note.facts[0])
    assert {len(found) for found in diseases.values()} == {1}


def test_a_guess_from_the_template_alone_is_rarely_right():
    """The most frequent term of any slot is far from frequent, so the words around a gap do not give it away."""
    for language in ("zh", "en"):
        for slot in range(len(SLOTS)):
            counts = Counter(note.facts[slot] for note in NOTES if note.language == language)
            assert counts.most_common(1)[0][1] / 1000 < 0.2, SLOTS[slot]


def gaps(notes):
    """Of every fact: the language, the two words or marks on either side of it, and the fact."""
    matcher = TermMatcher(clinical_terms())
    for note in notes:
        for start, end, term in matcher.find(note.text):
            left = re.findall(r"\w+|[^\w\s]", note.text[:start])[-2:]
            right = re.findall(r"\w+|[^\w\s]", note.text[end:])[:2]
            yield (note.language, *left, "#", *right), matcher.terms[term]


def test_the_neighbours_of_a_gap_give_it_away_as_rarely():
    """The most frequent term between the same two words or marks on either side is right in at most 15 % of new notes."""
    seen = defaultdict(Counter)
    for neighbours, term in gaps(NOTES):
        seen[neighbours][term] += 1
    guesses = [
        bool(seen[neighbours]) and seen[neighbours].most_common(1)[0][0] == term
        for neighbours, term in gaps(generate_notes(500, seed=2))
    ]
    assert 0.0 < sum(guesses) / len(guesses) <= 0.15


def test_two_words_or_marks_stand_between_terms():
    """So the neighbours of a gap are never part of another term."""
    matcher = TermMatcher(clinical_terms())
    for note in NOTES:
        found = matcher.find(note.text)
        for (_, end, _), (start, _, _) in zip(found, found[1:], strict=False):
            assert len(re.findall(r"\w+|[^\w\s]", note.text[end:start])) >= 2, note.text


def test_every_slot_is_followed_by_different_marks():
    """SentencePiece makes a piece only of what has more than one continuation: a term that has one is cut up."""
    matcher = TermMatcher(clinical_terms())
    marks = defaultdict(set)
    for note in NOTES:
        slots = dict(zip(note.facts, SLOTS, strict=True))
        for _, end, term in matcher.find(note.text):
            marks[note.language, slots[matcher.terms[term]]].add(note.text[end])
    assert len(marks) == 2 * len(SLOTS)
    assert all(len(found) > 1 and not any(map(str.isalnum, found)) for found in marks.values()), marks


def test_every_disease_is_told_in_the_same_ways():
    """How a note begins, its facts taken out, is independent of the disease: the common openings occur with each of them."""
    openings = defaultdict(set)
    for note in generate_notes(6000, seed=3):
        text = note.text
        for fact in note.facts:
            text = text.replace(fact, "#")
        openings[note.language, note.facts[0]].add(text[:2])
    for language in ("zh", "en"):
        found = [ways for (of, _), ways in openings.items() if of == language]
        assert len(set.intersection(*found)) >= len(set.union(*found)) / 2


def test_notes_are_short_and_on_one_line():
    """A note fits into a small model's context, and a document is a line."""
    for note in NOTES:
        assert "\n" not in note.text
        assert 30 <= len(note.text) <= 400
