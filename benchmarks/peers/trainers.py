"""The peers on transformers 5.x: the script that many users start from, and a carefully tuned Seq2SeqTrainer.

The script pads everything to the maximum, includes pads in the loss, and uses 2 x 8 examples, gradient checkpointing, fp16 on
a GPU, and the defaults of transformers. Only names that transformers 5 removed were changed. With `corrected`, pads are masked
and the loss is divided by the accumulation steps: Seq2SeqTrainer assumes that T5 does this itself, but it does not.

The tuned Trainer pads to the longest example of a batch, groups examples by length, and uses sdpa, fused AdamW, 16 examples
per batch (or the faster size found by --search), no checkpointing, bf16 where the device supports it, and the corrected loss
scale.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    MT5ForConditionalGeneration,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
)
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import get_length_grouped_indices

from benchmarks.peers.flops import MicroShape, peer_flops, useful_flops
from benchmarks.peers.limits import limit_device
from benchmarks.peers.processes import Meter
from benchmarks.peers.setup import EXAMPLES_PER_UPDATE, MaskedExamples, Setup, masked_epoch
from resilient_t5.training.hardware.machine import choose_device

MEGABATCH_UPDATES = 50  # transformers sorts this many batches by length together
Features = list[dict[str, Any]]


def _lengths(features: Features) -> list[tuple[int, int]]:
    """Return the (source, target) tokens of each example."""
    return [(len(row["input_ids"]), len(row["labels"])) for row in features]


@dataclass
class Padded:
    """Collator of the script: pads every example to the maximum. Records the shapes."""

    source: int
    target: int
    pad_id: int
    label_pad: int
    given: list[tuple[MicroShape, list[tuple[int, int]]]] = field(default_factory=list)

    def __call__(self, features: Features) -> dict[str, torch.Tensor]:
        def full(name: str, width: int, value: int) -> torch.Tensor:
            return torch.tensor([row[name] + [value] * (width - len(row[name])) for row in features])

        shape = MicroShape(len(features), self.source, self.target, len(features) * self.target)
        self.given.append((shape, _lengths(features)))
        return {
            "input_ids": full("input_ids", self.source, self.pad_id),
            "attention_mask": full("attention_mask", self.source, 0),
            "labels": full("labels", self.target, self.label_pad),
        }


@dataclass
class Dynamic:
    """DataCollatorForSeq2Seq that records the shapes."""

    collator: DataCollatorForSeq2Seq
    given: list[tuple[MicroShape, list[tuple[int, int]]]] = field(default_factory=list)

    def __call__(self, features: Features) -> Any:
        lengths = _lengths(features)
        batch = self.collator(features)
        (examples, source), target = batch["input_ids"].shape, batch["labels"].shape[1]
        self.given.append((MicroShape(examples, source, target, examples * target), lengths))
        return batch


class Clock(TrainerCallback):
    """Start the meter after the warm-up; stop it after the last update, or when the time of `setup` is over."""

    def __init__(self, meter: Meter, setup: Setup, last: int):
        self.meter, self.setup, self.warm, self.last = meter, setup, setup.warm_updates, last
        self.figures: dict[str, float] = {}
        self.updates = 0
        """Timed updates."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called after every update."""
        if state.global_step == self.warm:
            self.meter.start()
        self.updates = state.global_step - self.warm
        is_late = self.meter.is_late(self.updates, self.setup.time_s, self.setup.deadline_s)
        if not self.figures and (state.global_step == self.last or is_late):
            self.figures = self.meter.stop()
            control.should_training_stop = True


def run_script(setup: Setup, seed: int, corrected: bool) -> dict[str, Any]:
    """Measure the timed updates of the script in this process."""
    examples = masked_epoch(setup, seed)
    count = (setup.warm_updates + setup.script_updates) * EXAMPLES_PER_UPDATE
    label_pad = -100 if corrected else 0
    collator = Padded(setup.data.max_source_tokens, setup.data.max_target_tokens, 0, label_pad)
    cuda = choose_device(setup.device).type == "cuda"
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": EXAMPLES_PER_UPDATE // 2,
        "gradient_checkpointing": True,
        "fp16": cuda,
        "logging_steps": 100,
    }
    data = examples.only(np.arange(count) % len(examples))
    return train_timed(setup, data, collator, settings, updates=setup.script_updates, corrected=corrected)


def run_tuned(setup: Setup, seed: int) -> dict[str, Any]:
    """Measure the timed updates of the tuned Trainer in this process.

    The batches are those of group_by_length for the first 50 updates, which transformers sorts together: the same examples as
    in our first window of 50 updates. With fewer timed updates, batches are taken at equal distances, because the sorted
    examples begin with the longest batch and end with the shortest.
    """
    examples, batches = tuned_batches(setup, seed)
    stretch = len(batches)
    timed = ((np.arange(setup.updates) + 0.5) * stretch / setup.updates).astype(int)
    warm = np.full(setup.warm_updates, stretch // 2)
    data = examples.only(batches[np.concatenate([warm, timed])].ravel())
    return train_timed(setup, data, tuned_collator(setup), tuned_settings(setup), updates=setup.updates, corrected=True)


def tuned_batches(setup: Setup, seed: int) -> tuple[MaskedExamples, np.ndarray]:
    """Return the examples of our first window of 50 updates, and their rows grouped by length: (updates, examples).

    The first batch has the longest examples, the last one the shortest.
    """
    per_update = setup.examples_per_update
    examples = masked_epoch(setup, seed, MEGABATCH_UPDATES * per_update)
    stretch = min(MEGABATCH_UPDATES, len(examples) // per_update)
    lengths = np.diff(examples.source_offsets)[: stretch * per_update].tolist()
    grouped = get_length_grouped_indices(lengths, per_update, mega_batch_mult=stretch)
    return examples, np.array(grouped).reshape(stretch, per_update)


def tuned_collator(setup: Setup) -> Dynamic:
    """Return the collator of the tuned Trainer: pads to the longest example of a batch."""
    tokenizer = AutoTokenizer.from_pretrained(Path(setup.store) / "tokenizer")
    return Dynamic(DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100))


def tuned_settings(setup: Setup) -> dict[str, Any]:
    """Return the arguments of the tuned Trainer on the device of `setup`."""
    device = choose_device(setup.device)
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return {
        "per_device_train_batch_size": setup.micro_examples,
        "gradient_accumulation_steps": setup.examples_per_update // setup.micro_examples,
        "optim": "adamw_torch_fused",
        "bf16": native,
        "fp16": device.type == "cuda" and not native,
        "train_sampling_strategy": "sequential",
        "dataloader_num_workers": 0,
        "logging_steps": 100,
    }


def quiet() -> None:
    """Disable progress bars and warnings of transformers, so that the table stays readable."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)


def build_trainer(
    model: MT5ForConditionalGeneration, settings: dict[str, Any], scratch: str, device: torch.device, **parts: Any
) -> Seq2SeqTrainer:
    """Build a Seq2SeqTrainer that neither saves nor reports."""
    arguments = Seq2SeqTrainingArguments(
        output_dir=scratch,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        learning_rate=5e-5,
        **settings,
    )
    trainer = Seq2SeqTrainer(model=model, args=arguments, **parts)
    trainer.remove_callback(PrinterCallback)
    return trainer


def train_timed(
    setup: Setup,
    data: Any,
    collator: Padded | Dynamic,
    settings: dict[str, Any],
    *,
    updates: int,
    corrected: bool,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Measure `updates` updates of a Trainer after its warm-up, in this process.

    Returns:
        The figures; without `wall_s` if a callback ended the training before a timed update.
    """
    device = choose_device(setup.device)
    limit_device(device, setup)
    quiet()
    meter, last = Meter(device), setup.warm_updates + updates
    model = MT5ForConditionalGeneration.from_pretrained(setup.model, dtype=torch.float32, attn_implementation="sdpa")
    clock = Clock(meter, setup, last)
    whole, called = {**settings, "max_steps": last}, [clock, *callbacks]
    trainer = build_trainer(model, whole, setup.scratch, device, train_dataset=data, data_collator=collator, callbacks=called)
    if corrected:
        trainer.loss_is_scaled_for_ga = False
    meter.forget_peak()
    trainer.train()
    per_update = settings.get("gradient_accumulation_steps", 1)
    first = setup.warm_updates * per_update
    timed = collator.given[first : first + clock.updates * per_update]
    checkpointing = bool(settings.get("gradient_checkpointing"))
    return clock.figures | {
        "updates": clock.updates,
        "examples": sum(shape.examples for shape, _ in timed),
        "source_tokens": sum(source for _, lengths in timed for source, _ in lengths),
        "target_tokens": sum(target for _, lengths in timed for _, target in lengths),
        "useful_flops": sum(useful_flops(model.config, lengths) for _, lengths in timed),
        "flops": sum(peer_flops(model.config, shape, checkpointing=checkpointing) for shape, _ in timed),
        "vocabulary_rows": model.config.vocab_size,
        "loss": trainer.state.log_history[-1].get("train_loss"),
    }
