"""One training process: lock the run directory, prepare the corpus, build or resume the run, train, finish.

Errors in the settings, the directory or the text are raised before anything is written into the run. Every rank runs this;
rank 0 holds the lock, prepares the corpus and writes.
"""

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from resilient_t5.checkpoint.lock import RunLock
from resilient_t5.checkpoint.manager import CheckpointManager
from resilient_t5.config.schema import Config
from resilient_t5.data.store.build import Progress
from resilient_t5.data.store.prepare import prepare, store_directory
from resilient_t5.data.store.store import Store
from resilient_t5.errors import DeviceLost, ExitCode, NoValidCheckpoint, ProcessLost, ResilientError
from resilient_t5.model.load import check_checkpoint
from resilient_t5.training.build import build_run
from resilient_t5.training.entrypoints.finish import finish, finish_failed, is_finished, save_current_state
from resilient_t5.training.hardware.machine import choose_device, describe
from resilient_t5.training.hardware.process_group import ProcessGroup, join
from resilient_t5.training.loop import train
from resilient_t5.training.recovery import load_together
from resilient_t5.training.reports.artifacts import write_start
from resilient_t5.training.reports.preview import Preview, banner_lines, process_lines
from resilient_t5.training.run import Run
from resilient_t5.training.run_directory import RunDirectory, claim, inspect, refuse_foreign_files
from resilient_t5.training.signals import STOPPING, Stopped, StopSignal, die_by, progress_callback
from resilient_t5.training.telemetry.console import Console
from resilient_t5.training.telemetry.run_log import RunLog

Given = Mapping[str, tuple[Any, str]]
"""{"section.key": (value, source)} of the settings that differ from the defaults."""


def train_in_directory(config: Config, config_yaml: str, given: Given) -> ExitCode:
    """Start or continue the run of `config.run.dir` and train it to its end.

    Args:
        config: the checked configuration.
        config_yaml: its text, for config.yaml.
        given: settings that differ from the defaults, for the banner.

    Returns:
        The exit code. After a stopping signal the process saves and dies by that signal instead.

    Raises:
        ResilientError: an error that a user can fix; it is also in summary.json if the run had started.
    """
    # Accelerate and transformers warn about things that this loop handles itself.
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    path, group = Path(config.run.dir), join(choose_device(config.hardware.device).type == "cuda")
    # Only rank 0 polls the STOP file; stop requests are exchanged between ranks.
    group.stop = stop = StopSignal(
        path if group.is_writer else None, deadline_s=config.run.deadline_s, on_usr1=config.run.on_usr1
    )
    with stop:
        try:
            with group.synchronized_exit(), _open_run_directory(config, group) as console:
                code = _train_locked(config, config_yaml, given, console, group, stop)
                code = ExitCode(group.broadcast("end", int(code)))
        except Stopped:
            code = stop.exit_code
    if stop.received in STOPPING and code == stop.exit_code and config.run.signal_exit == "signal":
        die_by(stop.received)
    return code


@contextmanager
def _open_run_directory(config: Config, group: ProcessGroup) -> Iterator[Console]:
    """Lock the run directory and open the console; other ranks get a silent console and no lock."""
    path = Path(config.run.dir)
    if not group.is_writer:
        yield Console("quiet", None)
        return
    refuse_foreign_files(path)
    path.mkdir(parents=True, exist_ok=True)
    with RunLock(path) as lock, Console(config.telemetry.progress, path / "train.log") as console:
        if not lock.is_exclusive:
            console.line("lock   warning: no locks on this file system; make sure that no other process uses the run directory")
        (path / "STOP").unlink(missing_ok=True)
        try:
            yield console
        except Stopped:
            console.line("stopped before training started; nothing is lost, start again")
            raise


def _train_locked(
    config: Config, config_yaml: str, given: Given, console: Console, group: ProcessGroup, stop: StopSignal
) -> ExitCode:
    path = Path(config.run.dir)
    directory = inspect(config) if group.is_writer else RunDirectory(path, "", is_new=False)
    run_id = group.broadcast("run", directory.run_id)
    log = RunLog(
        console,
        path if group.is_writer else None,
        tensorboard=config.telemetry.tensorboard,
        deadline_s=config.run.deadline_s,
    )
    manager = CheckpointManager(path, run_id=run_id, settings=config.checkpoint, audit=log.checkpoint_event)
    if group.is_writer:
        manager.sweep()
        if config.model.name_or_path is not None:
            check_checkpoint(config.model.name_or_path)  # fail before the corpus is read, which can take an hour
    store = _prepared(config, group, progress_callback(stop, log.line))
    loaded = load_together(manager, group, named_checkpoint(config, manager) if group.is_writer else None)

    def claim_directory() -> None:
        if group.is_writer:
            claim(directory, config, config_yaml, describe(choose_device(config.hardware.device)))

    run = build_run(config, store, manager, loaded, log, claim=claim_directory, group=group)
    resumed_from = None if loaded is None else loaded.name
    _print_banner(run, given, resumed_from)
    if group.broadcast("concluded", group.is_writer and is_finished(run)):
        log.line(f"nothing left to do: {path / 'summary.json'} holds the result of this run")
        close(run)
        return ExitCode.OK
    changed, rules = run.saver.changed_conditions, dataclasses.asdict(run.convergence.rules)
    log.event("start", run.state.update, resumed_from=resumed_from, changed_conditions=changed, rules=rules)
    write_start(log, run.state.update, config_yaml)
    return _train_and_finish(run, stop)


def _print_banner(run: Run, given: Given, resumed_from: str | None) -> None:
    if not run.group.is_writer:
        return
    for line in banner_lines(preview_of(run), given, resumed_from, run.saver.changed_conditions):
        run.log.line(line)
    pieces = len(run.batches.at(run.state.attempted)) if run.group.count > 1 else 0
    for line in process_lines(run.updater.sharded, run.config.hardware.shard_layers, pieces):
        run.log.line(line)


def preview_of(run: Run) -> Preview:
    """Return the preview of a run that has been built."""
    rules, shapes = run.convergence.rules, run.batches.shapes
    return Preview(run.config, run.device, run.precision, run.fit, run.store, run.plan, rules, shapes, run.graphs_note)


def _prepared(config: Config, group: ProcessGroup, progress: Progress) -> Store:
    """Prepare the store on rank 0 if it is missing; the other ranks wait without a limit, then open it."""
    store = prepare(config, store_directory(config), progress) if group.is_writer else None
    group.broadcast("prepared", None)
    return store or prepare(config, store_directory(config), progress)


def _train_and_finish(run: Run, stop: StopSignal) -> ExitCode:
    """Train and finish; the exit code of rank 0 becomes that of all ranks."""
    run.log.console.start_view(run.state.update, run.plan.total_updates)
    try:
        return finish(run, train(run, stop), stop)
    except torch.AcceleratorError as error:
        lost = DeviceLost(
            f"the device failed: {str(error).splitlines()[0]}",
            where=f"update {run.state.update}",
            hint="Run the same command again to continue from the newest checkpoint",
        )
        finish_failed(run, lost)
        raise lost from error
    except ResilientError as error:
        if isinstance(error, ProcessLost):
            save_current_state(run, stop)
        finish_failed(run, error)
        raise
    finally:
        close(run)


def close(run: Run) -> None:
    """Wait for a save in flight, end the threads, close the files."""
    try:
        run.prefetcher.close()
        with suppress(torch.AcceleratorError):  # a save that read from the lost device; the error was reported
            run.saver.writer.close()
    finally:
        run.log.close()


def named_checkpoint(config: Config, manager: CheckpointManager) -> str | None:
    """Return the checkpoint that `run.resume` names; None for `auto` and `none`.

    Raises:
        NoValidCheckpoint: this run has no checkpoint of that name.
    """
    if config.run.resume in ("auto", "none"):
        return None
    name = Path(config.run.resume).name
    if name not in {committed.name for committed in manager.committed()}:
        raise NoValidCheckpoint(
            f"run.resume: this run has no checkpoint {name}", where=str(manager.directory), hint="Use run.resume auto"
        )
    return name
