"""What is said between evaluations: the row of the updates since the last one, and the status file that SIGUSR2 asks for."""

import json
import os
from datetime import datetime

from resilient_t5.files import write_whole
from resilient_t5.training.hardware.machine import memory_mib
from resilient_t5.training.run import Run
from resilient_t5.training.signals import StopSignal
from resilient_t5.training.state import SinceLog
from resilient_t5.training.telemetry.console import train_line

STATUS = "status.json"


def log_updates(run: Run) -> None:
    """Write the training row of the updates since the last one, and move the live bar."""
    state, since = run.state, run.state.since_log
    update_s, wait_s = run.timing.lap("update"), run.timing.lap("wait")
    left = run.left()
    row = run.telemetry.row(
        "train",
        state.update,
        loss=since.nll_sum / since.target_tokens,
        learning_rate=since.learning_rate,
        gradient_norm=since.gradient_norm_sum / since.updates,
        gradient_norm_max=since.gradient_norm_max,
        clipped_updates=since.clipped,
        epoch=state.attempted / run.plan.updates_per_epoch,
        target_tokens=state.target_tokens,
        useful_token_share=since.useful_tokens / since.padded_tokens,
        nonfinite_total=run.guard.memory.skipped,
        order_sha256=state.order_sha256,
        tokens_per_s=since.useful_tokens / (update_s + wait_s),
        update_s=update_s / since.updates,
        data_wait_share=wait_s / (update_s + wait_s),
        memory_mib=memory_mib(run.device),
        eta_s=left.total_s,
    )
    state.since_log = SinceLog()
    run.display.line(train_line(row, run.plan.total_updates, left), keep="numbers")


def report_status(run: Run, stop: StopSignal) -> None:
    """Write status.json: where the run stands at this moment. A disk that refuses it is counted, and ends nothing."""
    stop.status_requested = False
    if not run.ranks.is_writer:
        return
    state, newest, memory = run.state, run.manager.newest, run.guard.memory
    status = {
        "time": datetime.now().astimezone().isoformat(timespec="milliseconds"),
        "pid": os.getpid(),
        "update": state.update,
        "total_updates": run.plan.total_updates,
        "attempted": state.attempted,
        "phase": run.convergence.phase.name,
        "best": state.best,
        "last": state.last,
        "newest_checkpoint": None if newest is None else newest.name,
        "save_in_flight": run.saver.writer.busy,
        "guard": {"skipped": memory.skipped, "backoffs": memory.backoffs, "rollbacks": memory.rollbacks},
        "wall_s": run.wall_s(),
        "spent_s": run.timing.spent_s,
        "peak_memory_mib": memory_mib(run.device),
    }
    try:
        write_whole(run.directory / STATUS, json.dumps(status, indent=2) + "\n")
    except OSError:
        run.telemetry.write_errors += 1
    run.display.line(f"status {run.directory / STATUS} written at update {state.update}")
