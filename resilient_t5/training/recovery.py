"""React to a bad update, a non-finite state or a suspend: skip, back off, roll back to a healthy checkpoint, or abort.

The raw values and examples of every such update are in the `guard` rows of metrics.jsonl.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from resilient_t5.checkpoint.manager import CheckpointManager, Loaded
from resilient_t5.checkpoint.tensors import NonFiniteState
from resilient_t5.data.batches import MicroBatch, Prefetcher
from resilient_t5.errors import DeviceLost, Diverged, NoValidCheckpoint
from resilient_t5.files import write_whole
from resilient_t5.training.hardware.machine import slept_s
from resilient_t5.training.hardware.process_group import ProcessGroup
from resilient_t5.training.saver import Saver
from resilient_t5.training.schedule import Plan, learning_rate
from resilient_t5.training.signals import StopSignal
from resilient_t5.training.spike_guard import Action, SpikeGuard, Verdict
from resilient_t5.training.state import RunState, UpdateResult
from resilient_t5.training.telemetry.console import guard_line, rollback_line
from resilient_t5.training.telemetry.metrics_log import plain
from resilient_t5.training.telemetry.run_log import RunLog

DIAGNOSIS = "diagnosis.json"
ROWS_IN_DIAGNOSIS = 20
MIN_SUSPEND_S = 5.0
ADVICE = (
    "Lower optim.lr or lengthen schedule.warmup: spikes that recur on other examples come from the learning rate.",
    "Set hardware.precision to fp32, or to bf16 if the device supports it natively.",
    "Inspect the examples of the rows above: if all come from one document, its text is damaged.",
    "Start a new run from the newest healthy checkpoint: --run.dir NEW --run.fork CHECKPOINT.",
)


@dataclass
class SuspendDetector:
    """Detects that the machine was suspended since the last check."""

    slept_s: float = field(default_factory=slept_s)
    """Seconds that the machine had been suspended at the last check."""

    def check(self, update: int, device: torch.device, log: RunLog) -> None:
        """Report a suspend since the last check.

        Raises:
            DeviceLost: the run uses a GPU, whose context rarely survives a suspend. A save in flight still commits.
        """
        total_s = slept_s()
        new_s, self.slept_s = total_s - self.slept_s, total_s
        if new_s < MIN_SUSPEND_S:
            return
        line = f"woke   after {new_s:.0f} s of sleep; the run on the CPU continues" if device.type == "cpu" else ""
        log.event("signal", update, line=line, signal="suspend", slept_s=new_s)
        if device.type != "cpu":
            raise DeviceLost(
                f"the machine slept for {new_s:.0f} s, and the GPU state may be lost",
                where=f"update {update}",
                hint="Run the same command again to continue from the newest checkpoint",
            )


@dataclass(frozen=True)
class Recovery:
    """Carries out the verdicts of the spike guard; the training state is reached through `saver`."""

    saver: Saver
    manager: CheckpointManager
    prefetcher: Prefetcher
    plan: Plan
    log: RunLog

    def guard_update(self, result: UpdateResult, micro_batches: Sequence[MicroBatch], stop: StopSignal) -> None:
        """Let the guard judge the update that was just counted, and carry out its verdict.

        Raises:
            Diverged: the guard aborted the run.
        """
        state = self.saver.state
        verdict = judge_update(self.saver.guard, state, result)
        if verdict.action is not Action.OK:
            log_verdict(verdict, result, micro_batches, state, self.log)
            self.apply_verdict(verdict, stop)

    def save_if_due(self, stop: StopSignal) -> None:
        """Save if a save is due. If the state holds NaN or infinity, roll back instead.

        Rank 0 saves and broadcasts whether the state was refused; with sharded layers all ranks take part.

        Raises:
            Diverged: the guard aborted the run.
            DiskFull, StorageError: a save failed for a reason that waiting does not fix.
        """
        saver, state, group = self.saver, self.saver.state, self.saver.updater.group
        cause, refused = None, None
        try:
            cause = saver.due(stop) if group.is_writer else None
        except NonFiniteState as error:
            refused = f"{error.what} ({error.where})"[:300]
        try:
            if (cause := saver.updater.sharded.broadcast_if_sharded("due", cause)) is not None:
                saver.save(cause, stop)
        except NonFiniteState as error:
            refused = f"{error.what} ({error.where})"[:300]
        if (refused := group.broadcast("save", refused)) is not None:
            verdict = saver.guard.not_finite(max(0, state.attempted - 1), refused)
            self.log.event("guard", state.update, action=str(verdict.action), why=verdict.why)
            self.apply_verdict(verdict, stop)

    def apply_verdict(self, verdict: Verdict, stop: StopSignal) -> None:
        """Roll back or abort if the verdict requires it.

        Raises:
            Diverged: the verdict is to abort, or there is no checkpoint to roll back to.
        """
        if verdict.action is Action.ROLLBACK:
            self.roll_back(verdict, stop)
        elif verdict.action is Action.ABORT:
            raise self.abort(verdict.why)

    def roll_back(self, verdict: Verdict, stop: StopSignal) -> None:
        """Restore the newest healthy checkpoint, skip the updates that preceded the divergence, and commit at once.

        The commit has a new number, so a process that is killed right after it resumes from there.

        Raises:
            Diverged: no healthy checkpoint is left.
            DiskFull, StorageError: the rollback could not be committed.
        """
        saver, state, guard = self.saver, self.saver.state, self.saver.guard
        memory, wall_s, from_update = guard.memory, state.wall_s, state.update
        self._drain_writer()
        try:
            loaded = load_together(self.manager, saver.updater.group, healthy=True)
        except NoValidCheckpoint as error:
            raise self.abort(f"{verdict.why}, and {error.what}") from error
        if loaded is None:
            raise self.abort(f"{verdict.why}, and no checkpoint was ever committed")
        saver.restore(loaded)
        state.wall_s = wall_s  # the lost time counts
        guard.rolled_back(memory, state.update, verdict.attempts)
        self.prefetcher.restart(state.attempted)
        self.log.open_at(state)
        skipped = guard.memory.passed_over
        line = rollback_line(from_update, loaded.name, skipped)
        row: dict[str, Any] = {"action": "rolled back", "to": loaded.name, "passed_over": skipped, "why": verdict.why}
        self.log.event("guard", state.update, line=line, **row)
        if saver.updater.group.is_writer or saver.updater.sharded.is_sharded:
            saver.save("rollback", stop)

    def abort(self, why: str) -> Diverged:
        """Write diagnosis.json on the writer rank; return the error that ends the run."""
        saver, state, memory = self.saver, self.saver.state, self.saver.guard.memory
        path = self.manager.run_directory / DIAGNOSIS
        if saver.updater.group.is_writer:
            diagnosis: dict[str, Any] = {
                "why": why,
                "update": state.update,
                "attempted": state.attempted,
                "learning_rate": learning_rate(state.update, self.plan, saver.config, saver.convergence, saver.guard),
                "precision": saver.conditions["precision"],
                "skipped": memory.skipped,
                "backoffs": memory.backoffs,
                "rollbacks": memory.rollbacks,
                "passed_over": memory.passed_over,
                "last_losses": memory.losses[-ROWS_IN_DIAGNOSIS:],
                "last_gradient_norms": memory.gradient_norms[-ROWS_IN_DIAGNOSIS:],
                "guard_rows": list(self.log.rows("guard"))[-ROWS_IN_DIAGNOSIS:],
                "advice": ADVICE,
            }
            write_whole(path, json.dumps(plain(diagnosis), indent=2, ensure_ascii=False) + "\n")
        return Diverged(why, where=f"update {state.update}", hint=f"{path} holds the raw values and advice")

    def _drain_writer(self) -> None:
        """Wait for a save in flight; log, but do not raise, that it held NaN."""
        try:
            self.saver.writer.drain()
        except NonFiniteState as error:
            self.log.event("guard", self.saver.state.update, action="save refused", why=str(error))


def judge_update(guard: SpikeGuard, state: RunState, result: UpdateResult) -> Verdict:
    """Return the guard's verdict on the update that was just counted."""
    attempt = state.attempted - 1
    if result.applied:
        return guard.applied(attempt, state.update, result.nll_sum / result.target_tokens, result.gradient_norm)
    if result.half_moved:
        return guard.not_finite(attempt, result.why)
    return guard.refused(attempt, overflow=result.overflow)


def log_verdict(
    verdict: Verdict, result: UpdateResult, micro_batches: Sequence[MicroBatch], state: RunState, log: RunLog
) -> None:
    """Log a verdict with the raw values and the examples of its update."""
    lengths = [batch.lengths() for batch in micro_batches]
    log.event(
        "guard",
        state.update,
        line=guard_line,
        action=str(verdict.action),
        why=verdict.why or result.why,
        attempted=state.attempted - 1,
        applied=result.applied,
        overflow=result.overflow,
        loss=result.nll_sum / result.target_tokens if result.target_tokens else result.nll_sum,
        gradient_norm=result.gradient_norm,
        learning_rate=result.learning_rate,
        examples=[int(example) for batch in micro_batches for example in batch.example_ids],
        source_tokens=[length for sources, _ in lengths for length in sources],
        target_tokens=[length for _, targets in lengths for length in targets],
    )


def load_together(
    manager: CheckpointManager, group: ProcessGroup, name: str | None = None, *, healthy: bool = False
) -> Loaded | None:
    """Load the checkpoint `name`, or the newest one, on every rank; only rank 0 chooses and quarantines damaged ones.

    Raises:
        NoValidCheckpoint, StorageError: no valid checkpoint; or this rank cannot read the directory of rank 0.
    """
    loaded = None
    if group.is_writer:
        loaded = manager.load_newest(healthy=healthy) if name is None else manager.load(name)
    name = group.broadcast("load", None if loaded is None else loaded.name)
    return loaded if group.is_writer or name is None else manager.load(name)
