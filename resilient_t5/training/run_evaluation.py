"""What happens at an evaluation: loss, restoration, the verdict of the convergence machine, best and last."""

import dataclasses
import time

from resilient_t5.restoration.scoring.score_report import RestorationReport
from resilient_t5.training.convergence.machine import Verdict, Window
from resilient_t5.training.evaluator import Evaluation, evaluate, restore_terms
from resilient_t5.training.reports.artifacts import write_events, write_samples
from resilient_t5.training.run import Run
from resilient_t5.training.signals import StopSignal
from resilient_t5.training.telemetry.console import evaluation_line, phase_line, restoration_line


def run_evaluation(run: Run, stop: StopSignal) -> None:
    """Evaluate and let the convergence machine decide; nothing has changed when a signal cuts it short."""
    begun_s = time.monotonic()
    evaluation = evaluate(run.evaluator, lambda: stop.requested)
    if evaluation is None:
        return
    restored_from_s = time.monotonic()
    report = None
    if restoration_due(run):
        report = restore_terms(run.evaluator, lambda: stop.requested)
        if report is None:
            return
    ended_s = time.monotonic()
    window = window_of(run, evaluation, report)
    verdict = run.convergence.observe(window)
    record_evaluation(run, evaluation, report, verdict)
    if run.ranks.is_writer:
        log_evaluation(run, evaluation, window, verdict, restored_from_s - begun_s)
        if report is not None:
            log_restoration(run, report, ended_s - restored_from_s)
        log_verdict(run, verdict)
    run.timing.add("evaluation", time.monotonic() - begun_s)


def log_verdict(run: Run, verdict: Verdict) -> None:
    """The phase row, where the phase changed, the line of the phase, and the events."""
    if verdict.phase != verdict.previous:
        names = {"phase": verdict.phase.name, "former": verdict.previous.name}
        run.telemetry.row("phase", run.state.update, **names, why=verdict.why)
    run.display.line(phase_line(verdict), keep="phase")
    if verdict.events:
        write_events(run)


def restoration_due(run: Run) -> bool:
    """Whether this evaluation also restores: the first of the run, and then every `restore_every`-th."""
    settings = run.config.evaluation
    if settings.restore_examples == 0:
        return False
    return run.state.evaluations == 0 or (settings.restore_every > 0 and run.state.evaluations % settings.restore_every == 0)


def window_of(run: Run, evaluation: Evaluation, report: RestorationReport | None) -> Window:
    """What the convergence machine sees of this evaluation."""
    state = run.state
    rate = None if report is None else report.term_rate
    return Window(
        update=state.update,
        tokens=state.target_tokens,
        lr=run.learning_rate(),
        loss=evaluation.loss,
        loss_se=evaluation.loss_se,
        train_loss=state.window_nll_sum / state.window_tokens if state.window_tokens else None,
        series={} if rate is None else {"term_restoration": rate},
    )


def record_evaluation(run: Run, evaluation: Evaluation, report: RestorationReport | None, verdict: Verdict) -> None:
    """Write the evaluation into the state: last, best, the first of all, and the end if there is one."""
    state = run.state
    rate = None if report is None else report.term_rate
    record = {"update": state.update, "loss": evaluation.loss, "term_restoration": rate}
    state.before = state.before or record
    state.last = record
    if verdict.is_best:
        state.best = record
    state.evaluated_update = state.update
    state.evaluations += 1
    state.window_nll_sum, state.window_tokens = 0.0, 0
    state.ended = None if verdict.stop is None else str(verdict.stop)


def log_evaluation(run: Run, evaluation: Evaluation, window: Window, verdict: Verdict, duration_s: float) -> None:
    """The evaluation row, with all that the convergence machine saw so that it can be replayed, and its line."""
    best = run.state.best or {"loss": None, "update": None}
    row = run.telemetry.row(
        "evaluation",
        run.state.update,
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
        **{f"convergence_{name}": value for name, value in verdict.statistics.items()},
        evaluation_s=duration_s,
    )
    run.display.line(evaluation_line(row, verdict.is_best))


def log_restoration(run: Run, report: RestorationReport, duration_s: float) -> None:
    """The restoration row, its line, and the probe examples."""
    row = run.telemetry.row("restoration", run.state.update, **report.as_row(), restoration_s=duration_s)
    run.display.line(restoration_line(row), keep="restore")
    write_samples(run, report)
