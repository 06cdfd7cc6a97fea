"""The check of an export, and what a cut vocabulary means for it.

Run: python -m pytest tests/training/entrypoints/test_export.py
"""

import json

import numpy as np
import pytest
import torch

from resilient_t5.config.sections import ModelConfig
from resilient_t5.data.corpus.sample import generate_notes
from resilient_t5.data.tokenizer.tokenizer import train_tokenizer
from resilient_t5.errors import DataError
from resilient_t5.model.load import SpecialIds, build_model
from resilient_t5.model.vocabulary import cut_vocabulary, tables_of
from resilient_t5.restoration.restoration_config import RestorationConfig, read_restoration_config
from resilient_t5.training.entrypoints.export import ExportParts, write_export


@pytest.fixture
def parts():
    """A tiny untied model cut to two thirds of its vocabulary, as a fine-tuned mT5 is."""
    torch.set_num_threads(1)
    tokenizer = train_tokenizer([note.text for note in generate_notes(100, 5)], 500, 0.98)
    special = SpecialIds(tokenizer.pad_id, tokenizer.eos_id, tokenizer.pad_id)
    sizes = {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    model = build_model(ModelConfig(preset="mt5-small", **sizes), vocabulary_rows=tokenizer.size, special=special, seed=1)
    original = tables_of(model)
    barred = np.arange(300, 450)
    with torch.no_grad():
        original.head_VD[300:450] *= 50.0  # rows that were never trained and would win every choice
    trained = np.setdiff1d(np.arange(tokenizer.size), barred)
    cut_vocabulary(model, trained)
    probe = np.array([20, 21, tokenizer.sentinel_ids[0], 25, tokenizer.eos_id])
    return ExportParts(model, trained, original, tokenizer, RestorationConfig(max_sentinels=3, trained_ids=trained), probe)


def test_an_export_of_a_cut_model_never_answers_with_an_untrained_id(parts, tmp_path):
    """Plain generate of transformers gives our answer, although untrained rows have the largest logits by far."""
    write_export(parts, "card", tmp_path / "best")
    assert read_restoration_config(tmp_path / "best").trained_ids.tolist() == parts.trained_ids.tolist()
    content = json.loads((tmp_path / "best" / "generation_config.json").read_text())
    assert content["suppress_tokens"] == list(range(300, 450))


def test_an_export_that_answers_otherwise_is_refused_and_the_former_one_stays(parts, tmp_path, monkeypatch):
    """Without the suppressed ids the check fails: an error, no temporary directory, the former export as it was."""
    write_export(parts, "the first", tmp_path / "best")
    monkeypatch.setattr("resilient_t5.training.entrypoints.export._extend_generation", lambda *arguments: None)
    monkeypatch.setattr("resilient_t5.training.entrypoints.export._is_tie", lambda *arguments: False)
    with pytest.raises(DataError, match="probe"):
        write_export(parts, "the second", tmp_path / "best")
    assert (tmp_path / "best" / "README.md").read_text() == "the first"
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_an_export_leaves_no_trace_in_the_random_state(parts, tmp_path):
    """transformers draws while it builds a model; a run that goes on must not notice."""
    before = torch.get_rng_state()
    write_export(parts, "card", tmp_path / "best")
    assert torch.equal(before, torch.get_rng_state())
