"""When a checkpoint is due, what goes into it, and how a run takes it back.

`capture` and `restore` are the one list of what a run's state is: parameters, optimizer, random state, counters, the
convergence machine, the guard and the loss scaler. The checkpoint package stores named parts and knows none of them.
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
from resilient_t5.training.run_directory import changed_keys, changed_trajectory_settings
from resilient_t5.training.signals import StopSignal
from resilient_t5.training.spike_guard import SpikeGuard
from resilient_t5.training.state import RunState
from resilient_t5.training.telemetry.timing import Timing
from resilient_t5.training.update import Updater


@dataclass
class Saver:
    """Saves what moves in a run, and puts it back into freshly built parts."""

    writer: Writer
    config: Config
    fingerprints: dict[str, str]
    """What the state belongs to; see `fingerprints_of`."""
    conditions: dict[str, Any]
    """What bits depend on beside the mathematics: machine, versions, threads, the cut into micro-batches."""
    updater: Updater
    convergence: ConvergenceMachine
    guard: SpikeGuard
    timing: Timing
    submitted: tuple[int, bool] = (-1, False)
    """The update of the last save that was asked for, and whether it was the best."""
    committed: tuple[int, bool] = (-1, False)
    """The same of the last save that is on disk."""
    changed_conditions: list[str] = field(default_factory=list)
    """What differs from the process that saved what this one went on from; empty means bit for bit (on a CPU)."""
    submitted_at_s: float = field(default_factory=time.monotonic)
    write_s: float = 0.0
    capture_s: float = 0.0
    """Seconds that the last save took before it was written: next to none, but for layers that are cut."""

    def due(self, state: RunState, stop: StopSignal) -> str | None:
        """Why a checkpoint is due at this update, or None: a new best, asked for, the first, by count, by clock.

        Raises:
            ResilientError: what the writer raised since it was last looked after.
        """
        self._note(self.writer.poll())
        settings, update = self.config.checkpoint, state.update
        asked, stop.save_requested = stop.save_requested, False
        if self.submitted in ((update, True), (update, is_best(state))):
            return None
        if is_best(state):
            return "best"
        if asked:
            return "asked"
        if update == 0 or (settings.every_updates is not None and update % settings.every_updates == 0):
            return "periodic"
        if self.writer.busy:  # the next one is near
            return None
        waited_s = time.monotonic() - self.submitted_at_s
        return "periodic" if settings.every_minutes is not None and waited_s >= 60 * settings.every_minutes else None

    def save(self, state: RunState, cause: str, stop: StopSignal) -> None:
        """Save this update; a periodic save is left out while the one before is still being written.

        Process 0 does; with cut layers the others come here too, and hand in their rows.

        A save that a user asked for by SIGUSR1 waits for its turn, but like a periodic one it does not end the run when
        the disk is full.
        """
        begun_s = time.monotonic()
        parts, best = self.capture(state, "periodic" if cause == "asked" else cause), is_best(state)
        self.capture_s = time.monotonic() - begun_s
        if not self.updater.ranks.is_writer:
            return
        must = cause != "periodic"
        # The save that a signal asks for must not be cut short by that signal; all others may be.
        should_stop = None if cause == "signal" else lambda: stop.requested
        if self.writer.submit(parts, best=best, must=must, should_stop=should_stop):
            self.submitted, self.submitted_at_s = (state.update, best), time.monotonic()
        self._note(self.writer.poll())
        self.timing.add("save", time.monotonic() - begun_s)

    def finish(self, state: RunState, cause: str, stop: StopSignal) -> None:
        """Make sure that this update is on disk before the process leaves; with cut layers all processes come here.

        Where a deadline is near, a save that is in flight is worth more than one that cannot be finished: it is waited
        for, and the newest state is saved only if the time that is left is enough for it.
        """
        begun_s, wanted = time.monotonic(), (state.update, is_best(state))
        if cause == "signal":
            self.writer.hurry()
        missing = False
        try:
            self.settle()
            in_time = cause != "signal" or stop.left_s > self.capture_s + self.write_s
            missing = in_time and self.committed not in ((state.update, True), wanted)
        finally:
            missing = self.updater.layers.broadcast_if_sharded("last save", missing)
        if missing:
            self.save(state, cause, stop)
            self.settle()
        self.timing.add("save", time.monotonic() - begun_s)

    def settle(self) -> None:
        """Wait until no save is in flight.

        Raises:
            ResilientError: what the writer raised since it was last looked after.
        """
        self._note(self.writer.drain())

    def capture(self, state: RunState, reason: str) -> Parts:
        """Everything that moves in a run, by name; the tensors are the live ones, or copies where the layers are cut."""
        updater, scaler = self.updater, self.updater.accelerator.scaler
        optimizer_tensors, optimizer_values = named_state(updater.optimizer, updater.layers)
        random_tensors, random_values = rng.capture()
        loss = None if state.last is None else state.last["loss"]
        tensors = {"model": model_tensors(updater.model), "optimizer": optimizer_tensors, "rng": random_tensors}
        return Parts(
            update=state.update,
            tensors=updater.layers.gather_state(tensors),
            are_copies=updater.layers.is_sharded,
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

    def restore(self, loaded: Loaded) -> RunState:
        """Put `loaded` into the parts and take its model and optimizer tensors away; returns the counters.

        Raises:
            ResumeMismatch: the checkpoint belongs to other settings, other data or another model; every key is named.
        """
        changed = changed_trajectory_settings(loaded.state["mathematics"], self.config)
        if loaded.manifest.fingerprints["data"] != self.fingerprints["data"]:
            changed.append("the prepared corpus: its fingerprint differs")
        if changed:
            raise ResumeMismatch(
                f"resuming {loaded.name} with these settings would change the mathematics of the run",
                where="; ".join(changed),
                hint="Use the settings that the run was started with, or start a new run with --run.dir and --run.fork",
            )
        updater, scaler = self.updater, self.updater.accelerator.scaler
        # Taken out, as the caller keeps `loaded` for its name: its tensors would stay in memory for the whole run.
        load_model_tensors(updater.model, loaded.tensors.pop("model"))
        own = updater.layers.shard_state(loaded.tensors.pop("optimizer"))
        load_named_state(updater.optimizer, updater.layers, own, loaded.state["optimizer"])
        one_sided = rng.restore(loaded.tensors["rng"], loaded.state["rng"])
        if scaler is not None and loaded.state["scaler"] is not None:
            scaler.load_state_dict(loaded.state["scaler"])
        self.convergence.restore(loaded.state["convergence"])
        self.guard.restore(loaded.state["guard"])
        self.submitted = self.committed = (loaded.update, loaded.manifest.is_best)
        former = loaded.state["conditions"]
        former.setdefault("shard_layers", False)  # of a checkpoint from before layers could be cut
        self.changed_conditions = changed_keys(former, self.conditions)
        self.changed_conditions += [f"random state of {name}: only on one side" for name in one_sided]
        state = RunState.from_json(loaded.state["run"])
        # Only the machine ends a run for good, and a raised patience may have reopened it.
        state.ended = None if self.convergence.reason is None else str(self.convergence.reason)
        return state

    def load_weights(self, loaded: Loaded) -> None:
        """Start a new run from the weights of another run's checkpoint, and from nothing else of it.

        Raises:
            ResumeMismatch: it was trained with another vocabulary or another shape.
        """
        if loaded.manifest.fingerprints.get("vocabulary") != self.fingerprints["vocabulary"]:
            raise ResumeMismatch(
                f"{loaded.name} was trained with another vocabulary, so its rows mean other pieces",
                where="run.fork",
                hint="Fork with the same tokenizer and the same active vocabulary, or start from export/ by model.name_or_path",
            )
        load_model_tensors(self.updater.model, loaded.tensors["model"])

    def _note(self, committed: list[Committed]) -> None:
        for checkpoint in committed:
            self.committed, self.write_s = (checkpoint.update, checkpoint.is_best), checkpoint.seconds


def fingerprints_of(config: Config, store: Store, ids: np.ndarray) -> dict[str, str]:
    """Hashes of what a run's state belongs to.

    `data`: what examples are made from, that is the store, and the user's look-alikes by content. `vocabulary`: what each
    vocabulary row of the model means, by its full id in `ids`.
    """
    confusions = config.corruption.confusions
    content = b"" if confusions is None else Path(confusions).read_bytes()
    return {
        "data": hashlib.sha256(store.fingerprint.encode() + content).hexdigest(),
        "vocabulary": hashlib.sha256(store.tokenizer.fingerprint().encode() + ids.astype("<i8").tobytes()).hexdigest(),
    }


def is_best(state: RunState) -> bool:
    """Whether the state is the best of its run, as far as it is known."""
    return state.best is not None and state.best["update"] == state.update == state.evaluated_update


def model_tensors(model: T5Model) -> dict[str, torch.Tensor]:
    """Parameters under their own names; a tied matrix stands under each of its names and is stored once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters(remove_duplicate=False)}


def load_model_tensors(model: T5Model, tensors: dict[str, torch.Tensor]) -> None:
    """Copy saved parameters into the live model; of what is cut, this process' rows.

    Raises:
        ResumeMismatch: names or shapes are not exactly the model's own.
    """
    live = model_tensors(model)
    if live.keys() != tensors.keys():
        odd = sorted(live.keys() ^ tensors.keys())[:5]
        raise ResumeMismatch("the checkpoint's parameters are not this model's", where=", ".join(odd))
    for name, parameter in live.items():
        if parameter.shape != tensors[name].shape:
            shapes = f"{tuple(tensors[name].shape)} -> {tuple(parameter.shape)}"
            raise ResumeMismatch(f"the shape of {name} differs from the checkpoint's", where=shapes)
        local_tensor(parameter).copy_(local_rows(parameter, tensors[name]))
