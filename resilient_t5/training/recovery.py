"""What happens to a run that something went wrong in: skip, lower the learning rate, go back to a healthy checkpoint, give up.

The raw values of every update that gave a reason, with its examples, are in the `guard` rows of metrics.jsonl.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

from resilient_t5.checkpoint.manager import CheckpointManager, Loaded
from resilient_t5.checkpoint.snapshot import NonFiniteState
from resilient_t5.data.batches import MicroBatch, Prefetcher
from resilient_t5.errors import DeviceLost, Diverged, NoValidCheckpoint
from resilient_t5.files import write_whole
from resilient_t5.training.hardware.machine import slept_s
from resilient_t5.training.hardware.process_group import ProcessGroup
from resilient_t5.training.run import Run
from resilient_t5.training.signals import StopSignal
from resilient_t5.training.spike_guard import Action, Verdict
from resilient_t5.training.state import UpdateResult
from resilient_t5.training.telemetry.metrics_log import plain, read_rows

DIAGNOSIS = "diagnosis.json"
ROWS_IN_DIAGNOSIS = 20
NOTICED_SLEEP_S = 5.0
ADVICE = (
    "Lower optim.lr, or lengthen schedule.warmup; a spike that comes back at other examples is the learning rate.",
    "Set hardware.precision to fp32, or bf16 where the device does it natively.",
    "Look at the examples of the rows above: all of them from one document means damaged text.",
    "Start a new run from the newest healthy checkpoint: --run.dir NEW --run.fork CHECKPOINT.",
)


def guard_update(run: Run, stop: StopSignal, micro_batches: Sequence[MicroBatch], result: UpdateResult) -> None:
    """Let the guard judge the update that was just counted, and do what it says.

    Raises:
        Diverged: it gave up.
    """
    attempt = run.state.attempted - 1
    if result.applied:
        loss = result.nll_sum / result.target_tokens
        verdict = run.guard.applied(attempt, run.state.update, loss, result.gradient_norm)
    elif result.half_moved:
        verdict = run.guard.not_finite(attempt, result.why)
    else:
        verdict = run.guard.refused(attempt, overflow=result.overflow)
    if verdict.action is Action.OK:
        return
    tell(run, verdict, result, micro_batches)
    follow(run, stop, verdict)


def save_if_due(run: Run, stop: StopSignal) -> None:
    """Save if it is time to; a state that holds NaN or infinity is never saved, and the run goes back instead.

    Process 0 saves, and tells the others whether its state was refused; with cut layers all take part.

    Raises:
        Diverged: the guard gave up.
        DiskFull, StorageError: a save failed for a reason that waiting does not fix.
    """
    cause, refused = None, None
    try:
        cause = run.saver.due(run.state, stop) if run.ranks.is_writer else None
    except NonFiniteState as error:
        refused = f"{error.what} ({error.where})"[:300]
    try:
        if (cause := run.updater.layers.broadcast_if_sharded("due", cause)) is not None:
            run.saver.save(run.state, cause, stop)
    except NonFiniteState as error:
        refused = f"{error.what} ({error.where})"[:300]
    if (refused := run.ranks.broadcast("save", refused)) is not None:
        verdict = run.guard.not_finite(max(0, run.state.attempted - 1), refused)
        run.telemetry.row("guard", run.state.update, action=str(verdict.action), why=verdict.why)
        follow(run, stop, verdict)


def check_suspend(run: Run) -> None:
    """Say so when the machine slept since the last look.

    Raises:
        DeviceLost: and the run is on a GPU, whose context rarely survives that. Nothing on it is touched any more; a save
            that is in flight still commits.
    """
    total_s = slept_s()
    new_s, run.slept_s = total_s - run.slept_s, total_s
    if new_s < NOTICED_SLEEP_S:
        return
    run.telemetry.row("signal", run.state.update, signal="suspend", slept_s=new_s)
    if run.device.type == "cpu":
        run.display.line(f"woke   after {new_s:.0f} s of sleep; a run on a CPU goes on")
        return
    raise DeviceLost(
        f"the machine slept for {new_s:.0f} s, which the state on the GPU may not have survived",
        where=f"update {run.state.update}",
        hint="Start the same command again: it goes on from the newest checkpoint",
    )


def tell(run: Run, verdict: Verdict, result: UpdateResult, micro_batches: Sequence[MicroBatch]) -> None:
    """The row and the line of a verdict, with raw values: what was not finite is written as it was."""
    loss = result.nll_sum / result.target_tokens if result.target_tokens else result.nll_sum
    why = verdict.why or result.why
    run.telemetry.row(
        "guard",
        run.state.update,
        action=str(verdict.action),
        why=why,
        attempted=run.state.attempted - 1,
        applied=result.applied,
        overflow=result.overflow,
        loss=loss,
        gradient_norm=result.gradient_norm,
        learning_rate=result.learning_rate,
        examples=[int(example) for batch in micro_batches for example in batch.example_ids],
        source_tokens=[length for batch in micro_batches for length in batch.source_mask_BS.sum(1).tolist()],
        target_tokens=[length for batch in micro_batches for length in (batch.labels_BT >= 0).sum(1).tolist()],
    )
    run.display.line(f"guard  {verdict.action}: {why}; loss {loss:.4g}, gradient norm {result.gradient_norm:.4g}")


def follow(run: Run, stop: StopSignal, verdict: Verdict) -> None:
    """Do what a verdict says beyond going on.

    Raises:
        Diverged: it says that the run is beyond help, or there is nothing to go back to.
    """
    if verdict.action is Action.ROLLBACK:
        roll_back(run, stop, verdict)
    elif verdict.action is Action.ABORT:
        raise abort(run, verdict.why)


def roll_back(run: Run, stop: StopSignal, verdict: Verdict) -> None:
    """Go back to the newest healthy checkpoint, pass over what led here, and commit that at once.

    The commit has a new number, so a process that is killed right after it goes on from there and not from what was
    left behind.

    Raises:
        Diverged: no healthy checkpoint is left.
        DiskFull, StorageError: the rollback could not be committed.
    """
    before, wall_s, left_behind = run.guard.memory, run.state.wall_s, run.state.update
    _settle_writer(run)
    try:
        loaded = load_together(run.manager, run.ranks, lambda: run.manager.load_newest(healthy=True))
    except NoValidCheckpoint as error:
        raise abort(run, f"{verdict.why}, and {error.what}") from error
    if loaded is None:
        raise abort(run, f"{verdict.why}, and no checkpoint was ever committed")
    run.reader.close()
    run.state = run.saver.restore(loaded)
    run.state.wall_s = wall_s  # the time that was lost was spent all the same
    run.guard.rolled_back(before, run.state.update, verdict.attempts)
    run.reader = Prefetcher(run.batches, run.state.attempted, run.config.batch.readers)
    run.open_telemetry()
    passed_over = run.guard.memory.passed_over
    run.telemetry.row("guard", run.state.update, action="rolled back", to=loaded.name, passed_over=passed_over, why=verdict.why)
    run.display.line(f"guard  back from update {left_behind} to {loaded.name}; passes over attempted updates {passed_over}")
    if run.ranks.is_writer or run.updater.layers.is_sharded:
        run.saver.save(run.state, "rollback", stop)


def load_together(manager: CheckpointManager, ranks: ProcessGroup, choose: Callable[[], Loaded | None]) -> Loaded | None:
    """What `choose` loads in process 0, loaded by every process; a damaged one is put aside by process 0 alone.

    Raises:
        NoValidCheckpoint, StorageError: as `choose`; or this process does not see the directory of process 0.
    """
    loaded = choose() if ranks.is_writer else None
    name = ranks.broadcast("load", None if loaded is None else loaded.name)
    return loaded if ranks.is_writer or name is None else manager.load(name)


def abort(run: Run, why: str) -> Diverged:
    """Write diagnosis.json; returns the error that ends the run."""
    path = run.directory / DIAGNOSIS
    hint = f"{path} holds the raw values and what to try"
    if not run.ranks.is_writer:
        return Diverged(why, where=f"update {run.state.update}", hint=hint)
    run.telemetry.flush()
    rows = [row for row in read_rows(run.telemetry.path) if row["kind"] == "guard"][-ROWS_IN_DIAGNOSIS:]
    memory = run.guard.memory
    diagnosis: dict[str, Any] = {
        "why": why,
        "update": run.state.update,
        "attempted": run.state.attempted,
        "learning_rate": run.learning_rate(),
        "precision": run.precision.name,
        "skipped": memory.skipped,
        "backoffs": memory.backoffs,
        "rollbacks": memory.rollbacks,
        "passed_over": memory.passed_over,
        "last_losses": memory.losses[-ROWS_IN_DIAGNOSIS:],
        "last_gradient_norms": memory.gradient_norms[-ROWS_IN_DIAGNOSIS:],
        "guard_rows": rows,
        "advice": ADVICE,
    }
    write_whole(path, json.dumps(plain(diagnosis), indent=2, ensure_ascii=False) + "\n")
    return Diverged(why, where=f"update {run.state.update}", hint=hint)


def _settle_writer(run: Run) -> None:
    """Wait until no save is in flight; that one more of them held NaN is no news."""
    try:
        run.saver.writer.drain()
    except NonFiniteState as error:
        run.telemetry.row("guard", run.state.update, action="save refused", why=str(error))
