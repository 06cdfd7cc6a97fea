"""Reports between evaluations: the training row, and status.json on SIGUSR2."""

import json
import os
from datetime import datetime

import torch

from resilient_t5.checkpoint.manager import Committed
from resilient_t5.files import write_whole
from resilient_t5.training.hardware.machine import memory_mib
from resilient_t5.training.saver import Saver
from resilient_t5.training.schedule import Plan
from resilient_t5.training.state import RunState, SinceLog
from resilient_t5.training.telemetry.console import train_line
from resilient_t5.training.telemetry.run_log import RunLog
from resilient_t5.training.telemetry.timing import TimeLeft, Timing

STATUS = "status.json"


def log_updates(
    state: RunState, plan: Plan, timing: Timing, left: TimeLeft, log: RunLog, *, skipped: int, device: torch.device
) -> None:
    """Log the updates since the last training row, and start new sums."""
    since, state.since_log = state.since_log, SinceLog()
    update_s, wait_s = timing.lap("update"), timing.lap("wait")
    log.event(
        "train",
        state.update,
        line=lambda row: train_line(row, plan.total_updates, left),
        keep="numbers",
        loss=since.nll_sum / since.target_tokens,
        learning_rate=since.learning_rate,
        gradient_norm=since.gradient_norm_sum / since.updates,
        gradient_norm_max=since.gradient_norm_max,
        clipped_updates=since.clipped,
        epoch=state.attempted / plan.updates_per_epoch,
        target_tokens=state.target_tokens,
        useful_token_share=since.useful_tokens / since.padded_tokens,
        nonfinite_total=skipped,
        order_sha256=state.order_sha256,
        tokens_per_s=since.useful_tokens / (update_s + wait_s),
        update_s=update_s / since.updates,
        data_wait_share=wait_s / (update_s + wait_s),
        memory_mib=memory_mib(device),
        eta_s=left.total_s,
    )


def write_status(saver: Saver, plan: Plan, newest: Committed | None, log: RunLog) -> None:
    """Write status.json on the writer rank. A write error is counted, not raised."""
    if log.directory is None:
        return
    state, memory, timing = saver.state, saver.guard.memory, saver.timing
    status = {
        "time": datetime.now().astimezone().isoformat(timespec="milliseconds"),
        "pid": os.getpid(),
        "update": state.update,
        "total_updates": plan.total_updates,
        "attempted": state.attempted,
        "phase": saver.convergence.phase.name,
        "best": state.best,
        "last": state.last,
        "newest_checkpoint": None if newest is None else newest.name,
        "save_in_flight": saver.writer.busy,
        "guard": {"skipped": memory.skipped, "backoffs": memory.backoffs, "rollbacks": memory.rollbacks},
        "wall_s": state.wall_s + timing.elapsed_s,
        "spent_s": timing.spent_s,
        "peak_memory_mib": memory_mib(saver.updater.accelerator.device),
    }
    with log.counting_errors():
        write_whole(log.directory / STATUS, json.dumps(status, indent=2) + "\n")
    log.line(f"status {log.directory / STATUS} written at update {state.update}")
