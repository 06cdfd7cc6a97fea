"""Stopping rules of other projects, each as defined by its source, and plain anchored patience.

A rule gets one loss per window and returns after how many windows it stops. Every rule keeps the lowest loss up to its
stop, so the comparison is about when to stop and not about what to save. Where a rule has such a parameter, it uses
patience 5, threshold 0.001 and the first judgement at window 12, so that rules are compared and not their settings.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from resilient_t5.training.convergence.replay import Losses, lowest

PATIENCE, THRESHOLD, FIRST_JUDGED = 5, 0.001, 12
Training = Sequence[float | None]
"""The latest training loss at each window; None before the first one."""


@dataclass(frozen=True)
class Outcome:
    """The number of `windows` trained, and the index of the `kept` one."""

    windows: int
    kept: int


Rule = Callable[[Losses, Training], Outcome]


def never(losses: Losses, training: Training) -> Outcome:
    """Train to the end of the recording."""
    return Outcome(len(losses), lowest(losses, len(losses)))


def hugging_face(losses: Losses, training: Training) -> Outcome:
    """transformers `EarlyStoppingCallback`: any gain moves the best, only a gain above the threshold resets the counter."""
    best, waited = math.nan, 0
    for index, loss in enumerate(losses):
        gained = math.isnan(best) or (loss < best and best - loss > THRESHOLD)
        waited = 0 if gained else waited + 1
        best = loss if math.isnan(best) or loss < best else best
        if waited >= PATIENCE:
            return Outcome(index + 1, lowest(losses, index + 1))
    return never(losses, training)


def keras(losses: Losses, training: Training) -> Outcome:
    """Keras `EarlyStopping(min_delta, patience, start_from_epoch)`: losses before the start are ignored."""
    best, waited = math.inf, 0
    for index in range(FIRST_JUDGED - 1, len(losses)):
        waited += 1
        if losses[index] + THRESHOLD < best:
            best, waited = losses[index], 0
        if waited >= PATIENCE:
            return Outcome(index + 1, lowest(losses, index + 1))
    return never(losses, training)


def lightning(losses: Losses, training: Training) -> Outcome:
    """Lightning `EarlyStopping(min_delta, patience, check_finite)`: no delayed start; stops at a non-finite loss."""
    best, waited = math.inf, 0
    for index, loss in enumerate(losses):
        if not math.isfinite(loss):
            return Outcome(index + 1, lowest(losses, index + 1))
        waited = 0 if loss + THRESHOLD < best else waited + 1
        best = loss if waited == 0 else best
        if waited >= PATIENCE:
            return Outcome(index + 1, lowest(losses, index + 1))
    return never(losses, training)


def prechelt_gl(alpha: float) -> Rule:
    """Prechelt 1998, GL: the loss is more than `alpha` percent above the lowest so far."""

    def rule(losses: Losses, training: Training) -> Outcome:
        best = math.inf
        for index, loss in enumerate(losses):
            best = min(best, loss) if math.isfinite(loss) else best
            if index + 1 >= FIRST_JUDGED and best > 0 and 100 * (loss / best - 1) > alpha:
                return Outcome(index + 1, lowest(losses, index + 1))
        return never(losses, training)

    return rule


def prechelt_up(strips: int, strip: int = 5) -> Rule:
    """Prechelt 1998, UP: the loss rose in `strips` successive strips of `strip` windows."""

    def rule(losses: Losses, training: Training) -> Outcome:
        rises = 0
        for end in range(2 * strip - 1, len(losses), strip):
            rises = rises + 1 if losses[end] > losses[end - strip] else 0
            if rises >= strips and end + 1 >= FIRST_JUDGED:
                return Outcome(end + 1, lowest(losses, end + 1))
        return never(losses, training)

    return rule


def prechelt_pq(alpha: float, strip: int = 5) -> Rule:
    """Prechelt 1998, PQ: generalisation loss over training progress exceeds `alpha`; without training losses, never."""

    def rule(losses: Losses, training: Training) -> Outcome:
        best = math.inf
        for index, loss in enumerate(losses):
            best = min(best, loss) if math.isfinite(loss) else best
            recent = [value for value in training[max(0, index + 1 - strip) : index + 1] if value is not None]
            if index + 1 < max(FIRST_JUDGED, strip) or len(recent) < strip or min(recent) <= 0 or best <= 0:
                continue
            progress = 1000 * (statistics.fmean(recent) / min(recent) - 1)
            if 100 * (loss / best - 1) > alpha * progress and loss > best:
                return Outcome(index + 1, lowest(losses, index + 1))
        return never(losses, training)

    return rule


def ray_plateau(losses: Losses, training: Training) -> Outcome:
    """Ray `TrialPlateauStopper(std=0.01, num_results=4)` with its grace period at the first judged window."""
    for index in range(max(FIRST_JUDGED, 4) - 1, len(losses)):
        if statistics.pstdev(losses[index - 3 : index + 1]) < 0.01:
            return Outcome(index + 1, lowest(losses, index + 1))
    return never(losses, training)


PEER_RULES: dict[str, Rule] = {
    "huggingface": hugging_face,
    "keras": keras,
    "lightning": lightning,
    "prechelt-gl5": prechelt_gl(5),
    "prechelt-up2": prechelt_up(2),
    "prechelt-pq0.75": prechelt_pq(0.75),
    "ray-plateau": ray_plateau,
    "never": never,
}


def anchored_patience(losses: Losses, patience: int, *, first: int, gain: float = THRESHOLD, relative: float = 0.0) -> Outcome:
    """The decision of the convergence machine without its phases and statistics, for sweeps.

    Args:
        losses: one per window.
        patience: judged windows without counted gain.
        first: number of the first judged window, which sets the anchor.
        gain: counted gain, absolute.
        relative: counted gain as a share of the anchor.
    """
    anchor, waited = math.nan, 0
    for index in range(first - 1, len(losses)):
        loss = losses[index]
        if math.isfinite(loss) and (math.isnan(anchor) or anchor - loss > max(gain, relative * abs(anchor))):
            anchor, waited = loss, 0
            continue
        waited += 1
        if waited >= patience:
            return Outcome(index + 1, lowest(losses, index + 1))
    return Outcome(len(losses), lowest(losses, len(losses)))
