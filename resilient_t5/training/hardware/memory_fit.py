"""How a run is cut to fit its memory: `batch.micro_tokens: auto`, `model.gradient_checkpointing: auto`, and the reason.

A choice is a function of the model, the longest example of the store and the memory; it changes no sum of an update.
Dropout is drawn for each micro-batch, so a run that is resumed with less memory free than before may differ from the
undisturbed one in its dropout; a number in `batch.micro_tokens` rules that out.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from resilient_t5.config.schema import Config
from resilient_t5.data.store.store import Split, Store
from resilient_t5.errors import ConfigError
from resilient_t5.host_memory import available_bytes
from resilient_t5.model.memory import GIB, Choice, Execution, Memory, Task, choice_at, choose_micro_tokens
from resilient_t5.model.precision import PrecisionName
from resilient_t5.model.shapes import Sizes, sizes_of_settings
from resilient_t5.training.hardware.process_group import SINGLE_PROCESS, ProcessGroup


@dataclass(frozen=True)
class Fit:
    """The way of training that was chosen, what it was chosen for, and why."""

    choice: Choice
    sizes: Sizes
    task: Task
    memory: Memory
    why: str
    processes: int = 1
    """Those that the layers are cut over."""

    def warnings(self) -> list[str]:
        """What the banner must warn of."""
        if self.choice.fits:
            return []
        short = (self.choice.needed - self.memory.usable) / GIB
        return [f"the plan is {short:.2f} GiB above the memory that is there; see bin/plan for what would fit"]


def fit_run(
    config: Config, store: Store, device: torch.device, precision: PrecisionName, ranks: ProcessGroup = SINGLE_PROCESS
) -> Fit:
    """Resolve what the configuration leaves to the plan, for a run over `store` on `device`.

    Raises:
        ConfigError, DataError: the model cannot be found or read.
    """
    memory = memory_of(config, device, ranks.local_count)
    # The same cut in every process: what the one with the least memory can do.
    memory = replace(memory, total=ranks.all_reduce_min("plan", memory.total))
    task = task_of(config, store)
    sizes = sizes_of_settings(config.model, trained_rows(config, store))
    return fit(config, sizes, task, memory, precision, ranks.count)


def fit(config: Config, sizes: Sizes, task: Task, memory: Memory, precision: PrecisionName, processes: int = 1) -> Fit:
    """Resolve what the configuration leaves to the plan: without checkpointing where that fits, else with it.

    Args:
        processes: how many train the run; they share its layers where `hardware.shard_layers` says so.

    Raises:
        ConfigError: an optimizer that steps in the backward pass, and a budget that may cut its update.
    """
    asked, wanted = config.batch.micro_tokens, config.model.gradient_checkpointing
    if config.hardware.compile:
        wanted = False
    whole, cut_over = task.longest * task.examples_per_update, processes if config.hardware.shard_layers else 1
    if config.optim.name == "adafactor_in_backward" and asked != "auto" and int(asked) < whole:
        raise ConfigError(
            f"batch.micro_tokens: {asked} may cut an update of {task.examples_per_update} examples of up to {task.longest}"
            f" tokens, and adafactor_in_backward cannot accumulate; set it to auto or {whole}"
        )

    def run(checkpointing: bool) -> Execution:
        return Execution(precision, checkpointing, memory.on_gpu, processes=cut_over)

    tried = [
        _at(sizes, task, memory, run(checkpointing), config.optim.name, asked)
        for checkpointing in ((False, True) if wanted == "auto" else (bool(wanted),))
    ]
    choice = next((choice for choice in tried if choice.fits), tried[-1])
    kind = "GPU" if memory.on_gpu else "CPU"
    why = (
        f"needs {choice.needed / GIB:.2f} of {memory.usable / GIB:.2f} GiB that may be used on this {kind},"
        f" for examples of up to {task.source_tokens} + {task.target_tokens} tokens"
    )
    if wanted == "auto" and choice.checkpointing:
        why += f"; without checkpointing {tried[0].needed / GIB:.2f} GiB"
    return Fit(choice, sizes, task, memory, why, cut_over)


def _at(sizes: Sizes, task: Task, memory: Memory, run: Execution, optimizer: str, asked: int | str) -> Choice:
    if asked == "auto":
        return choose_micro_tokens(sizes, task, memory, run, optimizer)
    return choice_at(sizes, task, memory, run, optimizer, int(asked))


def trained_rows(config: Config, store: Store) -> int | None:
    """Vocabulary rows that the run trains; None for all rows of a checkpoint."""
    if config.model.active_vocabulary == "corpus":
        return len(store.active_to_full)
    return None if config.model.name_or_path is not None else store.tokenizer.size


def task_of(config: Config, store: Store) -> Task:
    """The longest example of the store, as this configuration corrupts it."""
    bounds = [_longest(config, split) for split in (store.train, store.validation) if len(split)]
    source, target = (max(of_split) for of_split in zip(*bounds, strict=True)) if bounds else _limits(config)
    return Task(source, target, config.batch.examples_per_update)


def _longest(config: Config, split: Split) -> tuple[int, int]:
    """Upper bounds of the source and target tokens of a split, end marks included."""
    most_source, most_target = _limits(config)
    lengths, pairs = np.diff(split.offsets), np.asarray(split.pairs)
    paired = pairs >= 0
    whole = int(lengths[~paired].max(initial=0))
    # Doubled characters make a source longer than its text; masking never does.
    source = max(math.ceil(whole * (1 + config.corruption.noise_ratio)), int(pairs.max(initial=0))) + 1
    most_masked = config.corruption.mask_ratio + config.corruption.mask_ratio_spread
    masked = math.ceil(whole * most_masked) + config.corruption.max_sentinels + 1
    target = whole if config.corruption.task == "correct" else masked
    target = max(target, int((lengths - pairs)[paired].max(initial=0))) + 1
    return min(source, most_source), min(target, most_target)


def _limits(config: Config) -> tuple[int, int]:
    return config.data.max_source_tokens, config.data.max_target_tokens


def memory_of(config: Config, device: torch.device, sharing: int = 1) -> Memory:
    """The memory to plan for: what the configuration says, else what the device has free now.

    Main memory is divided by the number of processes that are `sharing` it; a GPU belongs to one of them.
    """
    on_gpu, asked = device.type == "cuda", config.hardware.memory_gib
    if asked != "auto":
        return Memory(float(asked) * GIB, on_gpu)
    if on_gpu:
        return Memory(float(torch.cuda.mem_get_info(device)[0]), on_gpu, context_counted=False)
    return Memory(available_bytes() / sharing, on_gpu)
