"""The first lines of a run: what will happen, with what, and what to be warned of; warnings last."""

import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from resilient_t5.checkpoint.retention import most_kept
from resilient_t5.training.convergence import unreachable
from resilient_t5.training.host import describe
from resilient_t5.training.run import Run


def banner_lines(run: Run, given: Mapping[str, tuple[Any, str]], resumed_from: str | None) -> Iterator[str]:
    """The start banner, line by line.

    Args:
        given: {key: (value, where it came from)} of the settings that differ from the defaults.
        resumed_from: name of the checkpoint that this process goes on from.
    """
    plan, store, batch = run.plan, run.store, run.config.batch
    report, model = store.report, run.updater.model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    rows, full = model.shared.weight.shape[0], store.tokenizer.size
    yield f"run    {run.directory}" + (f", resumed from {resumed_from}" if resumed_from else ", new")
    yield f"device {describe(run.device)} | {run.precision.name}: {run.precision.why}"
    yield f"model  {model.config.model_type}, {parameters / 1e6:.2f} M parameters, {rows} of {full} vocabulary rows"
    yield (
        f"data   {len(store.train)} training and {len(store.validation)} validation examples"
        f" | {report['tokens_per_character']:.2f} tokens a character | {report['terms']['found']} of"
        f" {report['terms']['listed']} terms found, {report['terms']['occurrences']} occurrences"
    )
    yield (
        f"plan   {plan.total_updates} updates of {batch.examples_per_update} examples, {plan.updates_per_epoch:.1f} an epoch"
        f" | warm-up {plan.warmup_updates} | evaluation every {plan.evaluate_every}"
    )
    rules = run.convergence.rules
    yield disk_line(run)
    yield memory_line(run)
    yield f"phases observed from {rules.start}, judged from {rules.judge_from}, patience {rules.patience} windows"
    for source in dict.fromkeys(source.partition(":")[0] for _, source in given.values()):
        settings = [f"{key} {value}" for key, (value, place) in given.items() if place.partition(":")[0] == source]
        yield f"set    by {source or 'default'}: {', '.join(settings)}"
    if run.saver.changed_conditions:
        changed = "; ".join(run.saver.changed_conditions)
        yield f"resume warning: the run goes on under other conditions, so not bit for bit: {changed}"
    if shutil.disk_usage(run.directory).free < most_kept(run.config.checkpoint.keep_last) * checkpoint_bytes(run):
        yield "plan warning: the disk may become full; lower checkpoint.keep_last, or see checkpoint.on_disk_full"
    yield from (f"plan warning: {warning}" for warning in run.fit.warnings())
    yield from (f"plan warning: {warning}" for warning in unreachable(rules, plan.total_updates, plan.evaluate_every))
    if run.config.evaluation.restore_examples and not report["terms"]["occurrences"]:
        yield "plan warning: no term of the list occurs in the corpus; the term restoration rate cannot be measured"


def memory_line(run: Run) -> str:
    """How an update is cut, and the memory that this needs."""
    choice = run.fit.choice
    checkpointing = "with" if choice.checkpointing else "without"
    return f"memory micro-batches of {choice.micro_tokens} tokens, {checkpointing} gradient checkpointing: {run.fit.why}"


def disk_line(run: Run) -> str:
    """How often is saved, how large a checkpoint will be, and how much of the disk they take at most."""
    settings, gib = run.config.checkpoint, 1 << 30
    often = [f"every {settings.every_updates} updates"] if settings.every_updates is not None else []
    often += [f"every {settings.every_minutes:g} min"] if settings.every_minutes is not None else []
    size, free = checkpoint_bytes(run), shutil.disk_usage(run.directory).free
    return (
        f"disk   saves {' and '.join(often) or 'the best and the last'}, about {size / gib:.3f} GiB each,"
        f" {most_kept(settings.keep_last) * size / gib:.2f} GiB at most, {free / gib:.1f} GiB free"
    )


def checkpoint_bytes(run: Run) -> int:
    """Size of a checkpoint once the optimizer has all its state: float32 weights, and moments."""
    weights = sum(parameter.numel() * 4 for parameter in run.updater.model.parameters())
    hundredths = {"adamw": 300, "adamw8bit": 151}.get(run.config.optim.name, 101)
    return weights * hundredths // 100
