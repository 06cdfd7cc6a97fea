"""What a run will do, told by a run or known before its model is built: plan in updates, phases, memory; and its first lines.

The lines say what will happen, with what, and what to be warned of; warnings last.
"""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resilient_t5.checkpoint.retention import max_kept
from resilient_t5.config.schema import Config
from resilient_t5.data.batches import Batches
from resilient_t5.data.dataset import Dataset
from resilient_t5.data.store.corpus_report import SHARE, WORTH_SHOWING, percent, unknown_warning
from resilient_t5.data.store.store import Store
from resilient_t5.model.memory import WIDE, optimizer_bytes
from resilient_t5.model.precision import Precision
from resilient_t5.training.build import batch_sizes, make_plan_and_rules
from resilient_t5.training.convergence.machine import Rules, unreachable
from resilient_t5.training.hardware.device import build_device
from resilient_t5.training.hardware.machine import describe
from resilient_t5.training.hardware.memory_fit import Fit, fit_run
from resilient_t5.training.run import Run
from resilient_t5.training.schedule import Plan


@dataclass(frozen=True)
class Preview:
    """What can be said of a run before its first update."""

    config: Config
    device: torch.device
    precision: Precision
    fit: Fit
    store: Store
    plan: Plan
    rules: Rules

    @property
    def directory(self) -> Path:
        """The run directory, which need not be there yet."""
        return Path(self.config.run.dir)


def preview_of(run: Run) -> Preview:
    """The outlook of a run that has been built."""
    return Preview(run.config, run.device, run.precision, run.fit, run.store, run.plan, run.convergence.rules)


def preview_over(config: Config, store: Store) -> Preview:
    """The outlook of the run that `config` asks for: no model is built or read, and nothing is written.

    One thing may still come out otherwise: a 16-bit format that was chosen for a GPU is tried when the model is there.

    Raises:
        ConfigError, DataError: a part cannot be built as it is configured.
    """
    device, precision, _ = build_device(config)
    corpus = Dataset.over(store, config)
    fit = fit_run(config, store, device, precision.name)
    sizes = batch_sizes(config, device, fit.choice.micro_tokens)
    batches = Batches(corpus.train, corpus.table, config, seed=config.run.seed, **sizes)
    return Preview(config, device, precision, fit, store, *make_plan_and_rules(config, batches))


def nearest_existing(path: Path) -> Path:
    """`path`, or the nearest directory above it that is there: its disk is the one that will be written to."""
    found = Path(os.path.abspath(path))
    while not found.is_dir():
        found = found.parent
    return found


GIB = 1 << 30


def banner_lines(
    outlook: Preview, given: Mapping[str, tuple[Any, str]], resumed_from: str | None, changed_conditions: Sequence[str] = ()
) -> Iterator[str]:
    """The start banner, line by line.

    Args:
        outlook: what will happen.
        given: {key: (value, where it came from)} of the settings that differ from the defaults.
        resumed_from: name of the checkpoint that the run goes on from.
        changed_conditions: what differs from the process that saved it, so that the bits may differ too.
    """
    plan, store, config = outlook.plan, outlook.store, outlook.config
    report = store.report
    yield f"run    {outlook.directory}" + (f", resumed from {resumed_from}" if resumed_from else ", new")
    yield f"device {describe(outlook.device)} | {outlook.precision.name}: {outlook.precision.why}"
    yield model_line(outlook)
    yield (
        f"data   {len(store.train)} training and {len(store.validation)} validation examples"
        f" | {report['tokens_per_character']:.2f} tokens a character | {report['terms']['found']} of"
        f" {report['terms']['listed']} terms found, {report['terms']['occurrences']} occurrences{_unknown_share(report)}"
    )
    yield (
        f"plan   {plan.total_updates} updates of {config.batch.examples_per_update} examples,"
        f" {plan.updates_per_epoch:.1f} an epoch | warm-up {plan.warmup_updates} | evaluation every {plan.evaluate_every}"
    )
    rules = outlook.rules
    yield disk_line(outlook)
    yield memory_line(outlook)
    yield f"phases observed from {rules.start}, judged from {rules.judge_from}, patience {rules.patience} windows"
    for source in dict.fromkeys(source.partition(":")[0] for _, source in given.values()):
        settings = [f"{key} {value}" for key, (value, place) in given.items() if place.partition(":")[0] == source]
        yield f"set    by {source or 'default'}: {', '.join(settings)}"
    if changed_conditions:
        changed = "; ".join(changed_conditions)
        yield f"resume warning: the run goes on under other conditions, so not bit for bit: {changed}"
    if free_bytes(outlook) < max_bytes(outlook):
        yield "plan warning: the disk may become full; lower checkpoint.keep_last, or see checkpoint.on_disk_full"
    yield from (f"plan warning: {warning}" for warning in outlook.fit.warnings())
    yield from (f"plan warning: {warning}" for warning in unreachable(rules, plan.total_updates, plan.evaluate_every))
    if (warning := unknown_warning(report)) is not None:
        yield f"plan warning: {warning}"
    if config.evaluation.restore_examples and not report["terms"]["occurrences"]:
        listed = "no term of the list occurs in the corpus" if report["terms"]["listed"] else "no list of terms (data.terms)"
        yield f"plan warning: {listed}; the term restoration rate cannot be measured"


def _unknown_share(report: Mapping[str, Any]) -> str:
    share = report.get(SHARE, 0.0)
    return f" | {percent(share)} of the characters without a piece" if share >= WORTH_SHOWING else ""


def process_lines(run: Run) -> Iterator[str]:
    """How many processes train this run; one is said too, since a launcher may have started fewer than was meant."""
    ranks = run.ranks
    if ranks.count == 1:
        yield "procs  1 process" + (", so hardware.shard_layers has no effect" if run.config.hardware.shard_layers else "")
        return
    yield f"procs  {ranks.count} processes, {ranks.local_count} on this machine, sums by {ranks.backend}"
    if run.updater.layers.is_sharded:
        yield (
            f"layers sharded over {ranks.count} processes with their gradients and optimizer state; replicated in every"
            " process: the vocabulary tables, and during evaluation and export all weights"
        )
    if (pieces := len(run.batches.at(run.state.attempted))) < ranks.count:
        yield (
            f"plan warning: an update has {pieces} micro-batches for {ranks.count} processes, so some have nothing to do;"
            " lower batch.micro_tokens or raise batch.examples_per_update"
        )


def model_line(outlook: Preview) -> str:
    """Which model, how large, and how much of the vocabulary it trains."""
    settings, sizes = outlook.config.model, outlook.fit.sizes
    name = settings.name_or_path or f"{settings.preset} from scratch"
    return (
        f"model  {name}, {sizes.parameters / 1e6:.2f} M parameters,"
        f" {sizes.rows} of {outlook.store.tokenizer.size} vocabulary rows"
    )


def memory_line(outlook: Preview) -> str:
    """How an update is cut, and the memory that this needs."""
    choice = outlook.fit.choice
    checkpointing = "with" if choice.checkpointing else "without"
    return f"memory micro-batches of {choice.micro_tokens} tokens, {checkpointing} gradient checkpointing: {outlook.fit.why}"


def disk_line(outlook: Preview) -> str:
    """How often is saved, how large a checkpoint will be, and how much of the disk they take at most."""
    settings = outlook.config.checkpoint
    often = [f"every {settings.every_updates} updates"] if settings.every_updates is not None else []
    often += [f"every {settings.every_minutes:g} min"] if settings.every_minutes is not None else []
    size = checkpoint_bytes(outlook)
    return (
        f"disk   saves {' and '.join(often) or 'the best and the last'}, about {size / GIB:.3f} GiB each,"
        f" {max_bytes(outlook) / GIB:.2f} GiB at most, {free_bytes(outlook) / GIB:.1f} GiB free"
    )


def max_bytes(outlook: Preview) -> int:
    """Most bytes that the checkpoints of the run take."""
    settings = outlook.config.checkpoint
    return max_kept(settings.keep_last) * checkpoint_bytes(outlook)


def free_bytes(outlook: Preview) -> int:
    """Free bytes of the disk that the run directory lies on, or will lie on."""
    return shutil.disk_usage(nearest_existing(outlook.directory)).free


def checkpoint_bytes(outlook: Preview) -> int:
    """Size of a checkpoint once the optimizer has all its state: float32 weights, and moments."""
    sizes = outlook.fit.sizes
    return int(WIDE * sizes.parameters + optimizer_bytes(sizes, outlook.config.optim.name))
