"""`bin/train --dry_run`: print the plan without running it, or run the most expensive parts of the run once.

A rehearsal builds the run in a temporary directory on the disk of the run directory and deletes it afterwards. It runs two
updates of the longest examples, the first two updates of the run, one batch of evaluation, one of generation, and one save
that is loaded and compared bit for bit. So failures that would come after hours come at once.
"""

import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from resilient_t5.checkpoint.manager import CheckpointManager
from resilient_t5.checkpoint.retention import max_kept
from resilient_t5.config.schema import Config
from resilient_t5.data.batches import MicroBatch
from resilient_t5.data.store.fingerprint import identify
from resilient_t5.data.store.prepare import existing_store, prepare, store_directory
from resilient_t5.data.store.store import Store
from resilient_t5.errors import ExitCode, NoValidCheckpoint, StorageError
from resilient_t5.files import free_bytes, nearest_directory
from resilient_t5.model.memory import GIB
from resilient_t5.training.build import build_run
from resilient_t5.training.entrypoints.train import Given, close, named_checkpoint, preview_of
from resilient_t5.training.evaluator import evaluate, restore_terms
from resilient_t5.training.hardware.machine import MIB, memory_mib
from resilient_t5.training.reports.preview import banner_lines, preview_over
from resilient_t5.training.run import Run
from resilient_t5.training.run_directory import inspect
from resilient_t5.training.schedule import learning_rate, time_left
from resilient_t5.training.signals import STOPPING, Stopped, StopSignal, die_by, progress_callback
from resilient_t5.training.telemetry.console import Console
from resilient_t5.training.telemetry.run_log import RunLog
from resilient_t5.training.telemetry.timing import readable

TEMPORARY_PREFIX = ".dry_run-"


def write_plan(config: Config, given: Given, write_line: Callable[[str], None]) -> bool:
    """Print the banner of the run and write nothing; return False if the corpus is not prepared yet.

    Raises:
        ResilientError: an error that would keep the run from starting.
    """
    resumed_from = newest_checkpoint(config)
    store = existing_store(config, store_directory(config))
    if store is None:
        identify(config, None)  # raises if the text, the terms or the tokenizer is missing
        write_line(f"run    {config.run.dir}, {f'resumed from {resumed_from}' if resumed_from else 'new'}")
        write_line(f"data   no prepared corpus at {store_directory(config)} yet; run bin/prepare or --dry_run update")
        return False
    for line in banner_lines(preview_over(config, store), given, resumed_from):
        write_line(line)
    return True


def rehearse(config: Config, given: Given) -> ExitCode:
    """Run the most expensive parts of the run once, print what they took, and delete everything.

    Raises:
        ResilientError: an error that would keep the run from starting, or end it.
    """
    resumed_from = newest_checkpoint(config)
    stop = StopSignal(deadline_s=config.run.deadline_s)
    with stop, Console("quiet" if config.telemetry.progress == "quiet" else "plain", None) as console:
        parent = nearest_directory(Path(config.run.dir))
        with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=parent) as temporary:
            try:
                _rehearse_in(Path(temporary), config, given, resumed_from, console, stop)
            except Stopped:
                console.line("stopped; the dry run left no files")
    if stop.received in STOPPING:
        if config.run.signal_exit == "signal":
            die_by(stop.received)
        return stop.exit_code
    return ExitCode.OK


def newest_checkpoint(config: Config) -> str | None:
    """Return the name of the checkpoint that the run would resume from, by its manifest; None for a new run.

    Raises:
        RunDirectoryError, ResumeMismatch: this run must not use the run directory.
        NoValidCheckpoint: the checkpoint of run.resume is missing, or no checkpoint is valid.
    """
    directory = inspect(config)
    manager = CheckpointManager(
        directory.path, run_id=directory.run_id, settings=config.checkpoint, audit=lambda event, fields: None
    )
    names, requested = [stored.name for stored in manager.committed()], named_checkpoint(config, manager)
    if not names and any(manager.directory.glob("u*-*")):
        raise NoValidCheckpoint("there are checkpoints, but none is valid", where=str(manager.directory))
    return requested or next(iter(names), None)


def _rehearse_in(
    temporary: Path, config: Config, given: Given, resumed_from: str | None, console: Console, stop: StopSignal
) -> None:
    store = existing_store(config, store_directory(config))
    if store is None:
        store = prepare(config, temporary / "store", progress_callback(stop, console.line))
    run = _build(temporary / "run", config, store, console)
    try:
        for line in banner_lines(replace(preview_of(run), config=config), given, resumed_from):
            console.line(line)
        _update(run, stop)
        run.timing.add("evaluation", _evaluate(run, stop))
        peak_mib = memory_mib(run.device)  # before the comparison of the save, which needs more than the run
        save_bytes = _save_and_load(run, stop)
        for line in _projection(run, config, peak_mib, save_bytes):
            console.line(line)
    finally:
        close(run)


def _build(directory: Path, config: Config, store: Store, console: Console) -> Run:
    directory.mkdir()
    log = RunLog(console, directory, deadline_s=config.run.deadline_s)
    manager = CheckpointManager(directory, run_id=uuid.uuid4().hex, settings=config.checkpoint, audit=log.checkpoint_event)
    return build_run(replace(config, run=replace(config.run, dir=str(directory))), store, manager, None, log)


def _update(run: Run, stop: StopSignal) -> None:
    """Run two updates of the longest examples and the first two of the run; only the latter count for the projection."""
    longest = run.batches.longest()
    for micro_batches in (longest, longest, run.batches.at(0), run.batches.at(1)):
        rate = learning_rate(run.state.update, run.plan, run.config, run.convergence, run.guard)
        started_s = time.monotonic()
        result = run.updater(micro_batches, run.state.attempted, rate, lambda: stop.requested)
        if result is None:
            raise Stopped
        if run.device.type == "cuda":
            torch.cuda.synchronize()
        duration_s = time.monotonic() - started_s
        run.state.count(result)
        if micro_batches is not longest:
            run.timing.add("update", duration_s)
        kind = "the longest" if micro_batches is longest else "the run's own"
        fault = "" if result.applied else f"; NOT applied: {result.why}"
        run.log.line(f"update {kind} {_size(micro_batches)}: {readable(duration_s)}{fault}")


def _evaluate(run: Run, stop: StopSignal) -> float:
    """Evaluate and restore the longest batch; return the projected seconds of an average evaluation, by padded tokens."""
    evaluator, every, total_s = run.evaluator, run.evaluator.restore_every, 0.0
    first = replace(evaluator, loss_batches=evaluator.loss_batches[:1], restore_batches=evaluator.restore_batches[:1])
    for what, batches, measure, share in (
        ("loss of", evaluator.loss_batches, evaluate, 1.0),
        ("restoring", evaluator.restore_batches, restore_terms, 1 / every if every else 0.0),
    ):
        if not batches:
            continue
        started_s = time.monotonic()
        if measure(first, lambda: stop.requested) is None:
            raise Stopped
        first_s = time.monotonic() - started_s
        padded = [batch.micro_batch.padded_tokens for batch in batches]
        all_s = first_s * sum(padded) / padded[0]
        size = _size([batches[0].micro_batch])
        run.log.line(f"eval   {what} {size}: {readable(first_s)}; all {len(batches)} batches about {readable(all_s)}")
        total_s += share * all_s
    return total_s


def _save_and_load(run: Run, stop: StopSignal) -> int:
    """Save, load, and compare with the live tensors; return the size of the checkpoint in bytes.

    Raises:
        StorageError: a tensor differs after the round trip.
    """
    run.saver.finish("final", stop)
    loaded = run.manager.load_newest()
    directory, count = run.manager.directory, 0
    for part, tensors in run.saver.capture("final").tensors.items():
        for name, tensor in tensors.items():
            count += 1
            if loaded is None or not torch.equal(loaded.tensors[part][name], tensor.cpu()):
                raise StorageError(f"{part}/{name} differs after it was saved and loaded", where=str(directory))
    run.log.line(f"load   {count} tensors read back, each equal bit for bit")
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def _projection(run: Run, config: Config, peak_mib: float, save_bytes: int) -> Iterator[str]:
    """Yield lines about time, memory and disk of the whole run."""
    fit, left = run.fit, time_left(run.plan, 0, run.timing, config.checkpoint)
    yield f"peak   {peak_mib:.0f} MiB in this process; {fit.choice.needed / MIB:.0f} MiB were planned for model and updates"
    yield f"time   about {left.text()} for {run.plan.total_updates} updates"
    export_bytes = 4 * fit.sizes.with_rows(max(fit.sizes.rows, run.store.tokenizer.size)).parameters
    needed = max_kept(config.checkpoint.keep_last) * save_bytes + 2 * export_bytes
    free = free_bytes(Path(config.run.dir))
    yield f"disk   at most {needed / GIB:.2f} GiB for checkpoints and two exports; {free / GIB:.1f} GiB free"
    if free < needed:
        yield "plan warning: the disk may become full; lower checkpoint.keep_last, or see checkpoint.on_disk_full"
    yield "dry run ended; its files were deleted"


def _size(micro_batches: list[MicroBatch]) -> str:
    examples = sum(len(micro_batch.example_ids) for micro_batch in micro_batches)
    rows, source, target = micro_batches[0].shape
    packed = f" in {rows} packed rows" if micro_batches[0].target_segments_BT is not None else ""
    return f"{examples} examples{packed}, up to {source} + {target} tokens, {len(micro_batches)} micro-batches"
