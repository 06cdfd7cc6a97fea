"""The loop: evaluate, save, decide, update. Everything else is in the files it names."""

from enum import StrEnum

from resilient_t5.training.out_of_memory import update_within_memory
from resilient_t5.training.recovery import check_suspend, guard_update, save_if_due
from resilient_t5.training.reports.update_log import log_updates, report_status
from resilient_t5.training.run import Run
from resilient_t5.training.run_evaluation import run_evaluation
from resilient_t5.training.signals import StopSignal


class StopReason(StrEnum):
    """Why the loop came back. All but INTERRUPTED are final: a resume finds nothing left to do."""

    MAX_UPDATES = "max_updates"
    MAX_TIME = "max_time"
    SATURATED = "saturated"
    DIVERGED = "diverged"
    INTERRUPTED = "interrupted"


def train(run: Run, stop: StopSignal) -> StopReason:
    """Train until there is a reason to stop. One pass is one optimizer update; nothing else advances training.

    Evaluation comes before the save of the same update, so a checkpoint holds its own verdict; the reason to stop is
    looked for before the next update, so resuming a finished run does nothing. Whatever a rollback changes is read anew
    in the next pass. With several processes all of them are in here and take every branch together.

    Raises:
        Diverged: the guard gave up.
        DeviceLost: the machine slept, and its GPU with it.
        OutOfMemory: smaller micro-batches did not help.
        StorageError: a save failed for a reason that waiting does not fix.
    """
    while True:
        check_suspend(run)
        if stop.status_requested:
            report_status(run, stop)
        if evaluation_due(run):
            run_evaluation(run, stop)
        save_if_due(run, stop)
        if (reason := why_stop(run, stop)) is not None:
            return reason
        with run.timing.measure("wait"):
            micro_batches = run.reader.take()
        if run.guard.should_skip(run.state.attempted):
            run.state.skip()
            continue
        with run.timing.measure("update"):
            result = update_within_memory(run, stop, micro_batches)
        if result is None:
            continue
        run.state.count(result)
        run.display.advance(run.state.update)
        if result.applied and run.state.update % run.config.telemetry.log_every == 0:
            log_updates(run)
        guard_update(run, stop, micro_batches, result)


def why_stop(run: Run, stop: StopSignal) -> StopReason | None:
    """The only place that ends a run."""
    if run.state.ended is not None:
        return StopReason(run.state.ended)
    if run.ranks.stops(stop):
        return StopReason.INTERRUPTED
    if run.state.update >= run.plan.total_updates:
        return StopReason.MAX_UPDATES
    if run.plan.max_time_s is not None and run.ranks.broadcast("time", run.wall_s() >= run.plan.max_time_s):
        return StopReason.MAX_TIME
    return None


def evaluation_due(run: Run) -> bool:
    """Whether this update is to be evaluated and has not been; a cut-short evaluation is due again after a resume."""
    update = run.state.update
    planned = update % run.plan.evaluate_every == 0 or update >= run.plan.total_updates
    return planned and run.state.evaluated_update != update
