"""Measure the peak memory of one update above weights and gradients, in the calling process."""

from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from benchmarks.peers.processes import Meter, resident_mib
from benchmarks.peers.setup import MT5_ROWS
from benchmarks.peers.trainers import build_trainer, quiet
from resilient_t5.config.schema import Config
from resilient_t5.config.sections import HardwareConfig, ModelConfig
from resilient_t5.data.batches import MicroBatch
from resilient_t5.model.embeddings import T5Model
from resilient_t5.model.load import SpecialIds, build_model
from resilient_t5.model.optimizer import build_optimizer
from resilient_t5.training.build import prepare_for_training
from resilient_t5.training.hardware.device import build_device
from resilient_t5.training.hardware.machine import MIB, choose_device
from resilient_t5.training.hardware.sharding import ShardedModel
from resilient_t5.training.update import Updater

EXAMPLES = 2


class Above:
    """Peak memory from `begin` to `end`, minus the memory in use before and minus the gradients."""

    def __init__(self, model: T5Model, device: torch.device, sizes: tuple[int, int]):
        self.model, self.sizes, self.meter = model, sizes, Meter(device)

    def begin(self) -> None:
        """Start: weights are on the device, gradients are not allocated."""
        assert all(parameter.grad is None for parameter in self.model.parameters())
        self.meter.forget_peak()
        self.before_mib = resident_mib(self.meter.device)
        self.meter.start()

    def end(self) -> dict[str, float]:
        """Stop: the gradients are complete, the optimizer has not run."""
        figures = self.meter.stop()
        peak_mib = figures["peak_mib"]
        if self.meter.device.type == "cuda":
            peak_mib = torch.cuda.max_memory_allocated(self.meter.device) / MIB
        gradients_mib = sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None) / MIB
        return {
            "above_mib": peak_mib - self.before_mib - gradients_mib,
            "cpu_s": figures["cpu_s"],
            "weights_mib": round(sum(p.nbytes for p in self.model.parameters()) / MIB, 1),
            "vocabulary_rows": self.model.config.vocab_size,
            "source_tokens": self.sizes[0],
            "target_tokens": self.sizes[1],
        }


def ours_above(model_name: str, quick: bool, device: str, micro_batches: int, scratch: str) -> dict[str, float]:
    """Measure our micro-batches in the updater, with the full vocabulary and gradient checkpointing."""
    settings, rows, sizes = _shape(model_name, quick)
    config = Config(
        model=ModelConfig(**settings, active_vocabulary="full", gradient_checkpointing=True),
        hardware=HardwareConfig(device=device, precision="fp32"),
    )
    where, precision, accelerator = build_device(config)
    model = prepare_for_training(_model(settings, rows), where, precision, checkpointing=True)
    updater = Updater(
        accelerator, ShardedModel(model), build_optimizer(model, config.optim, where), config.optim, config.run.seed
    )
    batches = [_micro_batch(number, rows, sizes) for number in range(micro_batches)]
    tokens, above = sum(batch.target_tokens for batch in batches), Above(model, where, sizes)
    above.begin()
    for index, batch in enumerate(batches):
        updater.accumulate(batch, tokens, 0, index)
    return above.end()


def trainer_above(model_name: str, quick: bool, device: str, micro_batches: int, scratch: str) -> dict[str, float]:
    """Measure the same micro-batches in Seq2SeqTrainer, with gradient checkpointing and the corrected loss scale."""
    quiet()
    settings, rows, sizes = _shape(model_name, quick)
    where = choose_device(device)
    model = _model(settings, rows)
    above, figures = Above(model, where, sizes), {}

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            above.begin()

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            figures.update(above.end())

    batches = [_micro_batch(number, rows, sizes) for number in range(micro_batches)]
    data = [
        {"input_ids": batch.source_BS[row], "attention_mask": batch.source_mask_BS[row], "labels": batch.labels_BT[row]}
        for batch in batches
        for row in range(EXAMPLES)
    ]
    arguments = {
        "per_device_train_batch_size": EXAMPLES,
        "gradient_accumulation_steps": micro_batches,
        "gradient_checkpointing": True,
        "max_steps": 1,
    }
    trainer = build_trainer(model, arguments, scratch, where, train_dataset=data, callbacks=[Watch()])
    trainer.loss_is_scaled_for_ga = False
    trainer.train()
    return figures


def _shape(model_name: str, quick: bool) -> tuple[dict[str, Any], int, tuple[int, int]]:
    """Return model settings, vocabulary rows, and (source, target) tokens."""
    if quick:
        return {"preset": "mt5-small", "d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 2}, 20_000, (64, 32)
    return {"preset": model_name}, MT5_ROWS, (512, 256)


def _model(settings: dict[str, Any], rows: int) -> T5Model:
    return build_model(ModelConfig(**settings), vocabulary_rows=rows, special=SpecialIds(0, 1, 0), seed=1)


def _micro_batch(number: int, rows: int, sizes: tuple[int, int]) -> MicroBatch:
    """Return a micro-batch of random ids without padding."""
    generator = torch.Generator().manual_seed(number)
    source, target = (torch.randint(2, rows, (EXAMPLES, length), generator=generator) for length in sizes)
    tokens = source.numel() + target.numel()
    return MicroBatch(
        source, torch.ones_like(source), target, np.arange(EXAMPLES), target.numel(), tokens, tokens, (2, rows - 1)
    )
