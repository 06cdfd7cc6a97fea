"""The two sides of `bin/benchmark card`, each measured in a new process: ours as bin/train runs it, and the tuned Trainer."""

import dataclasses
import gc
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from benchmarks.peers.flops import useful_flops
from benchmarks.peers.limits import limit_device
from benchmarks.peers.ours import open_config, open_run, run_update
from benchmarks.peers.processes import Meter
from benchmarks.peers.setup import Setup, masked
from benchmarks.peers.trainers import train_timed, tuned_batches, tuned_collator, tuned_settings
from resilient_t5.config.schema import Config
from resilient_t5.data.batches import MicroBatch
from resilient_t5.data.store.store import Store
from resilient_t5.training.hardware.machine import MIB, choose_device, is_out_of_memory
from resilient_t5.training.run import Run

GOLDEN = 0.618
"""Share of a window between two consecutive batches of the Trainer, so that every prefix has short and long ones."""


def measure_ours(setup: Setup, seed: int, warm_s: float) -> dict[str, Any]:
    """Figures of our side.

    The warm-up runs the timed updates, at most for `warm_s` seconds, so that every shape has occurred.
    """
    device = choose_device(setup.device)
    limit_device(device, setup)
    meter, started_s = Meter(device), time.perf_counter()
    run = open_run(setup, seed)
    opened_s = time.perf_counter() - started_s
    try:
        warmed = warm_up(run, setup, warm_s)
        run.prefetcher.restart(0)
        meter.forget_peak()
        meter.start()
        done: list[list[MicroBatch]] = []
        while len(done) < setup.updates and not meter.is_late(len(done), setup.time_s, setup.deadline_s):
            done.append(run_update(run))
        figures = meter.stop()
    finally:
        run.prefetcher.close()
        run.log.close()
    ids = np.concatenate([micro_batch.example_ids for update in done for micro_batch in update])
    figures |= warmed | tokens(done) | {"updates": len(done), "open_s": round(opened_s, 2)}
    return figures | described(run, setup, ids, seed)


def warm_up(run: Run, setup: Setup, warm_s: float) -> dict[str, Any]:
    """Run the first updates until `warm_s` have passed, at most once each; and at least `setup.warm_updates`."""
    started_s, count = time.perf_counter(), 0
    while count < setup.warm_updates or (count < setup.updates and time.perf_counter() - started_s < warm_s):
        run_update(run)
        count += 1
    return {"warm_updates": count, "warm_s": round(time.perf_counter() - started_s, 2)}


def tokens(done: list[list[MicroBatch]]) -> dict[str, Any]:
    """Tokens and micro-batches of updates."""
    parts = [micro_batch for update in done for micro_batch in update]
    useful, target = sum(int(part.useful_tokens) for part in parts), sum(int(part.target_tokens) for part in parts)
    return {
        "examples": sum(len(part.example_ids) for part in parts),
        "source_tokens": useful - target,
        "target_tokens": target,
        "useful_token_share": round(useful / sum(int(part.padded_tokens) for part in parts), 4),
        "micro_batches_per_update": round(len(parts) / len(done), 2),
    }


def described(run: Run, setup: Setup, ids: np.ndarray, seed: int) -> dict[str, Any]:
    """The plan of a run, and the operations that the examples `ids` of its first epoch need."""
    config, examples = run.updater.model.config, masked(setup, seed, ids)
    lengths = list(zip(np.diff(examples.source_offsets).tolist(), np.diff(examples.target_offsets).tolist(), strict=True))
    return {
        "vocabulary_rows": config.vocab_size,
        "useful_flops": useful_flops(config, lengths),
        "planned_peak_mib": round(run.fit.choice.peak.total / MIB, 1),
        "micro_tokens": run.fit.choice.micro_tokens,
        "checkpointing": run.fit.choice.checkpointing,
        "precision": run.precision.name,
    }


class WarmLimit(TrainerCallback):
    """End the training if its warm-up takes longer than `limit_s`; measure the warm-up otherwise."""

    def __init__(self, warm_updates: int, limit_s: float):
        self.warm_updates, self.limit_s = warm_updates, limit_s
        self.started_s = self.warm_s = math.nan
        self.updates = 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self.started_s = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called after every update."""
        passed_s = time.perf_counter() - self.started_s
        if state.global_step <= self.warm_updates:
            self.updates, self.warm_s = state.global_step, passed_s
        if state.global_step < self.warm_updates and passed_s > self.limit_s:
            control.should_training_stop = True


def measure_trainer(setup: Setup, seed: int, backend: str | None = None, warm_limit_s: float = math.inf) -> dict[str, Any]:
    """Figures of the tuned Trainer, at its largest batch that fits.

    Args:
        backend: of torch.compile; None runs it eagerly. The warm-up of a compiled model has every timed batch once.
        warm_limit_s: the figures have no `wall_s` if the warm-up takes longer.
    """
    return at_largest_batch(lambda own: _trainer(own, seed, backend, warm_limit_s), setup)


def at_largest_batch(measure: Callable[[Setup], dict[str, Any]], setup: Setup) -> dict[str, Any]:
    """Return `measure(setup)`, on a GPU with half of `micro_examples` as often as it runs out of memory."""
    while True:
        try:
            return measure(setup) | {"micro_examples": setup.micro_examples}
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or setup.micro_examples == 1 or setup.device == "cpu":
                raise
        # After the except block: the error holds references to the tensors of the failed attempt.
        gc.collect()
        torch.cuda.empty_cache()
        setup = dataclasses.replace(setup, micro_examples=setup.micro_examples // 2)


def _trainer(setup: Setup, seed: int, backend: str | None, warm_limit_s: float) -> dict[str, Any]:
    examples, batches = tuned_batches(setup, seed)
    timed = spread(len(batches))[: setup.updates]
    # On a GPU the first batch is the longest, so that the allocator's memory grows before the timed updates.
    usual = timed if setup.device == "cpu" else np.concatenate([[0], timed])
    warm = timed if backend else np.resize(usual, setup.warm_updates)
    limit = WarmLimit(len(warm), warm_limit_s)
    compiled = {"torch_compile": True, "torch_compile_backend": backend} if backend else {}
    figures = train_timed(
        dataclasses.replace(setup, warm_updates=len(warm)),
        examples.only(batches[np.concatenate([warm, timed])].ravel()),
        tuned_collator(setup),
        tuned_settings(setup) | compiled,
        updates=len(timed),
        corrected=True,
        callbacks=[limit],
    )
    return figures | {"warm_s": round(limit.warm_s, 2), "warm_updates": limit.updates}


def spread(count: int) -> np.ndarray:
    """The numbers 0 to count - 1 in an order whose every prefix is spread evenly over them."""
    step = next(s for s in range(max(1, round(GOLDEN * count)), 2 * count + 1) if math.gcd(s, count) == 1)
    return (count // 2 + step * np.arange(count)) % count


def measure_config(config: Config, updates: int, warm_updates: int, time_s: float, deadline_s: float) -> dict[str, Any]:
    """Figures of a run of any configuration, such as a model from scratch."""
    run = open_config(config)
    meter = Meter(run.device)
    try:
        for _ in range(warm_updates):
            run_update(run)
        meter.forget_peak()
        meter.start()
        done: list[list[MicroBatch]] = []
        while len(done) < updates and not meter.is_late(len(done), time_s, deadline_s):
            done.append(run_update(run))
        figures = meter.stop()
    finally:
        run.prefetcher.close()
        run.log.close()
    parameters = sum(parameter.numel() for parameter in run.updater.model.parameters())
    return figures | tokens(done) | {"updates": len(done), "parameters": parameters}


def active_rows(setup: Setup) -> int:
    """Vocabulary rows that the corpus of a setup uses."""
    return len(Store.open(Path(setup.store)).active_to_full)
