"""A tiny real model with its own tokenizer, as an export leaves it; random weights, so that answers are anything."""

import pytest
import torch

from resilient_t5.config.sections import ModelConfig
from resilient_t5.data.corpus.sample import generate_notes
from resilient_t5.data.tokenizer.tokenizer import train_tokenizer
from resilient_t5.model.load import SpecialIds, build_model, save_model
from resilient_t5.restoration.restoration_config import RestorationConfig

SIZES = {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2}


@pytest.fixture(autouse=True)
def one_thread():
    """One thread: as fast for a tiny model, and repeatable."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A tokenizer of some 500 pieces with byte fallback, trained on clinical notes."""
    return train_tokenizer([note.text for note in generate_notes(160, 5)], 600, 0.98)


@pytest.fixture(scope="session")
def tiny_export(tmp_path_factory, tiny_tokenizer):
    """(task, name of the directory) -> a model directory with restoration.json."""
    made = {}

    def make(task="restore", **usage):
        key = (task, *sorted(usage.items()))
        if key not in made:
            torch.set_num_threads(1)
            tokenizer = tiny_tokenizer
            special = SpecialIds(tokenizer.pad_id, tokenizer.eos_id, tokenizer.pad_id)
            settings = ModelConfig(preset="tiny", dropout=0.0, **SIZES)
            model = build_model(settings, vocabulary_rows=tokenizer.size, special=special, seed=3)
            made[key] = tmp_path_factory.mktemp("export") / task
            save_model(model, made[key])
            tokenizer.save(made[key])
            limits = {"max_source_tokens": 40, "max_target_tokens": 18, "max_sentinels": 5, **usage}
            RestorationConfig(task=task, **limits).write(made[key])
        return made[key]

    return make
