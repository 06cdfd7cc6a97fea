"""The end of a run: the last save, the exports, summary.json, and closing lines that name the next command."""

import json
from dataclasses import replace
from typing import Any

from resilient_t5.errors import ExitCode, NoValidCheckpoint, ResilientError
from resilient_t5.training.build import original_tables
from resilient_t5.training.entrypoints.export import (
    CardFacts,
    ExportParts,
    export_parts,
    facts_of,
    model_card,
    restoration_row,
    write_export,
)
from resilient_t5.training.entrypoints.summary import STATUS, STATUS_OF_CODE, SUMMARY, closing_lines, wall_s, write_summary
from resilient_t5.training.evaluator import restore_terms
from resilient_t5.training.hardware.machine import memory_mib
from resilient_t5.training.hardware.process_group import SINGLE_PROCESS
from resilient_t5.training.loop import StopReason
from resilient_t5.training.reports.artifacts import write_outcome
from resilient_t5.training.run import Run
from resilient_t5.training.saver import load_model_tensors
from resilient_t5.training.signals import StopSignal


def finish(run: Run, reason: StopReason, stop: StopSignal) -> ExitCode:
    """Save, export unless the run was interrupted, and write summary.json; return the exit code.

    The writer rank does all of this. With sharded layers the other ranks contribute their rows to the save and the export.
    """
    interrupted = reason is StopReason.INTERRUPTED
    if not run.group.is_writer:
        if run.updater.sharded.is_sharded:
            run.saver.finish("signal" if interrupted else "final", stop)
            if not interrupted:
                with run.updater.sharded.unsharded(no_timeout=True):
                    pass
        return ExitCode.OK
    if interrupted:
        return _finish_interrupted(run, stop)
    run.saver.finish("final", stop)
    with run.updater.sharded.unsharded(no_timeout=True):
        export_best_and_last(run, stop)
    code = ExitCode.DIVERGED if reason is StopReason.DIVERGED else ExitCode.OK
    write_summary(run, STATUS[reason], reason, code)
    write_outcome(run.config, run.state, wall_s(run), memory_mib(run.device), run.log)
    for line in closing_lines(run, reason):
        run.log.line(line)
    return code


def _finish_interrupted(run: Run, stop: StopSignal) -> ExitCode:
    """Save, write summary.json, and name the command that continues the run."""
    name, update = stop.received.name if stop.received else "STOP", run.state.update
    run.log.line(f"stop   {name} received; saving update {update}")
    try:
        run.saver.finish("signal", stop)
    except ResilientError as error:  # the process has to exit now; the last commit is what a resume gets
        run.log.line(str(error))
    saved = run.saver.committed[0]
    state = "saved" if saved == update else f"update {update} is not saved, the newest on disk is {saved}"
    line = f"{state}; continue with: bin/train --config {run.manager.run_directory / 'config.yaml'}"
    run.log.event("signal", update, line=line, signal=name, count=stop.count, saved_update=saved)
    write_summary(run, STATUS[StopReason.INTERRUPTED], StopReason.INTERRUPTED, stop.exit_code)
    return stop.exit_code


def save_current_state(run: Run, stop: StopSignal) -> None:
    """Save the last whole update after another rank was lost; uses no collective operation."""
    if not run.group.is_writer:
        return
    try:
        if not run.updater.sharded.is_sharded:
            run.saver.finish("signal", stop)
            return
        run.saver.settle()
        saved = run.saver.committed[0]
        run.log.line(f"stop   the layer rows of the lost process are gone; the newest checkpoint on disk is update {saved}")
    except ResilientError as error:  # the last commit is what a resume gets
        run.log.line(str(error))


def finish_failed(run: Run, error: ResilientError) -> None:
    """Write summary.json for a run that an error ended."""
    if run.group.is_writer:
        run.log.line(str(error))
        write_summary(run, STATUS_OF_CODE.get(error.exit_code, "failed"), error.label, error.exit_code)


def is_finished(run: Run) -> bool:
    """Return whether this state is final, and summary.json and the exports were written for it."""
    directory = run.manager.run_directory
    try:
        summary = json.loads((directory / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    final = summary.get("status") in ("finished", "saturated") and summary.get("updates") == run.state.update
    out_of_time = run.plan.max_time_s is not None and wall_s(run) >= run.plan.max_time_s
    ended = run.state.ended is not None or run.state.update >= run.plan.total_updates or out_of_time
    has_exports = all((directory / "export" / name / "config.json").exists() for name in ("best", "last"))
    return bool(final and ended and has_exports)


def export_best_and_last(run: Run, stop: StopSignal) -> None:
    """Write export/last from the live weights and export/best from the best checkpoint; measure missing metrics."""
    state, directory = run.state, run.manager.run_directory
    parts = export_parts(run.config, run.store, run.updater.model, run.trained_ids, original_tables(run.config, run.store))
    _export(run, parts, facts_of(run.store, directory, "last", state.to_json()), state.last, stop)
    best, update, target_tokens = state.best, state.update, state.target_tokens
    if best is not None and best["update"] != state.update:
        stored = run.manager.load_best()
        if stored is None:
            raise NoValidCheckpoint(
                f"the checkpoint of the best update {best['update']} is missing",
                where=str(run.manager.directory),
                hint="export/last holds the final weights",
            )
        if stored.update != best["update"]:  # the disk refused its save, or it was damaged
            run.log.line(f"best   the checkpoint of update {best['update']} is missing; export/best is update {stored.update}")
            best = state.best = stored.state["run"]["best"]
        load_model_tensors(run.updater.model, stored.tensors["model"])
        update, target_tokens = stored.update, stored.state["run"]["target_tokens"]
    facts = facts_of(run.store, directory, "best", state.to_json())
    _export(run, parts, replace(facts, update=update, target_tokens=target_tokens, record=best), best, stop)


def _export(run: Run, parts: ExportParts, facts: CardFacts, record: dict[str, Any] | None, stop: StopSignal) -> None:
    """Write one export and its model card; measure the term restoration rate first if `record` lacks it."""
    directory = run.manager.run_directory
    figures = _measure_missing(run, record, stop) or restoration_row(directory, facts.update)
    card = model_card(replace(facts, figures=figures), run.config, parts.usage)
    write_export(parts, card, directory / "export" / facts.which)


def _measure_missing(run: Run, record: dict[str, Any] | None, stop: StopSignal) -> dict[str, Any]:
    """Fill in the term restoration rate of `record` if it is missing; a stop request leaves it open.

    Returns the measured values; empty if there was nothing to measure.
    """
    if record is None or record["term_restoration"] is not None or run.config.evaluation.restore_examples == 0:
        return {}
    report = restore_terms(replace(run.evaluator, group=SINGLE_PROCESS), lambda: stop.requested)
    record["term_restoration"] = None if report is None else report.term_rate
    return {} if report is None else report.as_row()
