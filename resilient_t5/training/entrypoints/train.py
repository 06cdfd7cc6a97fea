"""One process over one run directory: lock, store, run, resume, train, ending.

Whatever is wrong with the settings, the directory or the text is found before anything is written into the run. With
several processes each of them comes through here; process 0 holds the lock, prepares and writes, the others follow it.
"""

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from resilient_t5.checkpoint.lock import RunLock
from resilient_t5.checkpoint.manager import CheckpointManager, Loaded
from resilient_t5.config.schema import Config
from resilient_t5.data.store.build import Progress
from resilient_t5.data.store.prepare import prepare, store_directory
from resilient_t5.data.store.store import Store
from resilient_t5.errors import DeviceLost, ExitCode, NoValidCheckpoint, ProcessLost, ResilientError
from resilient_t5.model.load import check_checkpoint
from resilient_t5.training.build import build_run
from resilient_t5.training.entrypoints.finish import attend, conclude, conclude_failure, is_concluded, save_current_state
from resilient_t5.training.hardware.machine import choose_device, describe
from resilient_t5.training.hardware.process_group import ProcessGroup, join
from resilient_t5.training.loop import train
from resilient_t5.training.recovery import load_together
from resilient_t5.training.reports.artifacts import write_start
from resilient_t5.training.reports.preview import banner_lines, preview_of, process_lines
from resilient_t5.training.run import Run
from resilient_t5.training.run_directory import RunDirectory, claim, inspect, refuse_foreign_files
from resilient_t5.training.signals import STOPPING, Stopped, StopSignal, die_by, progress_teller
from resilient_t5.training.telemetry.console import Console
from resilient_t5.training.telemetry.metrics_log import AuditTrail

Given = Mapping[str, tuple[Any, str]]
"""{"section.key": (value, where it came from)} of the settings that differ from the defaults."""


def train_in_directory(config: Config, config_yaml: str, given: Given) -> ExitCode:
    """Start or continue the run of `config.run.dir` and train it to its end.

    Args:
        config: the checked configuration.
        config_yaml: its text, for config.yaml.
        given: settings that differ from the defaults, for the banner.

    Returns:
        The exit code. After a stopping signal the process dies by that signal instead, with the state saved.

    Raises:
        ResilientError: what a user can fix; summary.json says the same once there is a run.
    """
    # Accelerate and transformers warn about things that this loop does itself.
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    path, ranks = Path(config.run.dir), join(choose_device(config.hardware.device).type == "cuda")
    # The file STOP is looked for where it is obeyed; whatever reaches any process reaches all.
    ranks.stop = stop = StopSignal(
        path if ranks.is_writer else None, deadline_s=config.run.deadline_s, on_usr1=config.run.on_usr1
    )
    with stop:
        try:
            with ranks.synchronized_exit(), _entered(config, ranks) as display:
                code = _train_locked(config, config_yaml, given, display, ranks)
                code = ExitCode(ranks.broadcast("end", int(code)))
        except Stopped:
            code = stop.exit_code
    if stop.received in STOPPING and code == stop.exit_code and config.run.signal_exit == "signal":
        die_by(stop.received)
    return code


@contextmanager
def _entered(config: Config, ranks: ProcessGroup) -> Iterator[Console]:
    """Hold the run directory and open the console; a process that does not write gets a console that shows nothing."""
    path = Path(config.run.dir)
    if not ranks.is_writer:
        yield Console("quiet", None)
        return
    refuse_foreign_files(path)
    path.mkdir(parents=True, exist_ok=True)
    with RunLock(path), Console(config.telemetry.progress, path / "train.log") as display:
        (path / "STOP").unlink(missing_ok=True)
        try:
            yield display
        except Stopped:
            display.line("stopped before training began; nothing is lost, start again")
            raise


def _train_locked(config: Config, config_yaml: str, given: Given, display: Console, ranks: ProcessGroup) -> ExitCode:
    stop = ranks.stop
    assert stop is not None
    directory = inspect(config) if ranks.is_writer else RunDirectory(Path(config.run.dir), "", is_new=False)
    run_id = ranks.broadcast("run", directory.run_id)
    audit = AuditTrail(config.run.deadline_s)
    manager = CheckpointManager(directory.path, run_id=run_id, settings=config.checkpoint, audit=audit)
    if ranks.is_writer:
        manager.sweep()
    if ranks.is_writer and config.model.name_or_path is not None:
        check_checkpoint(config.model.name_or_path)  # before the corpus is read: a wrong name should not cost an hour
    store = _prepared(config, ranks, progress_teller(stop, display.line))
    loaded = load_together(manager, ranks, lambda: _resumed(config, manager))

    def claim_directory() -> None:
        if ranks.is_writer:
            claim(directory, config, config_yaml, describe(choose_device(config.hardware.device)))

    run = build_run(config, store, manager, loaded, audit, display, claim=claim_directory, ranks=ranks)
    resumed_from = None if loaded is None else loaded.name
    if ranks.is_writer:
        for line in banner_lines(preview_of(run), given, resumed_from, run.saver.changed_conditions):
            display.line(line)
        for line in process_lines(run):
            display.line(line)
    if ranks.broadcast("concluded", ranks.is_writer and is_concluded(run)):
        display.line(f"nothing left to do: {directory.path / 'summary.json'} says how this run ended")
        close(run)
        return ExitCode.OK
    changed, rules = run.saver.changed_conditions, dataclasses.asdict(run.convergence.rules)
    run.telemetry.row("start", run.state.update, resumed_from=resumed_from, changed_conditions=changed, rules=rules)
    if ranks.is_writer:
        write_start(run, config_yaml)
    return _train_to_the_end(run, stop)


def _prepared(config: Config, ranks: ProcessGroup, progress: Progress) -> Store:
    """The store, made by process 0 if it is missing; the others wait for that, however long it takes, and open it."""
    store = prepare(config, store_directory(config), progress) if ranks.is_writer else None
    ranks.broadcast("prepared", None)
    return store or prepare(config, store_directory(config), progress)


def _train_to_the_end(run: Run, stop: StopSignal) -> ExitCode:
    """Train, and end the run; the others attend the ending of process 0, whose exit code becomes theirs."""
    run.display.begin(run.state.update, run.plan.total_updates)
    try:
        reason = train(run, stop)
        return conclude(run, reason, stop) if run.ranks.is_writer else attend(run, reason, stop)
    except torch.AcceleratorError as error:
        lost = DeviceLost(
            f"the device failed: {str(error).splitlines()[0]}",
            where=f"update {run.state.update}",
            hint="Start the same command again: it goes on from the newest checkpoint",
        )
        conclude_failure(run, lost)
        raise lost from error
    except ResilientError as error:
        if isinstance(error, ProcessLost):
            save_current_state(run, stop)
        conclude_failure(run, error)
        raise
    finally:
        close(run)


def close(run: Run) -> None:
    """Let a save that is in flight commit, end the threads, close the files."""
    try:
        run.reader.close()
        with suppress(torch.AcceleratorError):  # a save that read from a lost device in vain; that is told already
            run.saver.writer.close()
    finally:
        run.telemetry.close()


def _resumed(config: Config, manager: CheckpointManager) -> Loaded | None:
    """The checkpoint to go on from: the newest valid one, or the one that `run.resume` names; None for a new run.

    Raises:
        NoValidCheckpoint: there are checkpoints and none of them is whole.
    """
    name = named_checkpoint(config, manager)
    return manager.load_newest() if name is None else manager.load(name)


def named_checkpoint(config: Config, manager: CheckpointManager) -> str | None:
    """The checkpoint of this run that `run.resume` names; None where it leaves the choice.

    Raises:
        NoValidCheckpoint: there is none of that name.
    """
    if config.run.resume in ("auto", "none"):
        return None
    name = Path(config.run.resume).name
    if name not in {committed.name for committed in manager.committed()}:
        raise NoValidCheckpoint(
            f"run.resume: {name} is no checkpoint of this run", where=str(manager.directory), hint="Use auto"
        )
    return name
