"""The start banner of a run: model, data, plan, disk and memory, then warnings. It needs no model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resilient_t5.checkpoint.retention import max_kept
from resilient_t5.config.schema import Config
from resilient_t5.data.dataset import Dataset
from resilient_t5.data.store.corpus_report import SHARE, WORTH_SHOWING, percent, unknown_warning
from resilient_t5.data.store.store import Store
from resilient_t5.files import free_bytes
from resilient_t5.model.memory import GIB, WIDE, optimizer_bytes
from resilient_t5.model.precision import Precision
from resilient_t5.training.build import make_plan_and_rules, plan_batches
from resilient_t5.training.convergence.machine import Rules, unreachable
from resilient_t5.training.hardware.device import build_device
from resilient_t5.training.hardware.machine import describe
from resilient_t5.training.hardware.memory_fit import Fit
from resilient_t5.training.hardware.sharding import ShardedModel
from resilient_t5.training.schedule import Plan


@dataclass(frozen=True)
class Preview:
    """What is known about a run before its first update."""

    config: Config
    device: torch.device
    precision: Precision
    fit: Fit
    store: Store
    plan: Plan
    rules: Rules
    shapes: Sequence[tuple[int, int, int]]
    """(rows, source tokens, target tokens) of packed micro-batches; empty if rows are not packed."""
    graphs_note: str = ""


def preview_over(config: Config, store: Store) -> Preview:
    """Return the preview of the run of `config` without building a model or writing a file.

    The run may still fall back to float32 if a 16-bit format fails on its first batches.

    Raises:
        ConfigError, DataError: a part cannot be built with these settings.
    """
    device, precision, _ = build_device(config)
    fit, _, batches = plan_batches(config, Dataset.over(store, config), device, precision)
    return Preview(config, device, precision, fit, store, *make_plan_and_rules(config, batches), batches.shapes)


def banner_lines(
    preview: Preview, given: Mapping[str, tuple[Any, str]], resumed_from: str | None, changed_conditions: Sequence[str] = ()
) -> Iterator[str]:
    """Yield the lines of the start banner.

    Args:
        preview: the run.
        given: {key: (value, source)} of the settings that differ from the defaults.
        resumed_from: name of the checkpoint that the run resumes from.
        changed_conditions: conditions that differ from those of the checkpoint, so that the resume is not exact.
    """
    plan, report, rules, config = preview.plan, preview.store.report, preview.rules, preview.config
    sizes, choice, terms = preview.fit.sizes, preview.fit.choice, report["terms"]
    unknown = report.get(SHARE, 0.0)
    yield f"run    {config.run.dir}" + (f", resumed from {resumed_from}" if resumed_from else ", new")
    yield f"device {describe(preview.device)} | {preview.precision.name}: {preview.precision.why}"
    model = config.model.name_or_path or f"{config.model.preset} from scratch"
    rows = f"{sizes.rows} of {preview.store.tokenizer.size} vocabulary rows"
    yield f"model  {model}, {sizes.parameters / 1e6:.2f} M parameters, {rows}"
    yield (
        f"data   {len(preview.store.train)} training and {len(preview.store.validation)} validation examples"
        f" | {report['tokens_per_character']:.2f} tokens a character | {terms['found']} of {terms['listed']} terms found,"
        f" {terms['occurrences']} occurrences"
        + (f" | {percent(unknown)} of the characters without a piece" if unknown >= WORTH_SHOWING else "")
    )
    yield (
        f"plan   {plan.total_updates} updates of {config.batch.examples_per_update} examples,"
        f" {plan.updates_per_epoch:.1f} an epoch | warm-up {plan.warmup_updates} | evaluation every {plan.evaluate_every}"
    )
    yield disk_line(preview)
    yield (
        f"memory micro-batches of {choice.micro_tokens} tokens, {'with' if choice.checkpointing else 'without'} gradient"
        f" checkpointing: {preview.fit.why}"
    )
    yield from _row_lines(preview)
    if preview.graphs_note:
        yield f"graphs {preview.graphs_note}"
    yield f"phases observed from {rules.start}, judged from {rules.judge_from}, patience {rules.patience} windows"
    for source in dict.fromkeys(source.partition(":")[0] for _, source in given.values()):
        settings = [f"{key} {value}" for key, (value, place) in given.items() if place.partition(":")[0] == source]
        yield f"set    by {source or 'default'}: {', '.join(settings)}"
    if changed_conditions:
        yield f"resume warning: conditions changed, so the resume is not bit for bit: {'; '.join(changed_conditions)}"
    yield from (f"plan warning: {warning}" for warning in _warnings(preview))


def _row_lines(preview: Preview) -> Iterator[str]:
    """Yield the banner line about packed rows, if they are packed or were asked for."""
    if preview.shapes:
        (rows, *least), (*_, source, target) = preview.shapes[0], preview.shapes[-1]
        yield (
            f"rows   packed: several examples in a row, {len(preview.shapes)} shapes of {rows} rows from"
            f" {least[0]} + {least[1]} to {source} + {target} tokens a row"
        )
    elif preview.config.batch.pack is True:
        yield f"rows   not packed: {preview.config.optim.name} takes an update in one micro-batch"


def _warnings(preview: Preview) -> Iterator[str]:
    plan, report, config = preview.plan, preview.store.report, preview.config
    if free_bytes(Path(config.run.dir)) < max_bytes(preview):
        yield "the disk may become full; lower checkpoint.keep_last, or see checkpoint.on_disk_full"
    yield from preview.fit.warnings()
    yield from unreachable(preview.rules, plan.total_updates)
    if (warning := unknown_warning(report)) is not None:
        yield warning
    if config.evaluation.restore_examples and not report["terms"]["occurrences"]:
        reason = "no term of the list occurs in the corpus" if report["terms"]["listed"] else "no list of terms (data.terms)"
        yield f"{reason}; the term restoration rate cannot be measured"


def process_lines(sharded: ShardedModel, shard_layers: bool, pieces: int) -> Iterator[str]:
    """Yield the banner lines about the processes; also for one, because a launcher may have started fewer than intended.

    Args:
        sharded: the model and its process group.
        shard_layers: the setting.
        pieces: micro-batches of the next update.
    """
    group = sharded.ranks
    if group.count == 1:
        yield "procs  1 process" + (", so hardware.shard_layers has no effect" if shard_layers else "")
        return
    yield f"procs  {group.count} processes, {group.local_count} on this machine, sums by {group.backend}"
    if sharded.is_sharded:
        yield (
            f"layers sharded over {group.count} processes with their gradients and optimizer state; every process holds the"
            " whole vocabulary tables, and all weights during evaluation and export"
        )
    if pieces < group.count:
        yield (
            f"plan warning: an update has {pieces} micro-batches for {group.count} processes, so some are idle;"
            " lower batch.micro_tokens or raise batch.examples_per_update"
        )


def disk_line(preview: Preview) -> str:
    """Return the banner line about saves: their frequency, their size, and the disk space that they need at most."""
    settings = preview.config.checkpoint
    cadence = [f"every {settings.every_updates} updates"] if settings.every_updates is not None else []
    cadence += [f"every {settings.every_minutes:g} min"] if settings.every_minutes is not None else []
    saves = " and ".join(cadence) or "the best and the last"
    return (
        f"disk   saves {saves}, about {checkpoint_bytes(preview) / GIB:.3f} GiB each,"
        f" {max_bytes(preview) / GIB:.2f} GiB at most, {free_bytes(Path(preview.config.run.dir)) / GIB:.1f} GiB free"
    )


def checkpoint_bytes(preview: Preview) -> int:
    """Size of a checkpoint: float32 weights and optimizer state."""
    sizes = preview.fit.sizes
    return int(WIDE * sizes.parameters + optimizer_bytes(sizes, preview.config.optim.name))


def max_bytes(preview: Preview) -> int:
    """Maximum size of all checkpoints of the run."""
    return max_kept(preview.config.checkpoint.keep_last) * checkpoint_bytes(preview)
