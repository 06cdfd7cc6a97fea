"""What a run writes for people and never reads: training rows, status.json, TensorBoard texts, samples, the windows picture."""

import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from resilient_t5.checkpoint.manager import Committed
from resilient_t5.config.schema import Config, flat
from resilient_t5.files import write_whole
from resilient_t5.restoration.scoring.measure import Sample
from resilient_t5.training.convergence.recordings import read_curves
from resilient_t5.training.convergence.replay import replay
from resilient_t5.training.hardware.machine import memory_mib
from resilient_t5.training.run_directory import ENVIRONMENT
from resilient_t5.training.saver import Saver
from resilient_t5.training.schedule import Plan
from resilient_t5.training.state import RunState, SinceLog
from resilient_t5.training.telemetry.console import train_line
from resilient_t5.training.telemetry.plots import draw_replay
from resilient_t5.training.telemetry.run_log import RunLog
from resilient_t5.training.telemetry.timing import TimeLeft, Timing

STATUS = "status.json"
WINDOWS_PICTURE = "windows.png"
SETTINGS_SHOWN = (
    "optim.lr",
    "optim.name",
    "batch.examples_per_update",
    "corruption.mask_ratio",
    "corruption.mask_ratio_spread",
    "corruption.term_probability",
    "corruption.noise_ratio",
    "convergence.preset",
    "convergence.patience",
    "run.seed",
)


def write_start(log: RunLog, update: int, config_yaml: str) -> None:
    """Write the settings and the environment of this process to TensorBoard."""
    if log.directory is None:
        return
    environment = json.loads((log.directory / ENVIRONMENT).read_text(encoding="utf-8"))
    shown = json.dumps({key: value for key, value in environment.items() if key != "mathematics"}, indent=2, ensure_ascii=False)
    log.draw(lambda board: board.text("run/config", f"```yaml\n{config_yaml}\n```", update))
    log.draw(lambda board: board.text("run/environment", f"```json\n{shown}\n```", update))


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


def write_samples(samples: tuple[Sample, ...], update: int, log: RunLog) -> None:
    """Write the restored samples to TensorBoard and to samples/, and the first one to the console."""
    if not samples or log.directory is None:
        return
    table = samples_table(samples)
    log.draw(lambda board: board.text("samples/probe", table, update))
    directory = log.directory / "samples"
    with log.counting_errors():
        directory.mkdir(exist_ok=True)
        write_whole(directory / f"u{update:08d}.md", table + "\n")
    log.line(f"sample {update:>6} {samples[0].restored}", keep="sample")


def write_events(update: int, log: RunLog) -> None:
    """Write all convergence events so far to TensorBoard, as one table."""
    rows = [row for row in log.rows("evaluation") if row.get("events")]
    lines = [f"| {row['update']} | {row['phase']} | {', '.join(row['events'])} | {_cell(row['why'])} |" for row in rows]
    table = "\n".join(["| update | phase | events | why |", "| --- | --- | --- | --- |", *lines])
    log.draw(lambda board: board.text("events/log", table, update))


def write_outcome(config: Config, state: RunState, wall_s: float, peak_memory_mib: float, log: RunLog) -> None:
    """Write the loss windows picture, and hyper-parameters with final metrics to TensorBoard."""
    assert log.directory is not None  # called on the writer rank only
    picture = log.directory / WINDOWS_PICTURE
    try:
        draw_windows(log.directory)
        log.draw(lambda board: board.picture("convergence/windows", picture, state.update))
    except Exception as error:  # noqa: BLE001  a run never fails for a picture, nor for a broken matplotlib
        log.line(f"no picture of the loss windows: {error}")
    best: dict[str, Any] = state.best or {"loss": None, "term_restoration": None}
    finals = {
        "final/term_rate": best["term_restoration"],
        "final/loss": best["loss"],
        "final/updates": float(state.update),
        "final/hours": wall_s / 3600,
        "final/peak_memory_mib": peak_memory_mib,
    }
    settings = {key: value for key, value in flat(config).items() if key in SETTINGS_SHOWN}
    log.draw(lambda board: board.outcome(settings, finals, state.update))


def draw_windows(directory: Path) -> None:
    """Draw windows.png from the metrics.jsonl of the run in `directory`."""
    (curve,) = read_curves(directory)
    if curve.rules is not None:
        draw_replay(replay(curve, curve.rules), directory / WINDOWS_PICTURE)


def samples_table(samples: tuple[Sample, ...]) -> str:
    """Return source, gold and restored text of each sample as a Markdown table."""
    rows = [f"| {_cell(s.source)} | {_cell(s.gold)} | {_cell(s.restored)} |" for s in samples]
    return "\n".join(["| source | gold | restored |", "| --- | --- | --- |", *rows])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
