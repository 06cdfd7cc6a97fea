"""When a checkpoint is due, what it contains, and how a run restores it.

`capture` and `restore` define the saved state: parameters, optimizer, random state, counters, convergence machine, guard
and loss scaler. The checkpoint package stores named parts without knowing what they are.
"""

import hashlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from resilient_t5.checkpoint import rng
from resilient_t5.checkpoint.manager import Committed, Loaded, Parts
from resilient_t5.checkpoint.writer import Writer
from resilient_t5.config.schema import Config, trajectory_settings, trajectory_sha256
from resilient_t5.data.store.store import Store
from resilient_t5.errors import ResumeMismatch
from resilient_t5.model.embeddings import T5Model
from resilient_t5.model.optimizer import load_named_state, named_state
from resilient_t5.training.convergence.machine import ConvergenceMachine
from resilient_t5.training.hardware.sharding import local_rows, local_tensor
from resilient_t5.training.resume_check import changed_conditions, refuse_changed_settings, removed_settings
from resilient_t5.training.signals import StopSignal
from resilient_t5.training.spike_guard import SpikeGuard
from resilient_t5.training.state import RunState
from resilient_t5.training.telemetry.timing import Timing
from resilient_t5.training.update import Updater


@dataclass
class Saver:
    """Saves the training state and restores it into freshly built parts."""

    writer: Writer
    config: Config
    fingerprints: dict[str, str]
    """See `fingerprints_of`."""
    conditions: dict[str, Any]
    """What results depend on in addition to the settings: machine, versions, threads, micro-batch size."""
    updater: Updater
    convergence: ConvergenceMachine
    guard: SpikeGuard
    state: RunState
    timing: Timing
    submitted: tuple[int, bool] = (-1, False)
    """Update of the last requested save, and whether it was the best."""
    committed: tuple[int, bool] = (-1, False)
    """The same for the last save that is on disk."""
    changed_conditions: list[str] = field(default_factory=list)
    """Conditions that differ from those of the restored checkpoint; if empty, a resume on a CPU is exact."""
    submitted_at_s: float = field(default_factory=time.monotonic)
    write_s: float = 0.0
    capture_s: float = 0.0
    """Seconds that the last `capture` took; noticeable only with sharded layers."""

    def due(self, stop: StopSignal) -> str | None:
        """Return why a checkpoint is due now, or None.

        Raises:
            ResilientError: an earlier error of the background writer.
        """
        self._poll()
        settings, update, best = self.config.checkpoint, self.state.update, is_best(self.state)
        asked, stop.save_requested = stop.save_requested, False
        if self.submitted in ((update, True), (update, best)):
            return None
        if best:
            return "best"
        if asked:
            return "asked"
        if update == 0 or (settings.every_updates is not None and update % settings.every_updates == 0):
            return "periodic"
        if self.writer.busy or settings.every_minutes is None:
            return None
        return "periodic" if time.monotonic() - self.submitted_at_s >= 60 * settings.every_minutes else None

    def save(self, cause: str, stop: StopSignal) -> None:
        """Save this update on rank 0; with sharded layers the other ranks must call it too.

        A periodic save is skipped while another is in flight. A save that SIGUSR1 asked for waits for it, but like a
        periodic one does not end the run when the disk is full.
        """
        started_s, best = time.monotonic(), is_best(self.state)
        parts = self.capture("periodic" if cause == "asked" else cause)
        self.capture_s = time.monotonic() - started_s
        if not self.updater.group.is_writer:
            return
        # The save for a signal must not be cut short by that signal; all others may be.
        should_stop = None if cause == "signal" else lambda: stop.requested
        if self.writer.submit(parts, best=best, must=cause != "periodic", should_stop=should_stop):
            self.submitted, self.submitted_at_s = (self.state.update, best), time.monotonic()
        self._poll()
        self.timing.add("save", time.monotonic() - started_s)

    def finish(self, cause: str, stop: StopSignal) -> None:
        """Make sure that this update is on disk before the process exits; with sharded layers all ranks must call it.

        After a signal, wait for a save in flight first, and save the newest state only if the remaining time suffices.
        """
        started_s, state = time.monotonic(), self.state
        if cause == "signal":
            self.writer.hurry()
        missing = False
        try:
            self.settle()
            in_time = cause != "signal" or stop.left_s > self.capture_s + self.write_s
            missing = in_time and self.committed not in ((state.update, True), (state.update, is_best(state)))
        finally:
            missing = self.updater.sharded.broadcast_if_sharded("last save", missing)
        if missing:
            self.save(cause, stop)
            self.settle()
        self.timing.add("save", time.monotonic() - started_s)

    def settle(self) -> None:
        """Wait for a save in flight.

        Raises:
            ResilientError: an error of the background writer.
        """
        self._note(self.writer.drain())

    def capture(self, reason: str) -> Parts:
        """Return the training state by name; the tensors are the live ones, or copies with sharded layers."""
        state, updater, scaler = self.state, self.updater, self.updater.accelerator.scaler
        optimizer_tensors, optimizer_values = named_state(updater.optimizer, updater.sharded)
        random_tensors, random_values = rng.capture()
        loss = None if state.last is None else state.last["loss"]
        tensors = {"model": model_tensors(updater.model), "optimizer": optimizer_tensors, "rng": random_tensors}
        return Parts(
            update=state.update,
            tensors=updater.sharded.gather_state(tensors),
            are_copies=updater.sharded.is_sharded,
            state={
                "run": {**state.to_json(), "wall_s": state.wall_s + self.timing.elapsed_s},
                "convergence": self.convergence.state(),
                "guard": self.guard.state(),
                "optimizer": optimizer_values,
                "rng": random_values,
                "scaler": None if scaler is None else scaler.state_dict(),
                "mathematics": trajectory_settings(self.config),
                "conditions": self.conditions,
            },
            reason=reason,
            health={**self.guard.health(), "loss": loss},
            metric=loss,
            fingerprints={"config": trajectory_sha256(self.config), **self.fingerprints},
        )

    def restore(self, loaded: Loaded) -> None:
        """Restore the training state; removes the model and optimizer tensors from `loaded` to free their memory.

        Raises:
            ResumeMismatch: the checkpoint belongs to other settings, other data or another model; lists every key.
        """
        same_corpus = loaded.manifest.fingerprints["data"] == self.fingerprints["data"]
        refuse_changed_settings(
            loaded.state["mathematics"],
            self.config,
            f"resuming {loaded.name} with these settings would change the mathematics of the run",
            hint="Use the settings that the run was started with, or start a new run with --run.dir and --run.fork",
            other_changes=() if same_corpus else ("the prepared corpus: its fingerprint differs",),
        )
        updater, scaler = self.updater, self.updater.accelerator.scaler
        load_model_tensors(updater.model, loaded.tensors.pop("model"))
        own = updater.sharded.shard_state(loaded.tensors.pop("optimizer"))
        load_named_state(updater.optimizer, updater.sharded, own, loaded.state["optimizer"])
        one_sided = rng.restore(loaded.tensors["rng"], loaded.state["rng"])
        if scaler is not None and loaded.state["scaler"] is not None:
            scaler.load_state_dict(loaded.state["scaler"])
        self.convergence.restore(loaded.state["convergence"])
        self.guard.restore(loaded.state["guard"])
        self.state.restore(loaded.state["run"])
        # A higher patience may have reopened the run.
        self.state.ended = None if self.convergence.reason is None else str(self.convergence.reason)
        self.submitted = self.committed = (loaded.update, loaded.manifest.is_best)
        self.changed_conditions = changed_conditions(loaded.state["conditions"], self.conditions)
        self.changed_conditions += removed_settings(loaded.state["mathematics"])
        self.changed_conditions += [f"random state of {name}: only on one side" for name in one_sided]

    def load_weights(self, loaded: Loaded) -> None:
        """Start a new run from the weights of another run's checkpoint.

        Raises:
            ResumeMismatch: the checkpoint has another vocabulary or another shape.
        """
        if loaded.manifest.fingerprints.get("vocabulary") != self.fingerprints["vocabulary"]:
            raise ResumeMismatch(
                f"{loaded.name} was trained with another vocabulary, so its embedding rows mean other tokens",
                where="run.fork",
                hint="Fork with the same tokenizer and active vocabulary, or start from export/ with model.name_or_path",
            )
        load_model_tensors(self.updater.model, loaded.tensors["model"])

    def _poll(self) -> None:
        self._note(self.writer.poll())

    def _note(self, committed: list[Committed]) -> None:
        for checkpoint in committed:
            self.committed, self.write_s = (checkpoint.update, checkpoint.is_best), checkpoint.seconds


def fingerprints_of(config: Config, store: Store, ids: np.ndarray) -> dict[str, str]:
    """Return hashes of what the state of a run depends on.

    `data`: the store, and the content of the user's confusion table. `vocabulary`: the token of each embedding row, from
    the full token `ids`.
    """
    confusions = config.corruption.confusions
    content = b"" if confusions is None else Path(confusions).read_bytes()
    return {
        "data": hashlib.sha256(store.fingerprint.encode() + content).hexdigest(),
        "vocabulary": hashlib.sha256(store.tokenizer.fingerprint().encode() + ids.astype("<i8").tobytes()).hexdigest(),
    }


def is_best(state: RunState) -> bool:
    """Return whether the state is the best evaluated one of its run."""
    return state.best is not None and state.best["update"] == state.update == state.evaluated_update


def model_tensors(model: T5Model) -> dict[str, torch.Tensor]:
    """Return the parameters by name; a tied matrix appears under each of its names and is stored once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters(remove_duplicate=False)}


def load_model_tensors(model: T5Model, tensors: dict[str, torch.Tensor]) -> None:
    """Copy saved parameters into the live model; of sharded ones, this rank's rows.

    Raises:
        ResumeMismatch: names or shapes differ from the model's.
    """
    live = model_tensors(model)
    if live.keys() != tensors.keys():
        different = sorted(live.keys() ^ tensors.keys())[:5]
        raise ResumeMismatch("the parameter names of the checkpoint differ from the model's", where=", ".join(different))
    for name, parameter in live.items():
        if parameter.shape != tensors[name].shape:
            shapes = f"{tuple(tensors[name].shape)} -> {tuple(parameter.shape)}"
            raise ResumeMismatch(f"the shape of {name} differs from the checkpoint's", where=shapes)
        local_tensor(parameter).copy_(local_rows(parameter, tensors[name]))
