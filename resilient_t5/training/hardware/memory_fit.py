"""Fit a run to its memory: resolve `batch.micro_tokens: auto` and `model.gradient_checkpointing: auto`.

The choice depends on the model, the longest example of the store and the memory, and does not change the sums of an update.
Dropout is drawn per micro-batch, so a run that resumes with less free memory may draw different dropout than an
uninterrupted run; a fixed `batch.micro_tokens` rules that out.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from resilient_t5.config.schema import Config
from resilient_t5.data.ragged import Split
from resilient_t5.data.store.store import Store
from resilient_t5.errors import ConfigError
from resilient_t5.host_memory import available_bytes
from resilient_t5.model.memory import (
    FREE_SHARE,
    GIB,
    Choice,
    Execution,
    LargestShape,
    Memory,
    Task,
    choice_at,
    choose_micro_tokens,
)
from resilient_t5.model.precision import PrecisionName
from resilient_t5.model.shapes import Sizes, sizes_of_settings
from resilient_t5.training.hardware.process_group import SINGLE_PROCESS, ProcessGroup


@dataclass(frozen=True)
class Fit:
    """The chosen execution, its inputs, and the reason."""

    choice: Choice
    sizes: Sizes
    task: Task
    memory: Memory
    why: str
    processes: int = 1
    """Number of processes that the layers are sharded over."""

    def warnings(self) -> list[str]:
        """Warnings for the start banner."""
        if self.choice.fits:
            return []
        excess = (self.choice.needed - self.memory.usable) / GIB
        return [f"the plan needs {excess:.2f} GiB more than the usable memory; bin/plan lists what fits"]

    def missing_beside_graphs(self, free: float, reserved: float) -> float:
        """Bytes missing for optimizer state and evaluation, once weights, gradients and CUDA graphs exist; 0 or less: none.

        The plan assumes that a pass frees its memory, but graphs keep it.

        Args:
            free: bytes that the device has left.
            reserved: bytes that this process has allocated, to be subtracted from the planned memory.
        """
        peak = self.choice.peak
        left = min(free * (1 - FREE_SHARE), self.memory.usable - reserved)
        return self.choice.evaluation - peak.weights - peak.gradients - left


def fit_run(
    config: Config,
    store: Store,
    device: torch.device,
    precision: PrecisionName,
    ranks: ProcessGroup = SINGLE_PROCESS,
    *,
    largest_shape: LargestShape | None = None,
) -> Fit:
    """Resolve the `auto` settings for a run over `store` on `device`; the same result on every rank.

    Args:
        largest_shape: of packed rows; None if rows are not packed.

    Raises:
        ConfigError, DataError: the model cannot be found or read.
    """
    memory = memory_of(config, device, ranks.local_count)
    # All ranks need the same micro-batches, so the one with the least memory decides.
    totals = [message["total"] for message in ranks.all_gather_object("plan", {"total": memory.total})]
    memory = replace(memory, total=min(totals))
    task = task_of(config, store)
    sizes = sizes_of_settings(config.model, trained_rows(config, store))
    return fit(config, sizes, task, memory, precision, ranks.count, largest_shape)


def fit(
    config: Config,
    sizes: Sizes,
    task: Task,
    memory: Memory,
    precision: PrecisionName,
    processes: int = 1,
    largest_shape: LargestShape | None = None,
) -> Fit:
    """Resolve the `auto` settings; `gradient_checkpointing: auto` recomputes only if the run does not fit otherwise.

    With 16-bit products the weights are kept in that format too if that fits without recomputation.

    Args:
        processes: processes of the run; they share the layers if `hardware.shard_layers` is set.
        largest_shape: of packed rows; None if rows are not packed.

    Raises:
        ConfigError: adafactor_in_backward with a `batch.micro_tokens` that may split an update.
    """
    micro_tokens = config.batch.micro_tokens
    checkpointing = config.model.gradient_checkpointing
    whole_update = task.longest * task.examples_per_update
    shards = processes if config.hardware.shard_layers else 1
    if config.optim.name == "adafactor_in_backward" and micro_tokens != "auto" and int(micro_tokens) < whole_update:
        raise ConfigError(
            f"batch.micro_tokens: {micro_tokens} may split an update of {task.examples_per_update} examples of up to"
            f" {task.longest} tokens, and adafactor_in_backward cannot accumulate gradients; set it to auto or {whole_update}"
        )
    candidates: list[Choice] = []
    may_copy = precision != "fp32" and shards == 1 and config.optim.name != "adafactor_in_backward"
    for recomputes in (False, True) if checkpointing == "auto" else (bool(checkpointing),):
        tried: list[Choice] = []
        for copies in (True, False) if may_copy and not recomputes else (False,):
            execution = Execution(
                precision, recomputes, memory.on_gpu, processes=shards, copies=copies, packed=largest_shape is not None
            )
            if micro_tokens == "auto":
                found = choose_micro_tokens(sizes, task, memory, execution, config.optim.name, largest_shape)
            else:
                found = choice_at(sizes, task, memory, execution, config.optim.name, int(micro_tokens), largest_shape)
            tried.append(found)
        # Larger micro-batches are worth more than copies.
        candidates.append(max(tried, key=lambda choice: (choice.fits, choice.micro_tokens)))
    choice = next((choice for choice in candidates if choice.fits), candidates[-1])
    kind = "GPU" if memory.on_gpu else "CPU"
    why = (
        f"needs {choice.needed / GIB:.2f} of {memory.usable / GIB:.2f} usable GiB on this {kind},"
        f" for examples of up to {task.source_tokens} + {task.target_tokens} tokens"
    )
    if checkpointing == "auto" and choice.checkpointing:
        why += f"; without checkpointing {candidates[0].needed / GIB:.2f} GiB"
    return Fit(choice, sizes, task, memory, why, shards)


def trained_rows(config: Config, store: Store) -> int | None:
    """Vocabulary rows that the run trains; None for all rows of a checkpoint."""
    if config.model.active_vocabulary == "corpus":
        return len(store.active_to_full)
    return None if config.model.name_or_path is not None else store.tokenizer.size


def task_of(config: Config, store: Store) -> Task:
    """Upper bounds of source and target lengths in the store under this configuration's corruption."""
    bounds = [_longest(config, split) for split in (store.train, store.validation)]
    source, target = (max(lengths) for lengths in zip(*bounds, strict=True))
    return Task(source, target, config.batch.examples_per_update)


def _longest(config: Config, split: Split) -> tuple[int, int]:
    """Upper bounds of the source and target tokens of a split, end marks included."""
    lengths, pairs = np.diff(split.offsets), np.asarray(split.pairs)
    paired = pairs >= 0
    whole = int(lengths[~paired].max(initial=0))
    # Doubled characters make a source longer than its text; masking never does.
    source = max(math.ceil(whole * (1 + config.corruption.noise_ratio)), int(pairs.max(initial=0))) + 1
    most_masked = config.corruption.mask_ratio + config.corruption.mask_ratio_spread
    masked = math.ceil(whole * most_masked) + config.corruption.max_sentinels + 1
    target = whole if config.corruption.task == "correct" else masked
    target = max(target, int((lengths - pairs)[paired].max(initial=0))) + 1
    return min(source, config.data.max_source_tokens), min(target, config.data.max_target_tokens)


def memory_of(config: Config, device: torch.device, sharing: int = 1) -> Memory:
    """The memory to plan for: `hardware.memory_gib`, or what is free on the device now.

    Main memory is divided by the `sharing` processes on this machine; a GPU belongs to one process.
    """
    on_gpu, memory_gib = device.type == "cuda", config.hardware.memory_gib
    if memory_gib != "auto":
        return Memory(float(memory_gib) * GIB, on_gpu)
    if on_gpu:
        return Memory(float(torch.cuda.mem_get_info(device)[0]), on_gpu, context_counted=False)
    return Memory(available_bytes() / sharing, on_gpu)
