"""The training loop: evaluate, save, decide, update."""

from enum import StrEnum

from resilient_t5.training.hardware.process_group import ProcessGroup
from resilient_t5.training.reports.artifacts import log_updates, write_status
from resilient_t5.training.run import Run
from resilient_t5.training.run_evaluation import run_evaluation
from resilient_t5.training.schedule import Plan, learning_rate, time_left
from resilient_t5.training.signals import StopSignal
from resilient_t5.training.state import RunState


class StopReason(StrEnum):
    """Why the loop ended. All but INTERRUPTED are final: a resumed run has nothing left to do."""

    MAX_UPDATES = "max_updates"
    MAX_TIME = "max_time"
    SATURATED = "saturated"
    DIVERGED = "diverged"
    INTERRUPTED = "interrupted"


def train(run: Run, stop: StopSignal) -> StopReason:
    """Train until there is a reason to stop. One pass is one optimizer update.

    An update is evaluated before it is saved, so the checkpoint includes the verdict. The reason to stop is checked before
    the next update, so resuming a finished run does nothing. All ranks run this loop and take every branch together.

    Raises:
        Diverged: the spike guard aborted the run.
        DeviceLost: the machine was suspended while the run used a GPU.
        OutOfMemory: smaller micro-batches did not help.
        StorageError: a save failed for a reason that waiting does not fix.
    """
    config, plan, state, guard, log, timing = run.config, run.plan, run.state, run.guard, run.log, run.timing
    while True:
        run.suspend.check(state.update, run.device, log)
        if stop.status_requested:
            stop.status_requested = False
            write_status(run.saver, plan, run.manager.newest, log)
        if evaluation_due(state, plan):
            rate = learning_rate(state.update, plan, config, run.convergence, guard)
            with timing.measure("evaluation"):
                run_evaluation(run.evaluator, run.convergence, state, log, rate, stop)
        run.recovery.save_if_due(stop)
        if (reason := why_stop(state, plan, run.group, state.wall_s + timing.elapsed_s, stop)) is not None:
            return reason
        with timing.measure("wait"):
            micro_batches = run.prefetcher.take()
        if guard.should_skip(state.attempted):
            state.skip()
            continue
        rate = learning_rate(state.update, plan, config, run.convergence, guard)
        with timing.measure("update"):
            result = run.memory_guard(micro_batches, state, rate, stop)
        if result is None:  # interrupted: it is repeated as a whole after the resume
            continue
        state.count(result)
        log.console.advance(state.update)
        if result.applied and state.update % config.telemetry.log_every == 0:
            left = time_left(plan, state.update, timing, config.checkpoint)
            log_updates(state, plan, timing, left, log, skipped=guard.memory.skipped, device=run.device)
        run.recovery.guard_update(result, micro_batches, stop)


def why_stop(state: RunState, plan: Plan, group: ProcessGroup, wall_s: float, stop: StopSignal) -> StopReason | None:
    """Return the reason to end the run, if there is one; nothing else ends it.

    Args:
        wall_s: seconds that the run has trained, over all its resumes.
    """
    if state.ended is not None:
        return StopReason(state.ended)
    if group.stops(stop):
        return StopReason.INTERRUPTED
    if state.update >= plan.total_updates:
        return StopReason.MAX_UPDATES
    if plan.max_time_s is not None and group.broadcast("time", wall_s >= plan.max_time_s):
        return StopReason.MAX_TIME
    return None


def evaluation_due(state: RunState, plan: Plan) -> bool:
    """Return whether this update is to be evaluated and has not been; an interrupted evaluation stays due."""
    planned = state.update % plan.evaluate_every == 0 or state.update >= plan.total_updates
    return planned and state.evaluated_update != state.update
