"""What a run shows beside its rows: settings, machine, samples as tables, a picture of the loss windows, the outcome.

Everything here is for people; nothing of it is read back by the run.
"""

import json
from pathlib import Path
from typing import Any

from resilient_t5.config.schema import flat
from resilient_t5.files import write_whole
from resilient_t5.restoration.scoring.score_report import RestorationReport, Sample
from resilient_t5.training.convergence.recordings import read_curves
from resilient_t5.training.convergence.replay import replay
from resilient_t5.training.hardware.machine import memory_mib
from resilient_t5.training.run import Run
from resilient_t5.training.run_directory import ENVIRONMENT
from resilient_t5.training.telemetry.metrics_log import read_rows
from resilient_t5.training.telemetry.plots import draw_replay

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


def write_start(run: Run, config_yaml: str) -> None:
    """The settings and the machine of this process, as texts."""
    update = run.state.update
    run.telemetry.text("run/config", f"```yaml\n{config_yaml}\n```", update)
    environment = json.loads((run.directory / ENVIRONMENT).read_text(encoding="utf-8"))
    shown = {key: value for key, value in environment.items() if key != "mathematics"}
    run.telemetry.text("run/environment", f"```json\n{json.dumps(shown, indent=2, ensure_ascii=False)}\n```", update)


def write_samples(run: Run, report: RestorationReport) -> None:
    """One restored example on the console; all of them in TensorBoard and in samples/ as a table."""
    if not report.samples:
        return
    table = samples_table(report.samples)
    run.telemetry.text("samples/probe", table, run.state.update)
    directory = run.directory / "samples"
    try:
        directory.mkdir(exist_ok=True)
        write_whole(directory / f"u{run.state.update:08d}.md", table + "\n")
    except OSError:
        run.telemetry.write_errors += 1
    run.display.line(f"sample {run.state.update:>6} {report.samples[0].restored}", keep="sample")


def write_events(run: Run) -> None:
    """Everything that the convergence machine had to tell so far, as one table in TensorBoard."""
    told = [row for row in read_rows(run.telemetry.path) if row["kind"] == "evaluation" and row.get("events")]
    lines = [f"| {row['update']} | {row['phase']} | {', '.join(row['events'])} | {_cell(row['why'])} |" for row in told]
    table = "\n".join(["| update | phase | events | why |", "| --- | --- | --- | --- |", *lines])
    run.telemetry.text("events/log", table, run.state.update)


def write_outcome(run: Run) -> None:
    """The loss windows as a picture, and what was set beside what came of it."""
    try:
        draw_windows(run.directory)
        run.telemetry.picture("convergence/windows", run.directory / WINDOWS_PICTURE, run.state.update)
    except Exception as error:  # noqa: BLE001  a run never fails for a picture, nor for a broken matplotlib
        run.display.line(f"no picture of the loss windows: {error}")
    best: dict[str, Any] = run.state.best or {"loss": None, "term_restoration": None}
    finals = {
        "final/term_rate": best["term_restoration"],
        "final/loss": best["loss"],
        "final/updates": float(run.state.update),
        "final/hours": run.wall_s() / 3600,
        "final/peak_memory_mib": memory_mib(run.device),
    }
    settings = {key: value for key, value in flat(run.config).items() if key in SETTINGS_SHOWN}
    run.telemetry.outcome(settings, finals, run.state.update)


def draw_windows(directory: Path) -> None:
    """Draw the phases of the run in `directory` from its own metrics.jsonl into windows.png."""
    (curve,) = read_curves(directory)
    if curve.rules is not None:
        draw_replay(replay(curve, curve.rules), directory / WINDOWS_PICTURE)


def samples_table(samples: tuple[Sample, ...]) -> str:
    """Source, gold and restored text of each sample as a Markdown table."""
    rows = [f"| {_cell(s.source)} | {_cell(s.gold)} | {_cell(s.restored)} |" for s in samples]
    return "\n".join(["| source | gold | restored |", "| --- | --- | --- |", *rows])


def _cell(text: str) -> str:
    """Text as one cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")
