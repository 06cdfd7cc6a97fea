"""The peers on transformers 5.x: the script that many users start from, and a carefully tuned Seq2SeqTrainer.

The script pads everything to the maximum, includes pads in the loss, and uses 2 x 8 examples, gradient checkpointing, fp16 on
a GPU, and the defaults of transformers. Only names that transformers 5 removed were changed. With `corrected`, pads are masked
and the loss is divided by the accumulation steps: Seq2SeqTrainer assumes that T5 does this itself, but it does not.

The tuned Trainer pads to the longest example of a batch, groups examples by length, and uses sdpa, fused AdamW, 16 examples
per batch (or the faster size found by --search), no checkpointing, bf16 where the device supports it, and the corrected loss
scale.
"""

import warnings
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
from benchmarks.peers.processes import Meter, cap_memory
from benchmarks.peers.setup import EXAMPLES_PER_UPDATE, Setup, masked_epoch
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
    """Start the meter after the warm-up and stop it after the last update."""

    def __init__(self, meter: Meter, warm: int, last: int):
        self.meter, self.warm, self.last = meter, warm, last
        self.figures: dict[str, float] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called after every update."""
        if state.global_step == self.warm:
            self.meter.start()
        if state.global_step == self.last:
            self.figures = self.meter.stop()


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
    return _train(setup, data, collator, settings, updates=setup.script_updates, corrected=corrected)


def run_tuned(setup: Setup, seed: int) -> dict[str, Any]:
    """Measure the timed updates of the tuned Trainer in this process.

    The batches are those of group_by_length for the first 50 updates, which transformers sorts together: the same examples as
    in our first window of 50 updates. With fewer timed updates, batches are taken at equal distances, because the sorted
    examples begin with the longest batch and end with the shortest.
    """
    examples = masked_epoch(setup, seed)
    stretch = min(MEGABATCH_UPDATES, len(examples) // EXAMPLES_PER_UPDATE)
    lengths = np.diff(examples.source_offsets)[: stretch * EXAMPLES_PER_UPDATE].tolist()
    grouped = get_length_grouped_indices(lengths, EXAMPLES_PER_UPDATE, mega_batch_mult=stretch)
    batches = np.array(grouped).reshape(stretch, EXAMPLES_PER_UPDATE)
    timed = ((np.arange(setup.updates) + 0.5) * stretch / setup.updates).astype(int)
    warm = np.full(setup.warm_updates, stretch // 2)
    tokenizer = AutoTokenizer.from_pretrained(Path(setup.store) / "tokenizer")
    collator = Dynamic(DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100))
    device = choose_device(setup.device)
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    settings = {
        "per_device_train_batch_size": setup.micro_examples,
        "gradient_accumulation_steps": EXAMPLES_PER_UPDATE // setup.micro_examples,
        "optim": "adamw_torch_fused",
        "bf16": native,
        "fp16": device.type == "cuda" and not native,
        "train_sampling_strategy": "sequential",
        "dataloader_num_workers": 0,
        "logging_steps": 100,
    }
    data = examples.only(batches[np.concatenate([warm, timed])].ravel())
    return _train(setup, data, collator, settings, updates=setup.updates, corrected=True)


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


def _train(
    setup: Setup, data: Any, collator: Padded | Dynamic, settings: dict[str, Any], *, updates: int, corrected: bool
) -> dict[str, Any]:
    device = choose_device(setup.device)
    cap_memory(device, setup.memory_gib)
    quiet()
    meter, last = Meter(device), setup.warm_updates + updates
    model = MT5ForConditionalGeneration.from_pretrained(setup.model, dtype=torch.float32, attn_implementation="sdpa")
    clock = Clock(meter, setup.warm_updates, last)
    whole = {**settings, "max_steps": last}
    trainer = build_trainer(model, whole, setup.scratch, device, train_dataset=data, data_collator=collator, callbacks=[clock])
    if corrected:
        trainer.loss_is_scaled_for_ga = False
    meter.forget_peak()
    trainer.train()
    per_update = len(collator.given) // last
    timed = collator.given[setup.warm_updates * per_update : last * per_update]
    checkpointing = bool(settings.get("gradient_checkpointing"))
    return clock.figures | {
        "updates": updates,
        "examples": sum(shape.examples for shape, _ in timed),
        "target_tokens": sum(target for _, lengths in timed for _, target in lengths),
        "useful_flops": sum(useful_flops(model.config, lengths) for _, lengths in timed),
        "flops": sum(peer_flops(model.config, shape, checkpointing=checkpointing) for shape, _ in timed),
        "vocabulary_rows": model.config.vocab_size,
        "loss": trainer.state.log_history[-1].get("train_loss"),
    }
