"""One evaluation of a run: measure loss and restoration, ask the convergence machine, record best and last, log."""

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

from resilient_t5.restoration.scoring.measure import RestorationReport
from resilient_t5.training.convergence.machine import ConvergenceMachine, Verdict, Window
from resilient_t5.training.evaluator import Evaluation, Evaluator, evaluate, restore_terms
from resilient_t5.training.reports.artifacts import write_events, write_samples
from resilient_t5.training.signals import StopSignal
from resilient_t5.training.state import RunState
from resilient_t5.training.telemetry.console import evaluation_line, phase_line, restoration_line
from resilient_t5.training.telemetry.run_log import RunLog


@dataclass(frozen=True)
class Measured:
    """Results of one evaluation; `report` is None if terms were not restored this time."""

    evaluation: Evaluation
    evaluation_s: float
    report: RestorationReport | None
    restoration_s: float

    @property
    def term_rate(self) -> float | None:
        """Term restoration rate, if it was measured."""
        return None if self.report is None else self.report.term_rate


def run_evaluation(
    evaluator: Evaluator, convergence: ConvergenceMachine, state: RunState, log: RunLog, learning_rate: float, stop: StopSignal
) -> None:
    """Evaluate and let the convergence machine decide. If `stop` interrupts it, nothing changes."""
    measured = measure(evaluator, state.evaluations, stop)
    if measured is None:
        return
    window = window_of(measured, state, learning_rate)
    verdict = convergence.observe(window)
    record_evaluation(measured, verdict, state)
    log_evaluation(measured, window, verdict, state, log)


def measure(evaluator: Evaluator, evaluations: int, stop: StopSignal) -> Measured | None:
    """Measure the loss and, if due in this evaluation, the term restoration; None if interrupted."""
    started_s = time.monotonic()
    evaluation = evaluate(evaluator, lambda: stop.requested)
    if evaluation is None:
        return None
    evaluated_s = time.monotonic()
    report = None
    if evaluator.restoration_due(evaluations):
        report = restore_terms(evaluator, lambda: stop.requested)
        if report is None:
            return None
    return Measured(evaluation, evaluated_s - started_s, report, time.monotonic() - evaluated_s)


def window_of(measured: Measured, state: RunState, learning_rate: float) -> Window:
    """Return the convergence machine's input."""
    return Window(
        update=state.update,
        tokens=state.target_tokens,
        lr=learning_rate,
        loss=measured.evaluation.loss,
        loss_se=measured.evaluation.loss_se,
        train_loss=state.window_nll_sum / state.window_tokens if state.window_tokens else None,
        series={} if measured.term_rate is None else {"term_restoration": measured.term_rate},
    )


def record_evaluation(measured: Measured, verdict: Verdict, state: RunState) -> None:
    """Record the evaluation in the state: first, last, best, and the end of the run if it is reached."""
    record = {"update": state.update, "loss": measured.evaluation.loss, "term_restoration": measured.term_rate}
    state.before = state.before or record
    state.last = record
    if verdict.is_best:
        state.best = record
    state.evaluated_update = state.update
    state.evaluations += 1
    state.window_nll_sum, state.window_tokens = 0.0, 0
    state.ended = None if verdict.stop is None else str(verdict.stop)


def log_evaluation(measured: Measured, window: Window, verdict: Verdict, state: RunState, log: RunLog) -> None:
    """Log the evaluation, the restoration, and the verdict."""
    evaluation, best = measured.evaluation, state.best or {"loss": None, "update": None}
    statistics: dict[str, Any] = {f"convergence_{name}": value for name, value in verdict.statistics.items()}
    log.event(
        "evaluation",
        state.update,
        line=lambda row: evaluation_line(row, verdict.is_best),
        loss=evaluation.loss,
        loss_se=evaluation.loss_se,
        loss_terms=evaluation.loss_terms,
        loss_rest=evaluation.loss_rest,
        token_accuracy=evaluation.token_accuracy,
        term_token_accuracy=evaluation.term_token_accuracy,
        target_tokens=evaluation.target_tokens,
        term_tokens=evaluation.term_tokens,
        best=best["loss"],
        best_update=best["update"],
        phase=verdict.phase.name,
        why=verdict.why,
        events=list(verdict.events),
        window=dataclasses.asdict(window),
        convergence_phase=int(verdict.phase),
        convergence_earliest_stop_update=verdict.earliest_stop_update,
        **statistics,
        evaluation_s=measured.evaluation_s,
    )
    if (report := measured.report) is not None:
        values = {**report.as_row(), "restoration_s": measured.restoration_s}
        log.event("restoration", state.update, line=restoration_line, keep="restore", **values)
        write_samples(report.samples, state.update, log)
    if verdict.phase != verdict.previous:
        names = {"phase": verdict.phase.name, "former": verdict.previous.name, "why": verdict.why}
        log.event("phase", state.update, line=phase_line(verdict), keep="phase", **names)
    else:
        log.line(phase_line(verdict), keep="phase")
    if verdict.events:
        write_events(state.update, log)
