"""Measuring restoration on a real corruption of a small split.

Run: python -m pytest tests/restoration/scoring/test_measure.py
"""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from resilient_t5.config.schema import CorruptionConfig, DataConfig
from resilient_t5.data.batches import MicroBatch
from resilient_t5.data.corruption.corruption import Corrupted, corrupt
from resilient_t5.data.corruption.token_table import TokenTable
from resilient_t5.data.ragged import Split
from resilient_t5.restoration.scoring.baselines import MajorityBaseline
from resilient_t5.restoration.scoring.measure import Restorer, measure_restoration, score_generated
from resilient_t5.restoration.scoring.metrics import Glossary, count_terms

PAD, EOS, FIRST_TERM, FIRST_WORD, SIZE = 0, 1, 10, 20, 160
SENTINELS = np.arange(SIZE - 1, SIZE - 101, -1, dtype=np.int32)
TERMS = ["t0 t1", "t2", "t3 t4 t5", "t6"]
TERM_TOKENS = [[10, 11], [12], [13, 14, 15], [16]]


def decode(ids: np.ndarray) -> str:
    """Each plain id is a word."""
    return " ".join(f"t{i - FIRST_TERM}" if i < FIRST_WORD else f"w{i}" for i in ids if 2 <= i < SIZE - 100)


def make_split(examples: int = 12) -> Split:
    """Texts of words with all four terms in each, three examples to a document."""
    draws = np.random.Generator(np.random.Philox(key=1))
    rows, terms = [], []
    for example in range(examples):
        row: list[int] = []
        for term in draws.permutation(4).tolist():
            row += draws.integers(FIRST_WORD, SIZE - 100, 6).tolist()
            terms.append((example, len(row), len(row) + len(TERM_TOKENS[term]), term))
            row += TERM_TOKENS[term]
        rows.append([*row, *draws.integers(FIRST_WORD, SIZE - 100, 4).tolist()])
    offsets = np.cumsum([0] + [len(row) for row in rows])
    return Split(
        np.concatenate(rows).astype(np.uint16),
        offsets.astype(np.int64),
        np.array(terms, np.int32),
        np.arange(examples, dtype=np.int32) // 3,
        np.full(examples, -1, np.int32),
    )


def make_table() -> TokenTable:
    special = np.zeros(SIZE, bool)
    special[[PAD, EOS, 2, *SENTINELS]] = True
    nothing = np.zeros(SIZE, bool)
    return TokenTable(SIZE, PAD, EOS, SENTINELS, nothing, special, nothing, np.zeros(0, np.int32), np.zeros(SIZE + 1, np.int64))


def make_restorer(split: Split, task: str = "restore") -> Restorer:
    glossary = Glossary(TERMS, count_terms(split.terms, len(TERMS)), decode)
    return Restorer(split, make_table(), glossary, MajorityBaseline.fit(split), task, 64, samples=2)


def damage(split: Split, ids: np.ndarray, **settings) -> Corrupted:
    chosen = CorruptionConfig(**{"mask_ratio": 0.3, "term_probability": 0.7, "noise_ratio": 0.0, **settings})
    data = DataConfig(max_source_tokens=64, max_target_tokens=64)
    return corrupt(split, ids, np.zeros_like(ids), seed=5, settings=chosen, data=data, table=make_table())


def rows_of(values: np.ndarray, offsets: np.ndarray, width: int = 64) -> np.ndarray:
    padded = np.full((len(offsets) - 1, width), PAD, np.int64)
    for row in range(len(padded)):
        own = values[offsets[row] : offsets[row + 1]]
        padded[row, : len(own)] = own
    return padded


@pytest.fixture
def split() -> Split:
    return make_split()


def test_the_gold_targets_restore_everything(split):
    """A model that writes the targets has rate 1 on every masked term and span, no error and no fault."""
    ids = np.arange(12)
    corrupted = damage(split, ids, noise_ratio=0.0)
    report = score_generated([(ids, corrupted, rows_of(corrupted.target, corrupted.target_offsets))], make_restorer(split))
    row = report.as_row()
    assert row["n"] == len(corrupted.masked_terms) > 20 and row["n_spans"] == len(corrupted.spans) > row["n"]
    ones = ("term_rate", "term_rate_low", "term_rate_normalised", "term_rate_near", "term_rate_macro", "span_match")
    assert all(row[name] == 1.0 for name in (*ones, "term_rate_sentinel_00_09", "cer_reduction"))
    assert all(row[name] == 0.0 for name in ("cer_masked", "cer", "format_error_share", "early_end_share"))
    assert report.term_rate == 1.0 and row["majority_rate"] > 0.5, "the guess was fitted on these very examples"
    assert row["over_edit_share"] is None and "term_rate_sentinel_27_up" not in row
    assert json.loads(json.dumps(row, allow_nan=False)) == row


def test_empty_answers_restore_nothing(split):
    """A model that ends at once has rate 0, misses every masked character, and every row ends early."""
    ids = np.arange(12)
    corrupted = damage(split, ids)
    report = score_generated([(ids, corrupted, np.full((12, 1), EOS))], make_restorer(split))
    row = report.as_row()
    assert (row["term_rate"], row["term_rate_high"], row["cer_masked"], row["span_match"]) == (0.0, 0.0, 1.0, 0.0)
    assert (row["early_end_share"], row["format_error_share"]) == (1.0, 1.0)
    half = rows_of(corrupted.target, corrupted.target_offsets)
    half[:6, 0] = EOS
    row = score_generated([(ids, corrupted, half)], make_restorer(split)).as_row()
    assert (row["early_end_share"], row["format_error_share"]) == (0.5, 0.5)
    assert report.samples[0].restored == report.samples[0].source


def test_one_wrong_term_costs_one_occurrence(split):
    """Spoiling the answer to one masked term lowers the rate by 1/n, in whichever batch the example lies."""
    ids = np.arange(12)
    corrupted = damage(split, ids)
    rows = rows_of(corrupted.target, corrupted.target_offsets)
    number = len(corrupted.masked_terms) // 2
    row, _, k, start, _ = corrupted.masked_terms[number].tolist()
    token = int(split.tokens[split.offsets[row] + start])
    after_mark = int(np.flatnonzero(rows[row] == SENTINELS[k])[0])
    rows[row, after_mark + int(np.flatnonzero(rows[row, after_mark:] == token)[0])] = FIRST_WORD
    whole = score_generated([(ids, corrupted, rows)], make_restorer(split))
    assert [outcome.exact for outcome in whole.outcomes].count(False) == 1 and not whole.outcomes[number].exact
    parts = [np.array([7, 2, 11]), np.array([0, 1, 3, 4, 5, 6, 8, 9, 10])]
    split_up = score_generated([(ids[part], corrupted.take(part), rows[part]) for part in parts], make_restorer(split))
    assert split_up.as_row() == whole.as_row() and split_up.samples == whole.samples


def test_samples_show_gaps_gold_and_answers_in_brackets(split):
    """The first examples by id; taking the brackets away gives the clean text of gold, and of a perfect answer."""
    ids = np.array([4, 0, 3])
    corrupted = damage(split, ids)
    report = score_generated([(ids, corrupted, rows_of(corrupted.target, corrupted.target_offsets))], make_restorer(split))
    assert [sample.example_id for sample in report.samples] == [0, 3]
    for sample in report.samples:
        clean = decode(split.tokens[split.offsets[sample.example_id] : split.offsets[sample.example_id + 1]])
        assert sample.restored == sample.gold
        assert sample.gold.replace("[", "").replace("]", "") == clean
        assert sample.source.count("[?]") == sample.gold.count("[") > 0
        assert sample.source.split("[?]")[0].rstrip() == sample.gold.split("[")[0].rstrip()


def test_a_model_that_writes_the_whole_text_is_judged_in_the_damaged_places(split):
    """`correct`: leaving the damage restores no span, the clean text all, and touching the rest is an over-edit."""
    ids, restorer = np.arange(12), make_restorer(split, "correct")
    corrupted = damage(split, ids, task="correct", noise_ratio=0.3, noise_kinds=["drop", "double", "swap"])
    clean = rows_of(corrupted.target, corrupted.target_offsets)
    right = score_generated([(ids, corrupted, clean)], restorer).as_row()
    assert right["n_spans"] > 12
    assert (right["span_match"], right["cer"], right["cer_reduction"], right["over_edit_share"]) == (1.0, 0.0, 1.0, 0.0)
    copied = score_generated([(ids, corrupted, rows_of(corrupted.source, corrupted.source_offsets))], restorer).as_row()
    assert copied["n_spans"] == right["n_spans"] and copied["span_match"] == 0.0
    assert (copied["cer_reduction"], copied["over_edit_share"]) == (0.0, 0.0)
    meddling = clean.copy()
    meddling[:, 3] = 59
    assert score_generated([(ids, corrupted, meddling)], restorer).as_row()["over_edit_share"] > 0.0


def test_a_term_that_the_damage_touches_is_a_masked_term_of_the_whole_text():
    """Of two terms one is damaged, its neighbour too: one span, one occurrence, restored only when the term is back."""
    clean = [30, 31, 10, 11, 32, 12, 33]
    split = Split(
        np.array(clean, np.uint16),
        np.array([0, 7]),
        np.array([[0, 2, 4, 0], [0, 5, 6, 1]]),
        np.zeros(1, np.int32),
        np.array([-1]),
    )
    source = np.array([30, 50, 51, 11, 32, 12, 33, EOS], np.int32)
    nothing = np.zeros((0, 5), np.int32)
    corrupted = Corrupted(
        *(source, np.array([0, 8]), np.array([*clean, EOS], np.int32), np.array([0, 8]), nothing[:, :4], nothing),
        *(source, np.array([0, 8])),
    )
    rates = {}
    for name, written in {"clean": clean, "left": source[:-1], "term only": [30, 50, 10, 11, 32, 12, 33]}.items():
        report = score_generated([(np.array([0]), corrupted, np.array([[*written, EOS]]))], make_restorer(split, "correct"))
        assert [outcome.gold for outcome in report.outcomes] == ["t0 t1"] and len(report.spans) == 1
        rates[name] = (report.term_rate, report.as_row()["span_match"])
    assert rates == {"clean": (1.0, 1.0), "left": (0.0, 0.0), "term only": (1.0, 0.0)}


def test_a_pair_that_was_masked_elsewhere_is_judged_by_its_own_target(split):
    """Its clean text is its source with its answers filled in; its terms are unknown, so no term is counted."""
    source = [30, SENTINELS[0], 31, 32, SENTINELS[1], 33]
    target = [SENTINELS[0], 40, 41, SENTINELS[1], 42]
    pair = Split(
        np.array([*source, *target], np.uint16), np.array([0, 11]), np.zeros((0, 4), np.int32), np.zeros(1), np.array([6])
    )
    corrupted = damage(pair, np.array([0]))
    restorer = replace(make_restorer(split), split=pair)
    report = score_generated([(np.array([0]), corrupted, np.array([[*target[:4], 50, EOS]]))], restorer)
    row = report.as_row()
    assert (row["n"], row["term_rate"], report.term_rate, row["n_spans"], row["span_match"]) == (0, None, None, 2, 0.5)
    sample = report.samples[0]
    assert sample.gold == "w30 [w40 w41] w31 w32 [w42] w33"
    assert sample.restored == sample.gold.replace("w42", "w50")


def micro_batch(ids: np.ndarray, corrupted: Corrupted) -> MicroBatch:
    source = torch.from_numpy(rows_of(corrupted.source, corrupted.source_offsets))
    labels = torch.from_numpy(rows_of(corrupted.target, corrupted.target_offsets, 24))
    mask = (source != PAD).long()
    tokens = int((labels != PAD).sum())
    return MicroBatch(
        source_BS=source,
        source_mask_BS=mask,
        labels_BT=labels.masked_fill(labels == PAD, -100),
        example_ids=ids,
        target_tokens=tokens,
        useful_tokens=int(mask.sum()) + tokens,
        padded_tokens=source.numel() + labels.numel(),
        id_range=(0, SIZE - 1),
    )


def test_a_real_model_is_measured_from_end_to_end(split):
    """Two measurements of an untrained T5 are equal; its mode stays."""
    torch.manual_seed(0)
    sizes = {"vocab_size": SIZE, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=PAD)).train()
    ids = np.arange(12)
    corrupted = damage(split, ids)
    batches = [
        SimpleNamespace(micro_batch=micro_batch(ids[part], corrupted.take(part)), corrupted=corrupted.take(part))
        for part in np.split(np.arange(12), 3)
    ]
    reports = [measure_restoration(model, batches, make_restorer(split)) for _ in range(2)]
    assert reports[0].as_row() == reports[1].as_row() and model.training
    assert reports[0].as_row()["n"] == len(corrupted.masked_terms) and reports[0].term_rate < 0.2
