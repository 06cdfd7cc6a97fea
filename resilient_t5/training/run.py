"""Run: all the parts of one training run; `build_run` of `build.py` is the only place that constructs them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from resilient_t5.checkpoint.manager import CheckpointManager
from resilient_t5.config.schema import Config
from resilient_t5.data.batches import Batches, Prefetcher
from resilient_t5.data.store.store import Store
from resilient_t5.model.precision import Precision
from resilient_t5.training.convergence.machine import ConvergenceMachine, cooldown_factor
from resilient_t5.training.evaluator import Evaluator
from resilient_t5.training.hardware.memory_fit import Fit
from resilient_t5.training.hardware.process_group import ProcessGroup
from resilient_t5.training.saver import Saver
from resilient_t5.training.schedule import Plan, lr_at
from resilient_t5.training.spike_guard import SpikeGuard
from resilient_t5.training.state import RunState
from resilient_t5.training.telemetry.console import Console
from resilient_t5.training.telemetry.metrics_log import AuditTrail, MetricsLog
from resilient_t5.training.telemetry.timing import Left, Timing
from resilient_t5.training.update import Updater


@dataclass
class Run:
    """The parts of a run. What moves is in `state`, `convergence` and `guard`, and in the tensors of `updater`."""

    config: Config
    directory: Path
    device: torch.device
    precision: Precision
    fit: Fit
    store: Store
    trained_ids: np.ndarray
    """Full ids of the model's vocabulary rows, ascending."""
    batches: Batches
    plan: Plan
    updater: Updater
    evaluator: Evaluator
    convergence: ConvergenceMachine
    guard: SpikeGuard
    state: RunState
    manager: CheckpointManager
    saver: Saver
    reader: Prefetcher
    telemetry: MetricsLog
    audit: AuditTrail
    display: Console
    timing: Timing
    ranks: ProcessGroup
    slept_s: float
    """Seconds that the machine had slept when it was last asked."""
    memory_halved: bool = False
    """Whether this process ran out of memory and went on with smaller micro-batches."""

    def learning_rate(self) -> float:
        """Rate of the update about to be done: the schedule, times the cooldown and the guard's factor where there is one."""
        machine, update = self.convergence, self.state.update
        factor = cooldown_factor(update, machine.cooldown_start, machine.cooldown_updates) * self.guard.factor_at(update)
        return factor * lr_at(update, self.plan, self.config.schedule, self.config.optim)

    def open_telemetry(self) -> None:
        """Open metrics.jsonl and TensorBoard again where the state stands; what was written about later updates goes."""
        self.telemetry.close()
        self.telemetry = telemetry_from(self.state, self.config, self.ranks)
        self.audit.attach(self.telemetry, self.display)

    def wall_s(self) -> float:
        """Wall-clock seconds that this run has trained, over all its resumes."""
        return self.state.wall_s + self.timing.elapsed_s

    def left(self) -> Left:
        """The time to the planned end, with the evaluations and saves that are still to come."""
        updates = self.plan.total_updates - self.state.update
        evaluations = -(-updates // self.plan.evaluate_every)
        minutes = self.config.checkpoint.every_minutes
        return self.timing.left(updates, evaluations, None if minutes is None else minutes * 60)


def telemetry_from(state: RunState, config: Config, ranks: ProcessGroup) -> MetricsLog:
    """The log of a run that goes on from `state`; one that keeps nothing in a process that does not write."""
    return MetricsLog(
        Path(config.run.dir) if ranks.is_writer else None,
        from_update=state.update,
        evaluated_update=state.evaluated_update,
        tensorboard=config.telemetry.tensorboard,
    )
