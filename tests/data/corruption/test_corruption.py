"""Corruption of chunks: masks, sources, targets. Run: python -m pytest tests/data/corruption/test_corruption.py"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilient_t5.config.schema import CorruptionConfig, DataConfig
from resilient_t5.data.corruption import corruption
from resilient_t5.data.corruption.corruption import Corrupted, corrupt
from resilient_t5.errors import ConfigError, DataError
from tests.data.fake_split import (
    FIRST_BYTE,
    FIRST_MARK,
    FIRST_WORD,
    FakeSplit,
    fake_table,
    log_normal_lengths,
    random_split,
    split_of,
)

TABLE = fake_table()
SENTINEL = {int(token): k for k, token in enumerate(TABLE.sentinel_ids)}
UNKNOWN, COMMA, WORD = 2, FIRST_MARK, FIRST_WORD


def damage(split: FakeSplit, *, seed: int = 1, epoch: int = 0, data: DataConfig | None = None, **settings_) -> Corrupted:
    """All examples of a split, without noise unless it is asked for."""
    chosen = CorruptionConfig(**{"noise_ratio": 0.0, **settings_})
    ids = np.arange(len(split))
    data = data or DataConfig()
    return corrupt(split, ids, np.full(len(ids), epoch), seed=seed, settings=chosen, data=data, table=TABLE)


def row_of(corrupted: Corrupted, row: int) -> tuple[list[int], list[int]]:
    """Source and target of a row."""
    source = corrupted.source[corrupted.source_offsets[row] : corrupted.source_offsets[row + 1]]
    target = corrupted.target[corrupted.target_offsets[row] : corrupted.target_offsets[row + 1]]
    return source.tolist(), target.tolist()


def spans_of(corrupted: Corrupted, row: int) -> list[tuple[int, int]]:
    """Start and end of the spans of a row."""
    return [(start, end) for of, _, start, end in corrupted.spans.tolist() if of == row]


def stitched(source: list[int], target: list[int]) -> list[int]:
    """The chunk, from nothing but source and target: every sentinel replaced by what follows it in the target."""
    answers: dict[int, list[int]] = {}
    for token in target[:-1]:
        if token in SENTINEL:
            answers[token] = []
            last = token
        else:
            answers[last].append(token)
    return [one for token in source[:-1] for one in (answers[token] if token in SENTINEL else [token])]


def masked_share(corrupted: Corrupted, split: FakeSplit) -> np.ndarray:
    """Share of the tokens of every row that is masked."""
    masked = np.bincount(corrupted.spans[:, 0], corrupted.spans[:, 3] - corrupted.spans[:, 2], len(corrupted))
    return masked / np.diff(split.offsets)


def same(one: Corrupted, other: Corrupted) -> bool:
    """Whether all bytes agree."""
    pairs = zip(vars(one).values(), vars(other).values(), strict=True)
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


RATIOS = [(0.01, 0.0), (0.15, 0.0), (0.2, 0.0), (0.2, 0.2), (0.5, 0.0), (0.5, 0.4), (0.9, 0.0)]


@st.composite
def cases(draw):
    """A random split and settings of every kind."""
    lengths = draw(st.lists(st.integers(1, 90), min_size=1, max_size=12))
    split = random_split(
        np.array(lengths),
        draw(st.integers(0, 10**6)),
        marks=draw(st.sampled_from([0.0, 0.12, 0.5, 0.9])),
        others=draw(st.sampled_from([0.0, 0.02, 0.2])),
        term_gap=draw(st.sampled_from([0, 1, 3, 15])),
    )
    max_target_tokens = draw(st.sampled_from([8, 20, 64, 256]))
    chosen = {
        **draw(st.sampled_from([{"mask_ratio": ratio, "mask_ratio_spread": spread} for ratio, spread in RATIOS])),
        "term_probability": draw(st.sampled_from([0.0, 0.5, 1.0])),
        "max_span_tokens": draw(st.integers(1, 6)),
        "max_sentinels": draw(st.integers(1, min(100, max_target_tokens // 2 - 1))),
        "seed": draw(st.integers(0, 2**63 - 1)),
        "epoch": draw(st.integers(0, 2**62)),
        "data": DataConfig(max_source_tokens=91, max_target_tokens=max_target_tokens),
    }
    return split, chosen


@settings(max_examples=120, deadline=None)
@given(cases())
def test_source_and_target_give_back_the_chunk(case):
    """Corruption inverts, and the spans on record are those of the text."""
    split, chosen = case
    corrupted = damage(split, **chosen)
    for row in range(len(split)):
        source, target = row_of(corrupted, row)
        assert source[-1] == target[-1] == TABLE.eos_id
        assert stitched(source, target) == split.chunk(row)
        spans = spans_of(corrupted, row)
        expected = [
            token
            for k, (start, end) in enumerate(spans)
            for token in (int(TABLE.sentinel_ids[k]), *split.chunk(row)[start:end])
        ]
        assert target[:-1] == expected


@settings(max_examples=120, deadline=None)
@given(cases())
def test_sentinels_stand_in_order_and_every_limit_holds(case):
    """1 to max_sentinels spans in every example, numbered from 0 in the order of the text, within both lengths."""
    split, chosen = case
    corrupted = damage(split, **chosen)
    for row in range(len(split)):
        source, target = row_of(corrupted, row)
        numbers = [SENTINEL[token] for token in source if token in SENTINEL]
        assert numbers == [SENTINEL[token] for token in target if token in SENTINEL] == list(range(len(numbers)))
        assert 1 <= len(numbers) <= chosen["max_sentinels"]
        assert len(target) <= chosen["data"].max_target_tokens and len(source) <= chosen["data"].max_source_tokens


@settings(max_examples=120, deadline=None)
@given(cases())
def test_random_spans_are_short_apart_and_never_cover_marks_or_terms(case):
    """Outside masked terms a span is at most max_span_tokens plain tokens with a visible token on either side."""
    split, chosen = case
    corrupted = damage(split, **chosen)
    for row in range(len(split)):
        chunk, spans = split.chunk(row), spans_of(corrupted, row)
        assert all(left[1] < right[0] for left, right in zip(spans, spans[1:], strict=False))
        masked_terms = {t for of, _, _, start, end in corrupted.masked_terms.tolist() if of == row for t in range(start, end)}
        in_term = {t for start, end, _ in split.terms_of(row) for t in range(start, end)}
        plain = [t for t in range(len(chunk)) if is_plain(chunk[t]) and t not in in_term]
        for start, end in spans:
            random_part = [t for t in range(start, end) if t not in masked_terms]
            if not random_part:
                continue
            assert random_part == list(range(start, end)), "a random span touches a masked term"
            assert end - start <= chosen["max_span_tokens"]
            if plain or len(spans) > 1:
                assert set(random_part) <= set(plain)
            else:  # nothing plain to mask: one token alone
                assert end - start == 1


def is_plain(token: int) -> bool:
    """Neither punctuation nor special."""
    return not (TABLE.punctuation[token] or TABLE.special[token])


@settings(max_examples=120, deadline=None)
@given(cases())
def test_a_term_is_masked_whole_or_visible_whole(case):
    """No occurrence is masked in part while a plain token can be masked, and masked_terms lists the masked ones."""
    split, chosen = case
    corrupted = damage(split, **chosen)
    for row in range(len(split)):
        masked = {t for start, end in spans_of(corrupted, row) for t in range(start, end)}
        listed = {(start, end, term): k for of, term, k, start, end in corrupted.masked_terms.tolist() if of == row}
        special_inside = False
        for start, end, term in split.terms_of(row):
            holds_special = bool(TABLE.special[split.chunk(row)[start:end]].any())
            special_inside |= holds_special or end - start + 2 > chosen["data"].max_target_tokens
            inside = [t in masked for t in range(start, end)]
            if (start, end, term) in listed:
                assert all(inside) and not holds_special
                span_start, span_end = spans_of(corrupted, row)[listed[start, end, term]]
                assert span_start <= start and end <= span_end
            elif not special_inside:
                assert not any(inside)
        assert len(listed) == sum(of == row for of in corrupted.masked_terms[:, 0].tolist())


@pytest.mark.parametrize("mask_ratio", [0.1, 0.2, 0.3, 0.45])
def test_the_mask_ratio_holds_over_a_thousand_chunks(mask_ratio):
    """The mean masked share is within 0.02 of mask_ratio, where the sentinels allow, with and without terms."""
    lengths = log_normal_lengths(1000, 80.0, 0.3, 120, seed=3)
    for term_gap in (0, 20):
        split = random_split(lengths, 5, term_gap=term_gap)
        share = masked_share(damage(split, mask_ratio=mask_ratio, max_sentinels=40), split)
        assert abs(share.mean() - mask_ratio) < 0.02


def test_with_a_spread_every_chunk_and_epoch_has_a_ratio_of_its_own():
    """The masked shares of 4,000 chunks are uniform from 0.05 to 0.35, their mean is mask_ratio, and epochs do not agree."""
    split = random_split(np.full(4000, 200), 5)
    spread = {"mask_ratio": 0.2, "mask_ratio_spread": 0.15, "max_sentinels": 100}
    share = masked_share(damage(split, **spread), split)
    assert abs(share.mean() - 0.2) < 0.005
    deciles = np.quantile(share, np.arange(0.1, 1.0, 0.1))
    assert np.abs(deciles - np.arange(0.08, 0.35, 0.03)).max() < 0.01
    later = masked_share(damage(split, epoch=1, **spread), split)
    assert abs(np.corrcoef(share, later)[0, 1]) < 0.05


def test_a_spread_may_reach_both_ends_of_what_a_mask_ratio_may_be_and_no_further():
    """From nothing to 0.9, whatever the sum of two decimal fractions is; a bad mask ratio alone is one complaint."""
    for ratio, spread in ((0.8, 0.1), (0.56, 0.34), (0.45, 0.45), (0.2, 0.2), (0.9, 0.0)):
        assert CorruptionConfig(mask_ratio=ratio, mask_ratio_spread=spread).mask_ratio_spread == spread
    for ratio, spread in ((0.8, 0.11), (0.2, 0.21), (0.2, -0.1), (0.2, math.nan), (0.95, 0.0)):
        with pytest.raises(ConfigError) as refused:
            CorruptionConfig(mask_ratio=ratio, mask_ratio_spread=spread)
        assert len(refused.value.problems) == 1


def test_scarce_sentinels_make_spans_longer_before_they_make_them_fewer():
    """At 340 tokens and 27 sentinels, uniform spans of 1 to 3 would reach 0.16 at most; 0.20 is still reached."""
    split = random_split(np.full(300, 340), 6)
    corrupted = damage(split)
    assert abs(masked_share(corrupted, split).mean() - 0.2) < 0.005
    assert np.bincount(corrupted.spans[:, 0]).max() <= 27


def test_terms_are_masked_with_the_probability_asked_for():
    """Where the budget has room, the share of occurrences that is masked is term_probability."""
    split = random_split(np.full(1000, 100), 7, others=0.0)
    for probability in (0.0, 0.3, 0.6):
        corrupted = damage(split, term_probability=probability, mask_ratio=0.4, max_sentinels=50)
        assert abs(len(corrupted.masked_terms) / len(split.terms) - probability) < 0.02


def test_terms_stay_within_the_budget_and_none_is_favoured_by_its_place():
    """With term_probability 1 and more terms than budget, terms fill the budget and every place is dropped as often."""
    chunks = [[WORD + t for t in range(60)]] * 3000
    split = split_of(chunks, [(example, start, start + 2, start) for example in range(3000) for start in range(0, 60, 4)])
    corrupted = damage(split, term_probability=1.0, mask_ratio=0.2)
    assert np.all(np.bincount(corrupted.masked_terms[:, 0]) == 6)
    by_place = np.bincount(corrupted.masked_terms[:, 1], minlength=60)[::4] / 3000
    assert np.all(np.abs(by_place - 0.4) < 0.05)


def test_the_first_term_may_pass_the_budget_up_to_half_the_chunk():
    """A long term in a short chunk can be learned; a term longer than half its chunk would leave too little context."""
    split = split_of([[WORD + t for t in range(12)]] * 2, [(0, 3, 9, 1), (1, 3, 10, 2)])
    corrupted = damage(split, term_probability=1.0, mask_ratio=0.1)
    assert spans_of(corrupted, 0) == [(3, 9)]
    assert corrupted.masked_terms.tolist() == [[0, 1, 0, 3, 9]]
    assert len(spans_of(corrupted, 1)) == 1 and masked_share(corrupted, split)[1] == 1 / 12


def test_terms_that_adjoin_share_a_span_and_punctuation_between_terms_stays():
    """Touching terms are one blank; a comma between two masked terms is never swallowed."""
    chunk = [WORD + t for t in range(20)]
    chunk[6] = COMMA
    split = split_of([chunk], [(0, 4, 6, 1), (0, 7, 9, 2), (0, 9, 11, 3)])
    corrupted = damage(split, term_probability=1.0, mask_ratio=0.3)
    assert spans_of(corrupted, 0) == [(4, 6), (7, 11)]
    assert corrupted.masked_terms.tolist() == [[0, 1, 0, 4, 6], [0, 2, 1, 7, 9], [0, 3, 1, 9, 11]]
    source, _ = row_of(corrupted, 0)
    first, second = (int(token) for token in TABLE.sentinel_ids[:2])
    assert source[4:7] == [first, COMMA, second]


def test_terms_that_share_a_token_are_masked_together():
    """Two occurrences widened onto one token are one unit: both or neither."""
    chunks = [[WORD + t for t in range(20)]] * 400
    split = split_of(chunks, [(e, a, b, term) for e in range(400) for a, b, term in ((3, 6, 1), (5, 8, 2))])
    corrupted = damage(split, mask_ratio=0.4)
    first, second = (set(corrupted.masked_terms[corrupted.masked_terms[:, 1] == term, 0].tolist()) for term in (1, 2))
    assert first == second and 100 < len(first) < 300


@pytest.mark.parametrize("tokens", [12, 40])
def test_every_plain_token_is_masked_equally_often(tokens):
    """In a chunk without punctuation no position is favoured, the ends included."""
    examples = 12_000
    split = split_of([[WORD + t for t in range(tokens)]] * examples)
    spans = damage(split).spans
    masked = np.zeros(tokens + 1)
    np.add.at(masked, spans[:, 2], 1)
    np.add.at(masked, spans[:, 3], -1)
    assert np.all(np.abs(np.cumsum(masked)[:tokens] / examples - round(0.2 * tokens) / tokens) < 0.02)


def test_a_chunk_without_plain_tokens_still_has_a_span():
    """A term that was not drawn, else a punctuation mark, else a part of a term, else a special token."""
    split = split_of(
        [[WORD, WORD + 1, COMMA], [COMMA, UNKNOWN], [UNKNOWN], [WORD], [WORD, UNKNOWN]],
        [(0, 0, 2, 9), (4, 0, 2, 9)],
    )
    corrupted = damage(split, term_probability=0.0)
    assert [spans_of(corrupted, row) for row in range(5)] == [[(0, 2)], [(0, 1)], [(0, 1)], [(0, 1)], [(0, 1)]]
    assert corrupted.masked_terms.tolist() == [[0, 9, 0, 0, 2]]


def test_byte_pieces_are_masked_only_inside_terms():
    """A random span never takes a part of a spelled-out character; a term with such a character is masked whole."""
    chunk = [FIRST_BYTE + 1, FIRST_BYTE + 2, WORD, WORD + 1, FIRST_BYTE, FIRST_BYTE + 3, WORD + 2, WORD + 3]
    split = split_of([chunk] * 200, [(example, 4, 6, 1) for example in range(200)])
    corrupted = damage(split, mask_ratio=0.5)
    masked = {t for _, _, start, end in corrupted.spans.tolist() for t in range(start, end)}
    assert masked == set(range(2, 8)) and 0 < len(corrupted.masked_terms) < 200


def test_the_same_key_gives_the_same_bytes_and_any_other_key_other_masks():
    """Seed and epoch decide, nothing else: repeats agree, other seeds and epochs differ in nearly every example."""
    split = random_split(np.full(200, 60), 11)
    first = damage(split, seed=5, epoch=2, noise_ratio=0.1)
    assert same(first, damage(split, seed=5, epoch=2, noise_ratio=0.1))
    for seed, epoch in ((6, 2), (5, 3)):
        other = damage(split, seed=seed, epoch=epoch, noise_ratio=0.1)
        equal = [spans_of(first, row) == spans_of(other, row) for row in range(200)]
        assert sum(equal) < 5


def test_an_example_does_not_depend_on_the_batch_around_it(monkeypatch):
    """Alone, in any order, with any others, with repeats and in slabs of any size, an example is corrupted the same."""
    split = random_split(np.random.default_rng(1).integers(1, 120, 60), 13)
    chosen = {"seed": 3, "settings": CorruptionConfig(noise_ratio=0.1), "data": DataConfig(), "table": TABLE}
    ids = np.random.default_rng(2).permutation(np.concatenate((np.arange(60), np.arange(20))))
    epochs = np.where(np.arange(80) % 3 == 0, 4, 9)
    together = corrupt(split, ids, epochs, **chosen)
    monkeypatch.setattr(corruption, "SLAB_SLOTS", 300)
    assert same(together, corrupt(split, ids, epochs, **chosen))
    for row in range(80):
        alone = corrupt(split, ids[row : row + 1], epochs[row : row + 1], **chosen)
        assert same(alone, together.take(np.array([row])))


def test_rows_can_be_taken_out_in_any_order():
    """`take` renumbers spans and terms with the rows."""
    split = random_split(np.full(30, 50), 17)
    corrupted = damage(split)
    rows = np.array([7, 3, 29, 0])
    taken = corrupted.take(rows)
    for new, old in enumerate(rows):
        assert row_of(taken, new) == row_of(corrupted, int(old)) and spans_of(taken, new) == spans_of(corrupted, int(old))
        terms = [line[1:] for line in corrupted.masked_terms.tolist() if line[0] == old]
        assert [line[1:] for line in taken.masked_terms.tolist() if line[0] == new] == terms


def test_with_task_correct_the_target_is_the_clean_text():
    """Nothing is masked, the source is the noised text, the target the whole clean one."""
    split = random_split(np.full(50, 60), 19)
    clean = damage(split, task="correct")
    noised = damage(split, task="correct", noise_ratio=0.2)
    for row in range(50):
        expected = [*split.chunk(row), TABLE.eos_id]
        assert row_of(clean, row) == (expected, expected)
        assert row_of(noised, row)[1] == expected
    assert len(clean.spans) == len(clean.masked_terms) == 0
    assert not np.array_equal(noised.source, clean.source)


def test_pairs_masked_elsewhere_are_trained_as_they_are():
    """A pair is cut where its target begins and gets end marks; its terms are left alone; its neighbours are corrupted."""
    pair = [WORD, int(TABLE.sentinel_ids[0]), WORD + 2, int(TABLE.sentinel_ids[0]), WORD + 1]
    text = [WORD + t for t in range(20)]
    split = split_of([text, pair, [WORD, WORD], text], [(1, 0, 1, 3)], pairs=[-1, 3, 0, -1])
    for task in ("restore", "correct"):
        corrupted = damage(split, task=task, noise_ratio=0.5)
        assert row_of(corrupted, 1) == ([*pair[:3], TABLE.eos_id], [*pair[3:], TABLE.eos_id])
        assert row_of(corrupted, 2) == ([TABLE.eos_id], [WORD, WORD, TABLE.eos_id])
        assert {1, 2}.isdisjoint(corrupted.spans[:, 0].tolist()) and len(corrupted.masked_terms) == 0
    assert row_of(damage(split), 0)[1] != row_of(damage(split), 3)[1]


def test_noise_never_makes_a_source_longer_than_allowed():
    """Doublings beyond data.max_source_tokens are taken back."""
    split = split_of([[WORD + t for t in range(39)]] * 50)
    data = DataConfig(max_source_tokens=40, max_target_tokens=40)
    corrupted = damage(split, task="correct", data=data, noise_ratio=0.5, noise_kinds=["drop", "double"])
    lengths = np.diff(corrupted.source_offsets)
    assert lengths.max() == 40
    only_doubled = damage(split, task="correct", data=data, noise_ratio=0.5, noise_kinds=["double"])
    assert set(np.diff(only_doubled.source_offsets).tolist()) == {40}


@pytest.mark.parametrize(
    ("split", "data", "words"),
    [
        (split_of([[WORD] * 16]), DataConfig(max_source_tokens=16), "does not fit"),
        (split_of([[WORD], []]), DataConfig(), "example 1 of the store"),
        (split_of([[WORD] * 12], pairs=[2]), DataConfig(max_target_tokens=10), "does not fit"),
        (split_of([[WORD] * 12], pairs=[13]), DataConfig(), "does not fit"),
        (split_of([[WORD] * 12], [(0, 10, 13, 1)]), DataConfig(), "terms outside"),
        (split_of([[WORD] * 12], [(0, -1, 3, 1)]), DataConfig(), "terms outside"),
        (split_of([[60_000] * 12]), DataConfig(), "beyond its vocabulary"),
    ],
)
def test_a_store_that_does_not_fit_is_named(split, data, words):
    """Too long, empty or ill-formed examples raise DataError instead of being cut in silence."""
    chosen = CorruptionConfig(max_sentinels=3)
    with pytest.raises(DataError, match=words):
        corrupt(split, np.arange(len(split)), np.zeros(len(split)), seed=1, settings=chosen, data=data, table=TABLE)


def test_no_examples_give_an_empty_batch():
    """Zero examples corrupt to zero rows."""
    split = random_split(np.full(3, 20), 1)
    nothing = np.zeros(0, np.int64)
    assert len(corrupt(split, nothing, nothing, seed=1, settings=CorruptionConfig(), data=DataConfig(), table=TABLE)) == 0


def test_masks_never_change_between_versions():
    """A run that is resumed under another version must draw the same damage: this one is on file."""
    split = split_of([[WORD + t for t in range(30)]], [(0, 4, 6, 1), (0, 10, 13, 2)])
    corrupted = damage(split, seed=42, epoch=1, noise_ratio=0.2)
    assert corrupted.spans[:, 2:].tolist() == [[0, 2], [6, 7], [10, 13]]
    assert corrupted.source.tolist() == [
        112,
        145,
        146,
        147,
        148,
        111,
        150,
        151,
        152,
        110,
        156,
        157,
        158,
        159,
        159,
        160,
        163,
        162,
        163,
        164,
        165,
        166,
        167,
        168,
        169,
        170,
        171,
        172,
        1,
    ]
