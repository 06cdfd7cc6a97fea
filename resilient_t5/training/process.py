"""One process over one run directory: lock, store, run, resume, train, ending.

Whatever is wrong with the settings, the directory or the text is found before anything is written into the run.
"""

import dataclasses
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from resilient_t5.checkpoint.lock import RunLock
from resilient_t5.checkpoint.vault import Loaded, Vault
from resilient_t5.config import Config
from resilient_t5.data.prepare import prepare, store_directory
from resilient_t5.errors import DeviceLost, ExitCode, NoValidCheckpoint, ResilientError
from resilient_t5.training.banner import banner_lines
from resilient_t5.training.directory import RunDirectory, claim, inspect, refuse_foreign_files
from resilient_t5.training.ending import conclude, conclude_failure, is_concluded
from resilient_t5.training.exhibits import show_start
from resilient_t5.training.host import choose_device, describe
from resilient_t5.training.loop import train
from resilient_t5.training.outlook import outlook_of
from resilient_t5.training.preparing import progress_teller
from resilient_t5.training.progress import Display
from resilient_t5.training.run import Run, build_run
from resilient_t5.training.saving import AuditTrail
from resilient_t5.training.signals import STOPPING, Stopped, StopSignal, die_by

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
        ResilientError: what a user can mend; summary.json says the same once there is a run.
    """
    path = Path(config.run.dir)
    refuse_foreign_files(path)
    path.mkdir(parents=True, exist_ok=True)
    # Accelerate and transformers warn about things that this loop does itself.
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    stop = StopSignal(path, deadline_s=config.run.deadline_s, on_usr1=config.run.on_usr1)
    with stop, RunLock(path), Display(config.telemetry.progress, path / "train.log") as display:
        (path / "STOP").unlink(missing_ok=True)
        try:
            code = _train_locked(config, config_yaml, given, stop, display)
        except Stopped:
            display.line("stopped before training began; nothing is lost, start again")
            code = stop.exit_code
    if stop.received in STOPPING and code == stop.exit_code and config.run.signal_exit == "signal":
        die_by(stop.received)
    return code


def _train_locked(config: Config, config_yaml: str, given: Given, stop: StopSignal, display: Display) -> ExitCode:
    directory = inspect(config)
    audit = AuditTrail(config.run.deadline_s)
    vault = Vault(directory.path, run_id=directory.run_id, settings=config.checkpoint, audit=audit)
    vault.sweep()
    store = prepare(config, store_directory(config), progress_teller(stop, display.line))
    loaded = _resumed(config, directory, vault)

    def claim_directory() -> None:
        claim(directory, config, config_yaml, describe(choose_device(config.hardware.device)))

    run = build_run(config, store, vault, loaded, audit, display, claim=claim_directory)
    resumed_from = None if loaded is None else loaded.name
    for line in banner_lines(outlook_of(run), given, resumed_from, run.saver.changed_conditions):
        display.line(line)
    if is_concluded(run):
        display.line(f"nothing left to do: {directory.path / 'summary.json'} says how this run ended")
        close(run)
        return ExitCode.OK
    changed, rules = run.saver.changed_conditions, dataclasses.asdict(run.convergence.rules)
    run.telemetry.row("start", run.state.update, resumed_from=resumed_from, changed_conditions=changed, rules=rules)
    show_start(run, config_yaml)
    return _train_to_the_end(run, stop)


def _train_to_the_end(run: Run, stop: StopSignal) -> ExitCode:
    run.display.begin(run.state.update, run.plan.total_updates)
    try:
        reason = train(run, stop)
        return conclude(run, reason, stop)
    except torch.AcceleratorError as error:
        lost = DeviceLost(
            f"the device failed: {str(error).splitlines()[0]}",
            where=f"update {run.state.update}",
            mend="Start the same command again: it goes on from the newest checkpoint",
        )
        conclude_failure(run, lost)
        raise lost from error
    except ResilientError as error:
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


def _resumed(config: Config, directory: RunDirectory, vault: Vault) -> Loaded | None:
    """The checkpoint to go on from: the newest valid one, or the one that `run.resume` names; None for a new run.

    Raises:
        NoValidCheckpoint: there are checkpoints and none of them is whole.
    """
    if config.run.resume in ("auto", "none"):
        return vault.load_newest()
    name = Path(config.run.resume).name
    if name not in {committed.name for committed in vault.committed()}:
        raise NoValidCheckpoint(
            f"run.resume: {name} is no checkpoint of this run", where=str(directory.path / "checkpoints"), mend="Use auto"
        )
    return vault.load(name)
