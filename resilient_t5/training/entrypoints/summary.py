"""summary.json: how a run ended, in numbers; and the closing lines of the console."""

import json

from resilient_t5.errors import ExitCode
from resilient_t5.files import write_whole
from resilient_t5.training.hardware.machine import memory_mib
from resilient_t5.training.loop import StopReason
from resilient_t5.training.run import Run
from resilient_t5.training.telemetry.timing import readable

STATUS = {
    StopReason.MAX_UPDATES: "finished",
    StopReason.MAX_TIME: "finished",
    StopReason.SATURATED: "saturated",
    StopReason.DIVERGED: "diverged",
    StopReason.INTERRUPTED: "interrupted",
}
STATUS_OF_CODE = {ExitCode.DIVERGED: "diverged", ExitCode.RESUMABLE: "interrupted"}
SUMMARY = "summary.json"


def write_summary(run: Run, status: str, reason: str, code: int) -> None:
    """Log the end of the run and write summary.json."""
    state = run.state
    summary = {
        "status": status,
        "stop_reason": str(reason),
        "exit_code": int(code),
        "updates": state.update,
        "best": state.best,
        "last": state.last,
        "before_training": state.before,
        "target_tokens": state.target_tokens,
        "wall_s": wall_s(run),
        "peak_memory_mib": memory_mib(run.device),
        "useful_token_share": state.useful_tokens / state.padded_tokens if state.padded_tokens else None,
    }
    run.log.event("end", state.update, status=status, stop_reason=str(reason), exit_code=int(code))
    write_whole(run.manager.run_directory / SUMMARY, json.dumps(summary, indent=2) + "\n")


def wall_s(run: Run) -> float:
    """Seconds that the run has trained, over all its resumes."""
    return run.state.wall_s + run.timing.elapsed_s


def closing_lines(run: Run, reason: StopReason) -> list[str]:
    """Return the last console lines: why the run ended, its result, and where the model is."""
    state, export = run.state, run.manager.run_directory / "export"
    lines = [f"end    {STATUS[reason]} ({reason}) at update {state.update} after {readable(wall_s(run))}"]
    if state.before is not None and state.best is not None:
        before, after = state.before["term_restoration"], state.best["term_restoration"]
        rates = "" if before is None and after is None else f" | term restoration {percent(before)} -> {percent(after)}"
        lines.append(
            f"result loss {state.before['loss']:.4f} -> {state.best['loss']:.4f} at update {state.best['update']}{rates}"
        )
    return [*lines, f"model  {export / 'best'} (best) and {export / 'last'} (last)"]


def percent(value: float | None) -> str:
    """Format a rate."""
    return f"{100 * value:.1f} %" if value is not None else "not measured"
