"""`bin/train --dry_run`: what would happen, said without doing it; or the hardest moments of the run, done for real.

A rehearsal builds the run in a directory of its own in or beside the run directory, on the disk that the run will use, and
takes that directory away again: two updates of the longest examples, two of the run's own first updates, one batch of
evaluation, one of generation, one save and its load, compared bit for bit. So what would fail after hours fails now.
"""

import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from resilient_t5.checkpoint.manager import CheckpointManager
from resilient_t5.checkpoint.retention import max_kept
from resilient_t5.config.schema import Config
from resilient_t5.data.batches import EvaluationBatch, MicroBatch
from resilient_t5.data.store.fingerprint import identify
from resilient_t5.data.store.prepare import existing_store, prepare, store_directory
from resilient_t5.data.store.store import Store
from resilient_t5.errors import ExitCode, NoValidCheckpoint, StorageError
from resilient_t5.training.build import build_run
from resilient_t5.training.entrypoints.train import Given, close, named_checkpoint
from resilient_t5.training.evaluator import evaluate, restore_terms
from resilient_t5.training.hardware.machine import MIB, memory_mib
from resilient_t5.training.reports.preview import GIB, banner_lines, free_bytes, nearest_existing, preview_of, preview_over
from resilient_t5.training.run import Run
from resilient_t5.training.run_directory import inspect
from resilient_t5.training.signals import STOPPING, Stopped, StopSignal, die_by, progress_teller
from resilient_t5.training.state import RunState
from resilient_t5.training.telemetry.console import Console
from resilient_t5.training.telemetry.metrics_log import AuditTrail
from resilient_t5.training.telemetry.timing import readable

WORKSHOP = ".dry_run-"


def write_plan(config: Config, given: Given, tell: Callable[[str], None]) -> bool:
    """Print the banner of the run that `config` asks for and write nothing; False when the corpus is not prepared yet.

    Raises:
        ResilientError: what would keep the run from starting.
    """
    resumed_from = newest_checkpoint(config)
    store = existing_store(config, store_directory(config))
    if store is None:
        identify(config, None)  # finds what is missing: text, terms, tokenizer
        tell(f"run    {config.run.dir}, {f'resumed from {resumed_from}' if resumed_from else 'new'}")
        tell(f"data   no prepared corpus at {store_directory(config)} yet: bin/prepare, or --dry_run update, counts it")
        return False
    for line in banner_lines(preview_over(config, store), given, resumed_from):
        tell(line)
    return True


def rehearse(config: Config, given: Given) -> ExitCode:
    """Do the hardest moments of the run and tell what they took; nothing is left behind.

    Raises:
        ResilientError: what would keep the run from starting, or would end it.
    """
    resumed_from = newest_checkpoint(config)
    stop = StopSignal(deadline_s=config.run.deadline_s)
    with stop, Console("quiet" if config.telemetry.progress == "quiet" else "plain", None) as display:
        place = nearest_existing(Path(config.run.dir))
        with tempfile.TemporaryDirectory(prefix=WORKSHOP, dir=place) as workshop:
            try:
                _rehearse_in(Path(workshop), config, (given, resumed_from), stop, display)
            except Stopped:
                display.line("stopped; a dry run leaves nothing behind")
    if stop.received in STOPPING:
        if config.run.signal_exit == "signal":
            die_by(stop.received)
        return stop.exit_code
    return ExitCode.OK


def newest_checkpoint(config: Config) -> str | None:
    """Name of the checkpoint that the run would go on from, by its manifest; None for a new run.

    Raises:
        RunDirectoryError, ResumeMismatch: the run directory may not be used by this run.
        NoValidCheckpoint: the one that run.resume names is not there, or none is whole.
    """
    directory = inspect(config)
    manager = CheckpointManager(
        directory.path, run_id=directory.run_id, settings=config.checkpoint, audit=lambda event, fields: None
    )
    names, wanted = [stored.name for stored in manager.committed()], named_checkpoint(config, manager)
    if not names and any(manager.directory.glob("u*-*")):
        raise NoValidCheckpoint("there are checkpoints and none of them is whole", where=str(manager.directory))
    return wanted or next(iter(names), None)


def _rehearse_in(workshop: Path, config: Config, start: tuple[Given, str | None], stop: StopSignal, display: Console) -> None:
    store = existing_store(config, store_directory(config))
    if store is None:
        store = prepare(config, workshop / "store", progress_teller(stop, display.line))
    run = _build(workshop / "run", config, store, display)
    try:
        for line in banner_lines(replace(preview_of(run), config=config), *start):
            display.line(line)
        _update(run, stop)
        run.timing.add("evaluation", _evaluate(run, stop) + _generate(run, stop))
        peak_mib = memory_mib(run.device)  # the comparison of a save takes more than the run itself
        save_bytes = _save_and_load(run, stop)
        for line in _projection(run, config, peak_mib, save_bytes):
            display.line(line)
    finally:
        close(run)


def _build(directory: Path, config: Config, store: Store, display: Console) -> Run:
    """The run, new, in `directory`."""
    directory.mkdir()
    settings, telemetry = replace(config.run, dir=str(directory)), replace(config.telemetry, tensorboard=False)
    own, audit = replace(config, run=settings, telemetry=telemetry), AuditTrail(config.run.deadline_s)
    manager = CheckpointManager(directory, run_id=uuid.uuid4().hex, settings=config.checkpoint, audit=audit)
    return build_run(own, store, manager, None, audit, display)


def _update(run: Run, stop: StopSignal) -> None:
    """Two updates of the longest examples, then the first two of the run itself; only those tell how long the run takes."""
    longest = run.batches.longest()
    for micro_batches in (longest, longest, run.batches.at(0), run.batches.at(1)):
        begun_s = time.monotonic()
        result = run.updater(micro_batches, run.state.attempted, run.learning_rate(), lambda: stop.requested)
        if result is None:
            raise Stopped
        if run.device.type == "cuda":
            torch.cuda.synchronize()
        took_s = time.monotonic() - begun_s
        run.state.count(result)
        if micro_batches is not longest:
            run.timing.add("update", took_s)
        kind = "the longest" if micro_batches is longest else "the run's own"
        fault = "" if result.applied else f"; NOT applied: {result.why}"
        run.display.line(f"update {kind} {_size(micro_batches)}: {readable(took_s)}{fault}")


def _evaluate(run: Run, stop: StopSignal) -> float:
    """The longest batch of the evaluation loss; returns the seconds that a whole evaluation would take."""
    batches = run.evaluator.loss_batches
    if not batches:
        return 0.0
    begun_s = time.monotonic()
    if evaluate(replace(run.evaluator, loss_batches=batches[:1]), lambda: stop.requested) is None:
        raise Stopped
    return _told(run, "loss of", batches, time.monotonic() - begun_s)


def _generate(run: Run, stop: StopSignal) -> float:
    """The longest batch of generation; returns the seconds that restoring adds to an evaluation on average."""
    batches, settings = run.evaluator.restore_batches, run.config.evaluation
    if not batches:
        return 0.0
    begun_s = time.monotonic()
    if restore_terms(replace(run.evaluator, restore_batches=batches[:1]), lambda: stop.requested) is None:
        raise Stopped
    all_s = _told(run, "restoring", batches, time.monotonic() - begun_s)
    return all_s / settings.restore_every if settings.restore_every else 0.0


def _told(run: Run, what: str, batches: Sequence[EvaluationBatch], took_s: float) -> float:
    """Tell what the first of `batches` took; returns what all of them would, by padded tokens."""
    padded = [batch.micro_batch.padded_tokens for batch in batches]
    all_s = took_s * sum(padded) / padded[0]
    batch, size = batches[0].micro_batch, len(batches)
    run.display.line(f"eval   {what} {_size([batch])}: {readable(took_s)}; all {size} such about {readable(all_s)}")
    return all_s


def _save_and_load(run: Run, stop: StopSignal) -> int:
    """One save, read back and compared with what is live; returns its bytes.

    Raises:
        StorageError: the disk gave back something else.
    """
    run.saver.finish(run.state, "final", stop)
    loaded = run.manager.load_newest()
    live = run.saver.capture(run.state, "final").tensors
    count = 0
    for part, tensors in live.items():
        for name, tensor in tensors.items():
            count += 1
            if loaded is None or not torch.equal(loaded.tensors[part][name], tensor.cpu()):
                raise StorageError(f"{part}/{name} was read back with other bits than were written", where=str(run.directory))
    run.display.line(f"load   {count} tensors read back, each equal bit for bit")
    return sum(file.stat().st_size for file in (run.directory / "checkpoints").rglob("*") if file.is_file())


def _projection(run: Run, config: Config, peak_mib: float, save_bytes: int) -> Iterator[str]:
    """Time, memory and disk of the whole run."""
    run.state = RunState()
    fit = run.fit
    planned_mib = fit.choice.needed / MIB
    yield f"peak   {peak_mib:.0f} MiB in this process, of which {planned_mib:.0f} MiB were planned for model and updates"
    yield f"time   about {run.left().text()} for {run.plan.total_updates} updates"
    full = 4 * fit.sizes.with_rows(max(fit.sizes.rows, run.store.tokenizer.size)).parameters
    needed = max_kept(config.checkpoint.keep_last) * save_bytes + 2 * full
    free = free_bytes(replace(preview_of(run), config=config))
    yield f"disk   at most {needed / GIB:.2f} GiB for checkpoints and two exports; {free / GIB:.1f} GiB free"
    if free < needed:
        yield "plan warning: the disk will become full; lower checkpoint.keep_last, or see checkpoint.on_disk_full"
    yield "dry run ended; nothing of it is left behind"


def _size(micro_batches: list[MicroBatch]) -> str:
    examples = sum(len(micro_batch.example_ids) for micro_batch in micro_batches)
    largest = micro_batches[0]
    source, target = largest.source_BS.shape[1], largest.labels_BT.shape[1]
    return f"{examples} examples, up to {source} + {target} tokens, {len(micro_batches)} micro-batches"
