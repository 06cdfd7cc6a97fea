"""Noise in the visible text. Run: python -m pytest tests/data/corruption/test_noise.py"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilient_t5.config.schema import CorruptionConfig, DataConfig
from resilient_t5.data.corruption.corruption import Corrupted, corrupt
from resilient_t5.data.corruption.noise import KINDS
from tests.data.fake_split import FIRST_BYTE, FIRST_MARK, FIRST_WORD, SIZE, FakeSplit, fake_table, random_split, split_of

TABLE = fake_table()
DATA = DataConfig(max_source_tokens=600, max_target_tokens=600)
ALL_KINDS = list(KINDS)


def noised(split: FakeSplit, *, seed: int = 1, **settings_) -> Corrupted:
    """All examples of a split, noised, and masked only as `task` requires."""
    chosen = CorruptionConfig(**{"task": "correct", "noise_ratio": 0.1, **settings_})
    ids = np.arange(len(split))
    return corrupt(split, ids, np.zeros(len(ids)), seed=seed, settings=chosen, data=DATA, table=TABLE)


def sources(corrupted: Corrupted) -> list[list[int]]:
    """The source of every row without its end mark."""
    ends = corrupted.source_offsets
    return [corrupted.source[a : b - 1].tolist() for a, b in zip(ends[:-1], ends[1:], strict=True)]


def distinct_words(examples: int, length: int) -> FakeSplit:
    """Chunks whose words all differ and are no look-alikes of one another, so that every change can be read off."""
    return split_of([list(range(FIRST_WORD + e % 5, FIRST_WORD + e % 5 + 5 * length, 5)) for e in range(examples)])


def test_a_dropped_token_is_missing_and_nothing_else_changes():
    """With `drop` alone a source is the chunk without some tokens, about noise_ratio of them."""
    split = distinct_words(300, 200)
    lost = 0
    for example, source in enumerate(sources(noised(split, noise_kinds=["drop"]))):
        chunk = split.chunk(example)
        assert source == [token for token in chunk if token in set(source)]
        lost += len(chunk) - len(source)
    assert abs(lost / (300 * 200) - 0.1) < 0.01


def test_a_doubled_token_occurs_twice_in_a_row():
    """With `double` alone, taking repeats out gives back the chunk."""
    split = distinct_words(300, 200)
    gained = 0
    for example, source in enumerate(sources(noised(split, noise_kinds=["double"]))):
        without_repeats = [t for n, t in enumerate(source) if n == 0 or t != source[n - 1]]
        assert without_repeats == split.chunk(example)
        gained += len(source) - len(without_repeats)
    assert abs(gained / (300 * 200) - 0.1) < 0.01


@pytest.mark.parametrize("burst_tokens", [1, 3])
def test_swapped_tokens_are_neighbours(burst_tokens):
    """With `swap` alone no token moves by more than one place, and about noise_ratio of them move."""
    split = distinct_words(300, 200)
    moved = 0
    for example, source in enumerate(sources(noised(split, noise_kinds=["swap"], noise_burst_tokens=burst_tokens))):
        chunk = split.chunk(example)
        places = np.array([chunk.index(token) for token in source]) - np.arange(len(chunk))
        assert sorted(source) == chunk and np.abs(places).max() <= 1
        moved += int((places != 0).sum())
    assert abs(moved / (300 * 200) - 0.1) < 0.02


def test_a_replaced_token_is_a_look_alike_and_every_look_alike_is_used():
    """With `replace` alone lengths stay and every change is one of the token's look-alikes."""
    split = distinct_words(300, 200)
    shifts = []
    for example, source in enumerate(sources(noised(split, noise_kinds=["replace"]))):
        chunk = split.chunk(example)
        assert len(source) == len(chunk)
        shifts += [new - old for new, old in zip(source, chunk, strict=True) if new != old]
    assert set(shifts) <= {1, 2} and abs(shifts.count(1) / len(shifts) - 0.5) < 0.05
    assert abs(len(shifts) / (300 * 200) - 0.1) < 0.01


def test_tokens_without_look_alikes_are_never_replaced():
    """Punctuation has no look-alikes in this vocabulary: with `replace` alone it stays."""
    split = split_of([[FIRST_MARK + t % 20 for t in range(100)]] * 20)
    assert sources(noised(split, noise_kinds=["replace"], noise_ratio=0.5)) == [split.chunk(e) for e in range(20)]


def test_a_token_is_noised_in_one_way_only():
    """With swaps and replacements in long bursts, every place holds its token, a look-alike, or half of a swap."""
    split = distinct_words(200, 200)
    chosen = {"noise_kinds": ["swap", "replace"], "noise_ratio": 0.3, "noise_burst_tokens": 6}
    for example, source in enumerate(sources(noised(split, **chosen))):
        chunk = split.chunk(example)
        place = 0
        while place < len(chunk):
            if source[place : place + 2] == chunk[place : place + 2][::-1] and place + 1 < len(chunk):
                place += 1
            else:
                assert source[place] - chunk[place] in (0, 1, 2)
            place += 1


@pytest.mark.parametrize("burst_tokens", [2, 3, 6])
def test_noise_comes_in_bursts_of_the_mean_length_asked_for(burst_tokens):
    """Runs of neighbouring replaced tokens have a mean length of noise_burst_tokens and more than one size."""
    split = distinct_words(400, 300)
    runs = []
    chosen = {"noise_kinds": ["replace"], "noise_ratio": 0.03, "noise_burst_tokens": burst_tokens}
    for example, source in enumerate(sources(noised(split, **chosen))):
        changed = np.array(source) != np.array(split.chunk(example))
        edges = np.flatnonzero(np.diff(changed.astype(int), prepend=0, append=0))
        runs += (edges[1::2] - edges[0::2]).tolist()
    assert abs(np.mean(runs) - burst_tokens) < 0.12 * burst_tokens
    assert len(set(runs)) > 2


@pytest.mark.parametrize("noise_ratio", [0.03, 0.2])
def test_the_share_counts_all_visible_tokens_though_terms_are_spared(noise_ratio):
    """Noise skips terms; the other tokens are noised so often that the share of all visible tokens is noise_ratio."""
    split = random_split(np.full(400, 200), 3, marks=0.0, others=0.0, term_gap=6)
    corrupted = noised(split, noise_kinds=["replace"], noise_ratio=noise_ratio)
    changed = sum(
        int((np.array(source) != np.array(split.chunk(example))).sum()) for example, source in enumerate(sources(corrupted))
    )
    assert abs(changed / (400 * 200) - noise_ratio) < 0.1 * noise_ratio + 0.002


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.sampled_from([[kind] for kind in KINDS] + [ALL_KINDS]), st.sampled_from(["restore", "correct"])
)
def test_noise_never_touches_terms_marks_or_bytes(seed, kinds, task):
    """Tokens of visible terms, special tokens, sentinels and byte pieces are all in the source, in order."""
    generator = np.random.default_rng(seed)
    length = 120
    # Multiples of 5: no look-alike of a word is another word of the chunk.
    chunk = (FIRST_WORD + 5 * generator.permutation((SIZE - FIRST_WORD) // 5)[:length]).tolist()
    starts = [10, 40, 80]
    for place in (20, 60, 100):
        chunk[place], chunk[place + 1] = 2, FIRST_BYTE + place // 20
    split = split_of([chunk], [(0, start, start + 4, 7) for start in starts])
    chosen = {"noise_kinds": kinds, "noise_ratio": 0.5, "task": task, "seed": seed}
    corrupted = noised(split, **chosen)
    masked = {t for _, _, start, end in corrupted.spans.tolist() for t in range(start, end)}
    protected = [t for start in starts for t in range(start, start + 4)] + [t for p in (20, 60, 100) for t in (p, p + 1)]
    visible_protected = [chunk[t] for t in sorted(protected) if t not in masked]
    source = sources(corrupted)[0]
    remaining = iter(source)
    assert all(token in remaining for token in visible_protected)
    for start in starts:
        if start not in masked:
            at = source.index(chunk[start + 1])
            assert source[at - 1 : at + 3] == chunk[start : start + 4]
    sentinels = [token for token in source if token in set(TABLE.sentinel_ids.tolist())]
    assert sentinels == TABLE.sentinel_ids[: len(corrupted.spans)].tolist()


def test_noise_changes_neither_masks_nor_targets():
    """Masks and noise draw from different streams: the target of an example is the same with noise and without."""
    split = random_split(np.full(100, 100), 5)
    clean, damaged = noised(split, task="restore", noise_ratio=0.0), noised(split, task="restore", noise_ratio=0.3)
    assert np.array_equal(clean.target, damaged.target) and np.array_equal(clean.spans, damaged.spans)
    assert not np.array_equal(clean.source, damaged.source)


def test_every_kind_that_is_asked_for_occurs():
    """With all four kinds, sources get shorter and longer, and tokens are swapped and replaced."""
    split = distinct_words(200, 100)
    found = set()
    for example, source in enumerate(sources(noised(split, noise_ratio=0.02, noise_burst_tokens=1))):
        chunk = split.chunk(example)
        if len(source) != len(chunk):
            found.add("drop" if len(source) < len(chunk) else "double")
        else:
            found.add("swap" if sorted(source) == chunk and source != chunk else "replace" if source != chunk else "none")
    assert set(KINDS) <= found
