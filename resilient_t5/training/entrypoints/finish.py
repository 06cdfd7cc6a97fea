"""How a run ends: the last save, the exports, summary.json, and a last line that says what to do next."""

import json
from dataclasses import replace
from typing import Any

from resilient_t5.errors import ExitCode, NoValidCheckpoint, ResilientError
from resilient_t5.files import write_whole
from resilient_t5.training.build import original_tables
from resilient_t5.training.entrypoints.export import facts_of, restoration_row
from resilient_t5.training.entrypoints.model_directory import CardFacts, ExportParts, export_parts, model_card, write_export
from resilient_t5.training.evaluator import restore_terms
from resilient_t5.training.hardware.machine import memory_mib
from resilient_t5.training.hardware.process_group import SINGLE_PROCESS
from resilient_t5.training.loop import StopReason
from resilient_t5.training.reports.artifacts import write_outcome
from resilient_t5.training.run import Run
from resilient_t5.training.saver import load_model_tensors
from resilient_t5.training.signals import StopSignal
from resilient_t5.training.telemetry.timing import readable

STATUS = {
    StopReason.MAX_UPDATES: "finished",
    StopReason.MAX_TIME: "finished",
    StopReason.SATURATED: "saturated",
    StopReason.SATURATED_MAX: "saturated",
    StopReason.OVERFIT: "finished",
    StopReason.DIVERGED: "diverged",
    StopReason.INTERRUPTED: "interrupted",
}
STATUS_OF_CODE = {ExitCode.DIVERGED: "diverged", ExitCode.RESUMABLE: "interrupted"}
SUMMARY = "summary.json"


def conclude(run: Run, reason: StopReason, stop: StopSignal) -> ExitCode:
    """Save, export unless the run was interrupted, write summary.json; returns the exit code.

    Process 0 does all of this by itself; with cut layers the others `attend`.
    """
    if reason is StopReason.INTERRUPTED:
        return _interrupt(run, stop)
    run.saver.finish(run.state, "final", stop)
    with run.updater.layers.unsharded(no_timeout=True):
        export_best_and_last(run, stop)
    code = ExitCode.DIVERGED if reason is StopReason.DIVERGED else ExitCode.OK
    write_summary(run, STATUS[reason], reason, code)
    write_outcome(run)
    for line in closing_lines(run, reason):
        run.display.line(line)
    return code


def attend(run: Run, reason: StopReason, stop: StopSignal) -> ExitCode:
    """What the processes that do not write have to do in the ending: with cut layers, hand in their rows."""
    if run.updater.layers.is_sharded:
        interrupted = reason is StopReason.INTERRUPTED
        run.saver.finish(run.state, "signal" if interrupted else "final", stop)
        if not interrupted:
            with run.updater.layers.unsharded(no_timeout=True):
                pass
    return ExitCode.OK


def _interrupt(run: Run, stop: StopSignal) -> ExitCode:
    name = stop.received.name if stop.received else "STOP"
    run.display.line(f"stop   {name} received; saving update {run.state.update}")
    try:
        run.saver.finish(run.state, "signal", stop)
    except ResilientError as error:  # whoever sent the signal wants the process gone: the last commit must do
        run.display.line(str(error))
    saved = run.saver.committed[0]
    run.telemetry.row("signal", run.state.update, signal=name, count=stop.count, saved_update=saved)
    write_summary(run, STATUS[StopReason.INTERRUPTED], StopReason.INTERRUPTED, stop.exit_code)
    what = "saved" if saved == run.state.update else f"update {run.state.update} is not saved, the newest on disk is {saved}"
    run.display.line(f"{what}; go on with: bin/train --config {run.directory / 'config.yaml'}")
    return stop.exit_code


def save_current_state(run: Run, stop: StopSignal) -> None:
    """Save the last whole update after another process was lost; no sum over processes is waited for behind a move."""
    if not run.ranks.is_writer:
        return
    try:
        if not run.updater.layers.is_sharded:
            run.saver.finish(run.state, "signal", stop)
            return
        run.saver.settle()
        saved = run.saver.committed[0]
        run.display.line(f"stop   the lost process took its rows of the layers with it; the newest on disk is update {saved}")
    except ResilientError as error:  # the last commit must do
        run.display.line(str(error))


def conclude_failure(run: Run, error: ResilientError) -> None:
    """Write summary.json for a run that an error ended; the checkpoints stay as they are."""
    if not run.ranks.is_writer:
        return
    run.display.line(str(error))
    write_summary(run, STATUS_OF_CODE.get(error.exit_code, "failed"), error.label, error.exit_code)


def is_concluded(run: Run) -> bool:
    """Whether this very state was summed up and exported before, so that there is nothing left to do."""
    try:
        summary = json.loads((run.directory / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    final = summary.get("status") in ("finished", "saturated") and summary.get("updates") == run.state.update
    out_of_time = run.plan.max_time_s is not None and run.wall_s() >= run.plan.max_time_s
    ended = run.state.ended is not None or run.state.update >= run.plan.total_updates or out_of_time
    exported = all((run.directory / "export" / name / "config.json").exists() for name in ("best", "last"))
    return bool(final and ended and exported)


def export_best_and_last(run: Run, stop: StopSignal) -> None:
    """Write export/last from the live weights and export/best from the best checkpoint, measuring what is missing."""
    parts = export_parts(run.config, run.store, run.updater.model, run.trained_ids, original_tables(run.config, run.store))
    state = run.state
    last = facts_of(run.store, run.directory, "last", state.to_json())
    _export(run, parts, last, state.last, stop)
    best = state.best
    update, target_tokens = state.update, state.target_tokens
    if best is not None and best["update"] != state.update:
        stored = run.manager.load_best()
        if stored is None:
            raise NoValidCheckpoint(
                f"the checkpoint of the best update {best['update']} is gone",
                where=str(run.manager.directory),
                hint="export/last holds the final weights",
            )
        if stored.update != best["update"]:  # a save that the disk refused, or damage
            run.display.line(f"best   update {best['update']} is not on disk any more; export/best is update {stored.update}")
            best = state.best = stored.state["run"]["best"]
        load_model_tensors(run.updater.model, stored.tensors["model"])
        update, target_tokens = stored.update, stored.state["run"]["target_tokens"]
    facts = facts_of(run.store, run.directory, "best", state.to_json())
    _export(run, parts, replace(facts, update=update, target_tokens=target_tokens, record=best), best, stop)


def _export(run: Run, parts: ExportParts, facts: CardFacts, record: dict[str, Any] | None, stop: StopSignal) -> None:
    """Write one export with its card; what the record lacks is measured before, and told to the card."""
    figures = _measure_missing(run, record, stop) or restoration_row(run.directory, facts.update)
    card = model_card(replace(facts, figures=figures), run.config, parts.usage)
    write_export(parts, card, run.directory / "export" / facts.which)


def _measure_missing(run: Run, record: dict[str, Any] | None, stop: StopSignal) -> dict[str, Any]:
    """Fill in the restoration rate of a record that was evaluated without restoring; a stop request leaves it open.

    Returns the figures that were measured, none when there was nothing to do.
    """
    if record is None or record["term_restoration"] is not None or run.config.evaluation.restore_examples == 0:
        return {}
    report = restore_terms(replace(run.evaluator, ranks=SINGLE_PROCESS), lambda: stop.requested)
    record["term_restoration"] = None if report is None else report.term_rate
    return {} if report is None else report.as_row()


def write_summary(run: Run, status: str, reason: str, code: int) -> None:
    """Write summary.json, whole."""
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
        "wall_s": run.wall_s(),
        "peak_memory_mib": memory_mib(run.device),
        "useful_token_share": state.useful_token_share if state.padded_tokens else None,
    }
    run.telemetry.row("end", state.update, status=status, stop_reason=str(reason), exit_code=int(code))
    write_whole(run.directory / SUMMARY, json.dumps(summary, indent=2) + "\n")


def closing_lines(run: Run, reason: StopReason) -> list[str]:
    """What a person wants to know at the end: why it ended, what it reached, where the model is."""
    state, directory = run.state, run.directory
    lines = [f"end    {STATUS[reason]} ({reason}) at update {state.update} after {readable(run.wall_s())}"]
    if state.before is not None and state.best is not None:
        restored = f" | term restoration {_percent(state.before)} -> {_percent(state.best)}"
        measured = {state.before["term_restoration"], state.best["term_restoration"]} != {None}
        lines.append(
            f"result loss {state.before['loss']:.4f} -> {state.best['loss']:.4f} at update {state.best['update']}"
            f"{restored if measured else ''}"
        )
    return [*lines, f"model  {directory / 'export' / 'best'} (best) and {directory / 'export' / 'last'} (last)"]


def _percent(record: dict[str, Any]) -> str:
    rate = record["term_restoration"]
    return "?" if rate is None else f"{100 * rate:.1f} %"
