"""The rows and lines about updates: what was trained since the last row, and what the guard refused."""

from resilient_t5.errors import Diverged
from resilient_t5.training.host import memory_mib
from resilient_t5.training.progress import train_line
from resilient_t5.training.run import Run
from resilient_t5.training.state import SinceLog, UpdateResult


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
        nonfinite_total=run.guard.total,
        tokens_per_s=since.useful_tokens / (update_s + wait_s),
        update_s=update_s / since.updates,
        data_wait_share=wait_s / (update_s + wait_s),
        memory_mib=memory_mib(run.device),
        eta_s=left.total_s,
    )
    state.since_log = SinceLog()
    run.display.line(train_line(row, run.plan.total_updates, left), keep="numbers")


def report_refused(run: Run, result: UpdateResult) -> None:
    """Record an update that the guard kept from the weights, with its raw values; end a run that is broken.

    Raises:
        Diverged: too many updates in a row or in a window were refused.
    """
    loss, update = result.nll_sum / result.target_tokens, run.state.update
    diagnosis = run.guard.observe(run.state.attempted)
    run.telemetry.row("guard", update, attempted=run.state.attempted, loss=loss, gradient_norm=result.gradient_norm)
    run.display.line(
        f"guard  update {update + 1} refused: loss {loss}, gradient norm {result.gradient_norm}; weights untouched"
    )
    if diagnosis is not None:
        raise Diverged(
            diagnosis,
            where=f"update {update}",
            mend="Lower optim.lr, lengthen schedule.warmup, or set hardware.precision to fp32 or bf16",
        )
