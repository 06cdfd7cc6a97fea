"""Out of memory in an update: met once by smaller micro-batches, then told with what would help.

What stays equal when an update is done again with half the micro-batches: its examples, their corruption, its divisor,
and so its gradient, up to the order in which it is summed. What does not: dropout, which is drawn for each micro-batch,
so with dropout the rest of the run is another draw of the same run. The smaller size stays for the rest of the process.
With layers that are cut over processes nothing is done again: the others are in a pass that this one cannot end.
"""

from collections.abc import Iterator

import torch

from resilient_t5.data.batches import MicroBatch, Prefetcher
from resilient_t5.errors import OutOfMemory
from resilient_t5.model.memory import GIB, Choice, Execution, choice_at
from resilient_t5.model.optimizer import AdafactorInBackward
from resilient_t5.training.hardware.machine import is_out_of_memory
from resilient_t5.training.hardware.memory_fit import memory_of
from resilient_t5.training.run import Run
from resilient_t5.training.signals import StopSignal
from resilient_t5.training.state import UpdateResult


def update_within_memory(run: Run, stop: StopSignal, micro_batches: list[MicroBatch]) -> UpdateResult | None:
    """Do the next update; when memory runs out, once in this process, do it again whole with half the micro-batches.

    Raises:
        OutOfMemory: it was not the first time, or no micro-batch can be cut any more, or the optimizer had begun to move.
    """
    result, failure = _attempt(run, stop, micro_batches)
    if failure is None:
        return result
    in_backward = isinstance(run.updater.optimizer, AdafactorInBackward)  # some weights have moved
    in_pass = run.updater.layers.is_sharded  # the others wait in it for what this process cannot give
    if run.memory_halved or in_backward or in_pass or all(len(micro_batch.example_ids) == 1 for micro_batch in micro_batches):
        raise _refusal(run, failure)
    _halve(run, micro_batches, failure)
    result, failure = _attempt(run, stop, run.batches.at(run.state.attempted))
    if failure is not None:
        raise _refusal(run, failure)
    return result


def _attempt(run: Run, stop: StopSignal, micro_batches: list[MicroBatch]) -> tuple[UpdateResult | None, str | None]:
    """The result of the update, or what the allocator said. The exception is dropped: its frames hold the tensors."""
    failure = None
    try:
        return run.updater(micro_batches, run.state.attempted, run.learning_rate(), lambda: stop.requested), None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        failure = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
    # A part of a micro-batch's gradient is worthless: the tables' gradients are added in place.
    run.updater.layers.drop_gradients()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    return None, failure


def _halve(run: Run, micro_batches: list[MicroBatch], failure: str) -> None:
    """Cut the largest micro-batch of this update in two, and all that follow as small; say so."""
    former = run.batches.micro_tokens
    # Groups of an update are often smaller than the budget; half of the budget would then leave them as they are.
    largest = max(found.padded_tokens for found in micro_batches if len(found.example_ids) > 1)
    run.batches.micro_tokens = max(1, min(former, largest) // 2)
    run.memory_halved = True
    run.saver.conditions["micro_tokens"] = run.batches.micro_tokens
    # What was read ahead is cut the old way.
    run.reader.close()
    run.reader = Prefetcher(run.batches, run.state.attempted + 1, run.config.batch.readers)
    values = {"micro_tokens": run.batches.micro_tokens, "former_micro_tokens": former, "why": failure}
    run.telemetry.row("guard", run.state.update, action="out of memory", attempted=run.state.attempted, **values)
    run.display.line(
        f"guard  update {run.state.update + 1} ran out of memory at micro_tokens {former}: all gradients dropped,"
        f" done again with {run.batches.micro_tokens}, which stays"
    )


def _refusal(run: Run, failure: str) -> OutOfMemory:
    """The error that ends the run, with the options in the order of what they cost."""
    now = _planned(run, run.fit.choice.optimizer, run.fit.choice.checkpointing, run.batches.micro_tokens)
    short = (now.needed - memory_of(run.config, run.device, run.ranks.local_count).usable) / GIB
    options = " | ".join(f"{setting} ({(option.needed - now.needed) / GIB:+.2f} GiB)" for setting, option in _options(run))
    return OutOfMemory(
        f"an update with micro_tokens {run.batches.micro_tokens} and sources of up to {run.fit.task.source_tokens} tokens"
        + (f" is about {short:.2f} GiB short" if short > 0 else " found no room"),
        where=failure,
        hint=f"Cheapest first: {options}" if options else "Take a smaller model or a larger machine; see bin/plan",
    )


def _options(run: Run) -> Iterator[tuple[str, Choice]]:
    """Settings that would need less, the cheapest first."""
    choice, micro_tokens = run.fit.choice, run.batches.micro_tokens
    smaller = max(run.fit.task.longest, micro_tokens // 2)
    if smaller < micro_tokens:
        yield f"--batch.micro_tokens {smaller}", _planned(run, choice.optimizer, choice.checkpointing, smaller)
    if not choice.checkpointing:
        yield "--model.gradient_checkpointing true", _planned(run, choice.optimizer, True, micro_tokens)
    if choice.optimizer == "adamw" and run.fit.processes == 1:
        # Another optimizer is another run; its weights can be taken over.
        yield "--optim.name adafactor with --run.fork", _planned(run, "adafactor", choice.checkpointing, micro_tokens)


def _planned(run: Run, optimizer: str, checkpointing: bool, micro_tokens: int) -> Choice:
    execution = Execution(run.precision.name, checkpointing, run.fit.memory.on_gpu, processes=run.fit.processes)
    return choice_at(run.fit.sizes, run.fit.task, run.fit.memory, execution, optimizer, micro_tokens)
