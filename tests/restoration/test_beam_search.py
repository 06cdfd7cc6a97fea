"""The constrained search: against full enumeration, against the library's beam search, and its own rules.

Run: python -m pytest tests/restoration/test_beam_search.py
"""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from resilient_t5.restoration.answer_rules import BEGUN, SEEN, answer_rules
from resilient_t5.restoration.beam_search import BeamSearch, SearchRequest
from tests.restoration.test_decoder import KINDS, build

pytestmark = pytest.mark.slow

PAD, EOS, UNKNOWN = 0, 1, 2
# One to four bytes, some that no well-formed character begins with; a control character; look-alikes of special names.
BYTES = [0x0A, 0x20, 0x41, 0x80, 0x8F, 0x90, 0xA0, 0xBF, 0xC0, 0xC2, 0xC3, 0xE0, 0xE4, 0xED, 0xF0, 0xF1, 0xF4, 0xF5]
TEXTS = ["\u2581", "\u2581\u2581", "a", "\u2581b", "\u80be", "\u2581\u809d", "caf\u00e9", "\n", "x\ty"]
PIECES = ["<pad>", "</s>", "<unk>", *(f"<0x{value:02X}>" for value in BYTES), *TEXTS]
SENTINELS = np.arange(63, 53, -1)


def vocabulary(pieces=PIECES, size=64, sentinels=SENTINELS):
    """The attributes of a tokenizer that the rules read, over the given pieces."""
    texts = [*pieces, *(f"w{k}" for k in range(len(pieces), size - len(sentinels)))]
    texts += [f"<extra_id_{k}>" for k in reversed(range(len(sentinels)))]
    special = np.array([PAD, EOS, UNKNOWN, *sentinels.tolist()])
    return SimpleNamespace(pieces=lambda: texts, sentinel_ids=sentinels, eos_id=EOS, special_ids=special)


def search_with(kind="mt5_untied", seed=0, trained=None, encoding="utf-8", sentinels=10, sharpness=6.0):
    return BeamSearch(build(kind, seed, sharpness), answer_rules(vocabulary(), trained, sentinels, encoding))


def request(source, gaps):
    return SearchRequest(np.array([*source, EOS]), gaps, SENTINELS[: min(gaps, 1)], stop_after=gaps)


def sources(count, seed=0):
    draws = np.random.default_rng(seed)
    return [draws.integers(3, 54, draws.integers(1, 20)).tolist() for _ in range(count)]


# A reference that shares nothing with the automaton: what may follow a row, in plain Python.


def allowed_after(row, gaps, limit, pieces):
    """The ids that may follow `row` (without the start token) so that an output for `gaps` gaps fits in `limit` tokens."""
    marks = [*SENTINELS[:gaps].tolist(), EOS]
    opened = sum(token in marks for token in row)
    if opened == 0:
        return marks[:1]
    answer = row[max(i for i, token in enumerate(row) if token in marks) + 1 :]
    room = limit - len(row) - 1 - 2 * (gaps - opened) - 1
    costs = {number: needed([*answer, number], pieces) for number in range(3, 54)}
    found = [number for number, cost in costs.items() if cost is not None and cost <= room]
    return [*found, marks[opened]] if needed(answer, pieces) == 0 else found


def spelling(answer, pieces):
    """The bytes of an answer."""
    out = b""
    for number in answer:
        piece = pieces[number]
        if piece.startswith("<0x"):
            out += bytes([int(piece[3:5], 16)])
        else:
            out += piece.replace("\u2581", " ").encode()
    return out


def needed(answer, pieces):
    """Pieces that must follow before an answer may end; None when none can make it right."""
    raw = spelling(answer, pieces)
    tails = [b"", b"\xa0", b"\x80", b"\x90", b"\xa0\x80", b"\x80\x80", b"\x90\x80", b"\x90\x80\x80", b"\x80\x80\x80"]
    for tail in tails:
        try:
            text = (raw + tail).decode()
        except UnicodeDecodeError:
            continue
        if any(ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0 for c in text):
            continue
        if text.strip(" "):
            return len(tail)
        # Only spaces so far: one more piece is needed, and not another space.
        return 1 if len(answer) < 2 else None
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_a_wide_beam_finds_what_full_enumeration_finds_with_its_probabilities(kind):
    """Every output for two gaps within six tokens, by plain forward passes: the same ranking and probabilities."""
    words = ["<pad>", "</s>", "<unk>", "a", "\u2581", "\u2581b", "w", "w"]
    small, limit = np.array([9, 8]), 6
    rules = answer_rules(vocabulary(words, 10, small), np.array([3, 4, 5]), 2)
    model = build(kind, 3)
    source = np.array([5, 9, 3, 8, EOS])
    found = BeamSearch(model, rules).search([SearchRequest(source, 2, small[:1], 2)], limit, beams=60)[0]
    wanted = {}
    for length in range(5, limit + 1):
        for row in itertools.product([1, 3, 4, 5, 8, 9], repeat=length):
            probability = enumerated(model, source, list(row), limit)
            if probability is not None:
                wanted[row] = probability
    ranked = sorted(wanted, key=wanted.get, reverse=True)
    assert len(ranked) == len(found) >= 8
    assert [tuple(hypothesis.ids.tolist()) for hypothesis in found] == ranked
    np.testing.assert_allclose([math.exp(hypothesis.score) for hypothesis in found], [wanted[row] for row in ranked], rtol=1e-4)
    assert sum(wanted.values()) == pytest.approx(1.0, abs=1e-5)


def enumerated(model, source, row, limit):
    """Probability of a whole row among the allowed ones by plain forward passes; None when it is not allowed."""
    texts = {3: "a", 4: " ", 5: " b"}
    opened, answer, chosen = 0, "", []
    for position, token in enumerate(row):
        left = limit - position - 1
        options = []
        for number, text in texts.items():
            blank = (answer + text).isspace()
            if opened and not (blank and answer) and int(blank) + 2 * (2 - opened) + 1 <= left:
                options.append(number)
        mark = [9, 8, 1][opened]
        if opened == 0 or answer.strip():
            options.append(mark)
        if token not in options or (token == 1 and position < len(row) - 1):
            return None
        chosen.append((position, options, options.index(token)))
        opened, answer = (opened + 1, "") if token == mark else (opened, answer + texts[token])
    if row[-1] != 1:
        return None
    logits = forward(model, source, row)
    return math.exp(sum(float(logits[at, options].log_softmax(-1)[place]) for at, options, place in chosen[1:]))


def forward(model, source, row):
    """Logits of every token of a row given the ones before it."""
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(source)[None], decoder_input_ids=torch.tensor([[PAD, *row[:-1]]])).logits[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beams", [1, 2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_search_equals_the_librarys_with_the_same_rules(kind, beams, seed):
    """Greedy and beam search of transformers with a prefix function give the same ids and sums, row by row.

    With as many sentinels as gaps: transformers does not let a further sentinel end an answer.
    """
    pieces, limit, pairs = vocabulary().pieces(), 18, []
    for gaps in (1, 2, 3):
        search = search_with(kind, seed, sentinels=gaps)
        asked = [request(source, gaps) for source in sources(5, seed)[gaps - 1 :: 3]]
        pairs += zip(asked, search.search(asked, limit, beams=beams), strict=True)
    for one, found in pairs:
        theirs = search.model.generate(
            torch.from_numpy(one.source)[None], max_new_tokens=limit, num_beams=beams, num_return_sequences=beams,
            do_sample=False, length_penalty=0.0, early_stopping="never", renormalize_logits=True,
            prefix_allowed_tokens_fn=lambda _, row, n=one.gaps: allowed_after(row.tolist()[1:], n, limit, pieces),
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        rows = [row.tolist()[1 : row.tolist().index(EOS) + 1] for row in theirs.sequences]
        assert [hypothesis.ids.tolist() for hypothesis in found] == rows
        if beams > 1:
            np.testing.assert_allclose([h.score for h in found], theirs.sequences_scores.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("limit", [21, 24, 60])
def test_every_gap_gets_its_sentinel_in_order_and_an_answer_that_can_be_read(kind, beams, limit):
    """Well formed, in order, each answer visible UTF-8 without control characters, for every limit."""
    search, pieces = search_with(kind), vocabulary().pieces()
    asked = [request(source, number) for number, source in enumerate(sources(11))][1:]
    for one, found in zip(asked, search.search(asked, limit, beams=beams), strict=True):
        for hypothesis in found:
            ids = hypothesis.ids.tolist()
            assert [token for token in ids if token in (EOS, *SENTINELS)] == [*SENTINELS[: one.gaps].tolist(), EOS]
            assert ids[-1] == EOS and len(ids) <= limit
            assert (hypothesis.log_probabilities <= 0).all()
            marks = np.flatnonzero(np.isin(hypothesis.ids, search.mark_ids)).tolist()
            for start, end in zip(marks[:-1], marks[1:], strict=True):
                text = spelling(ids[start + 1 : end], pieces).decode()
                assert text.strip() and not any(ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0 for c in text)


def test_a_question_in_a_batch_equals_the_question_alone():
    """Neighbours, padding, and sources that leave the batch change no token and no probability beyond rounding."""
    search = search_with()
    asked = [request(source, 1 + number % 4) for number, source in enumerate(sources(12))]
    together = search.search(asked, 25, beams=3)
    for one, found in zip(asked, together, strict=True):
        alone = search.search([one], 25, beams=3)[0]
        assert [h.ids.tolist() for h in found] == [h.ids.tolist() for h in alone]
        np.testing.assert_allclose([h.score for h in found], [h.score for h in alone], rtol=1e-4)


def test_answers_after_a_prefix_are_those_of_full_enumeration_there():
    """`--alternatives`: the answers of the second gap, the first one fixed, ranked as plain forward passes rank them.

    It is the last gap, so the probability of every further sentinel counts with that of the end mark.
    """
    search, limit = search_with(trained=np.array([23, 24, 25])), 8
    source = np.array([30, SENTINELS[0], 31, SENTINELS[1], EOS])
    prefix = np.array([SENTINELS[0], 24, 25, SENTINELS[1]])
    found = search.search([SearchRequest(source, 2, prefix, 2)], limit, beams=50)[0]
    assert all(hypothesis.ids[:4].tolist() == prefix.tolist() for hypothesis in found)
    pieces = vocabulary().pieces()
    wanted = {}
    for length in range(1, 4):
        for answer in itertools.product([23, 24, 25], repeat=length):
            row, total = [*prefix.tolist(), *answer, EOS], 0.0
            logits = forward(search.model, source, row)
            further = [int(number) for number in search.mark_ids if number not in SENTINELS[:2]]
            logits[:, EOS] = logits[:, further].logsumexp(1)
            for position in range(4, len(row)):
                options = allowed_after(row[:position], 2, limit, pieces)
                options = [number for number in options if number in (23, 24, 25, EOS)]
                chosen = options.index(row[position])
                total += float(logits[position, options].log_softmax(-1)[chosen])
            wanted[answer] = total
    ranked = sorted(wanted, key=wanted.get, reverse=True)
    assert [tuple(hypothesis.ids[4:-1].tolist()) for hypothesis in found] == ranked
    np.testing.assert_allclose([hypothesis.score for hypothesis in found], [wanted[row] for row in ranked], rtol=1e-3)


def test_only_trained_ids_and_what_the_encoding_holds_are_written():
    """An answer holds no other id; in latin-1 no Chinese piece and no byte piece."""
    trained = np.array([5, 20, 23, 24, 25, 27, 40, 41])
    for encoding, barred in (("utf-8", set()), ("latin-1", {5, 20, 25})):
        search = search_with(trained=trained, encoding=encoding)
        allowed = set(trained.tolist()) - barred | {EOS, *SENTINELS.tolist()}
        assert set(search.rules.output_ids.tolist()) <= allowed
        found = search.search([request(source, 3) for source in sources(6)], 30, beams=2)
        assert {token for hypotheses in found for h in hypotheses for token in h.ids.tolist()} <= allowed


def test_a_whole_text_is_one_answer_without_a_sentinel():
    """`correct`: no sentinel, at least one visible piece, an end mark."""
    search = search_with()
    asked = [SearchRequest(np.array([*source, EOS]), 0, np.zeros(0, np.int64), 0) for source in sources(5)]
    for found in search.search(asked, 12, beams=2):
        for hypothesis in found:
            assert not set(hypothesis.ids.tolist()) & set(SENTINELS.tolist())
            assert hypothesis.ids[-1] == EOS and 2 <= len(hypothesis.ids) <= 12


def test_a_limit_that_is_too_short_is_refused_and_the_mode_of_the_model_is_restored():
    """Three gaps need seven tokens; a search leaves the model in training mode if it was."""
    search = search_with()
    with pytest.raises(ValueError, match="gaps"):
        search.search([request([5], 3)], 6, beams=1)
    search.model.train()
    search.search([request([5], 3)], 20, beams=1)
    assert search.model.training


def test_the_rules_allow_what_the_reference_allows_along_random_walks():
    """At every position of two hundred random outputs, with short and long limits, the same ids may follow."""
    rules, pieces, draws = search_with().rules, vocabulary().pieces(), np.random.default_rng(0)
    for _ in range(200):
        gaps = int(draws.integers(1, 4))
        limit = int(draws.integers(2 * gaps + 1, 22))
        row, state, opened = [int(SENTINELS[0])], BEGUN, 1
        marks = [*SENTINELS[:gaps].tolist(), EOS]
        while row[-1] != EOS:
            slack = limit - len(row) - 2 - 2 * (gaps - opened)
            allowed = set(rules.output_ids[rules.cost_NA[state] <= min(slack, 126)].tolist())
            allowed |= {marks[opened]} if state == SEEN else set()
            assert allowed == set(allowed_after(row, gaps, limit, pieces)), row
            row.append(int(draws.choice(sorted(allowed))))
            state = BEGUN if row[-1] == marks[opened] else int(rules.next_state_NA[state, rules.output_ids == row[-1]][0])
            opened += row[-1] == marks[opened]
