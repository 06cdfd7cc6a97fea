"""Shared inputs of all sides of a comparison: corpus, tokenizer, store, model directory and masked examples.

The full model has the 250,112 vocabulary rows of mT5 and random weights. The tokenizer is trained on the corpus and has fewer
pieces; they use the first rows, and the remaining rows represent the pieces of mT5 that the corpus does not use. The peers
train all rows. Ours trains the active rows of the store, which are all pieces of the trained tokenizer; with mT5's own
tokenizer there would be fewer.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset

from resilient_t5.config.schema import Config
from resilient_t5.config.sections import (
    BatchConfig,
    CheckpointConfig,
    CorruptionConfig,
    DataConfig,
    EvaluationConfig,
    HardwareConfig,
    ModelConfig,
    RunConfig,
    TokenizerConfig,
)
from resilient_t5.data.corruption.corruption import corrupt
from resilient_t5.data.corruption.token_table import build_token_table
from resilient_t5.data.counter_rng import order
from resilient_t5.data.store.prepare import prepare
from resilient_t5.data.store.store import Store
from resilient_t5.model.load import SpecialIds, build_model, save_model

MT5_ROWS = 250_112
EXAMPLES_PER_UPDATE = 16


@dataclass(frozen=True)
class Setup:
    """Paths and sizes for all sides. Plain values, because it is sent to other processes."""

    store: str
    model: str
    scratch: str
    data: DataConfig
    device: str
    memory_gib: float | None
    updates: int
    """Timed updates of the tuned Trainer and of ours."""
    script_updates: int
    """Timed updates of the script; each takes about ten times as long."""
    warm_updates: int
    micro_tokens: int | Literal["auto"] = "auto"
    """For ours."""
    micro_examples: int = EXAMPLES_PER_UPDATE
    """For the tuned Trainer."""
    pad_multiple: int | Literal["auto"] = "auto"
    """Of ours: lengths are padded to a multiple of this."""
    pack: bool | Literal["auto"] = "auto"
    """Of ours: several examples in each row."""
    graphs: bool | Literal["auto"] = "auto"
    """Of ours: forward and backward as CUDA graphs."""
    checkpointing: bool | Literal["auto"] = "auto"
    """Of ours: recompute the layers in the backward pass."""
    deterministic: bool = False
    """Of ours: deterministic GPU kernels only."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of ours: number format of the matrix products."""
    examples_per_update: int = EXAMPLES_PER_UPDATE
    time_s: float | None = None
    """End the timed updates after about this time; None times all of them. Only benchmarks/card.py sets it."""
    deadline_s: float | None = None
    """On the monotonic clock: the timed updates end then, after at least one."""
    multiprocessors: int | None = None
    """Use only so many multiprocessors of the GPU; see limits.py."""
    limited_by: Literal["context", "stream"] = "context"
    """How: see limits.py."""

    def config(self, seed: int) -> Config:
        """Return our configuration: the defaults with this store and model."""
        return Config(
            data=dataclasses.replace(self.data, store=self.store),
            tokenizer=TokenizerConfig(name_or_path=str(Path(self.store) / "tokenizer")),
            model=ModelConfig(name_or_path=self.model, gradient_checkpointing=self.checkpointing),
            corruption=CorruptionConfig(),
            batch=BatchConfig(
                examples_per_update=self.examples_per_update,
                micro_tokens=self.micro_tokens,
                pad_multiple=self.pad_multiple,
                pack=self.pack,
            ),
            evaluation=EvaluationConfig(every=10**9, examples=1, restore_examples=0),
            checkpoint=CheckpointConfig(every_minutes=None, every_updates=None),
            hardware=HardwareConfig(
                device=self.device,
                precision=self.precision,
                graphs=self.graphs,
                deterministic=self.deterministic,
                memory_gib="auto" if self.memory_gib is None else self.memory_gib,
            ),
            run=RunConfig(dir=self.scratch, seed=seed),
        )


def make_store(data: DataConfig, tokenizer: TokenizerConfig, model: ModelConfig, directory: Path) -> Store:
    """Prepare the corpus, or open an existing store."""
    return prepare(Config(data=dataclasses.replace(data, store=str(directory)), tokenizer=tokenizer, model=model), directory)


def make_model(store: Store, settings: ModelConfig, rows: int, directory: Path) -> None:
    """Write a model with random weights and `rows` vocabulary rows, for `from_pretrained` and for our loader."""
    special = SpecialIds(store.tokenizer.pad_id, store.tokenizer.eos_id, decoder_start_id=store.tokenizer.pad_id)
    directory.mkdir()
    save_model(build_model(settings, vocabulary_rows=rows, special=special, seed=1), directory)


@dataclass(frozen=True)
class MaskedExamples(Dataset):  # type: ignore[type-arg]
    """Dataset for a Trainer: examples masked by our corruption, in full-vocabulary ids. Ragged, like `Corrupted`."""

    source: np.ndarray
    source_offsets: np.ndarray
    target: np.ndarray
    target_offsets: np.ndarray
    rows: np.ndarray
    """Selected examples, in order."""

    def only(self, rows: np.ndarray) -> "MaskedExamples":
        """Select examples `rows` of the epoch, in this order."""
        return dataclasses.replace(self, rows=np.asarray(rows))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> dict[str, Any]:
        row = int(self.rows[position])
        source = self.source[self.source_offsets[row] : self.source_offsets[row + 1]].tolist()
        target = self.target[self.target_offsets[row] : self.target_offsets[row + 1]].tolist()
        return {"input_ids": source, "attention_mask": [1] * len(source), "labels": target}


def masked_epoch(setup: Setup, seed: int, examples: int | None = None) -> MaskedExamples:
    """Return the first epoch in the order of our run with this seed, or its first `examples`.

    Masks are a function of (seed, epoch, example), so our run with this seed trains on the same masked examples.
    """
    store = Store.open(Path(setup.store))
    count = len(store.train) if examples is None else min(examples, len(store.train))
    return masked(setup, seed, order(seed, 0, np.arange(count), len(store.train)))


def masked(setup: Setup, seed: int, ids: np.ndarray) -> MaskedExamples:
    """Return these examples of the training split with the masks of the first epoch of our run with this seed."""
    config, store = setup.config(seed), Store.open(Path(setup.store))
    table = build_token_table(store.tokenizer, store.active_to_full, None)
    settings = {"settings": config.corruption, "data": config.data, "table": table}
    drawn = corrupt(store.train, ids, np.zeros(len(ids), np.int64), seed=seed, **settings)
    to_full = store.active_to_full
    return MaskedExamples(
        to_full[drawn.encoder_ids], drawn.encoder_offsets, to_full[drawn.target], drawn.target_offsets, np.arange(len(ids))
    )
