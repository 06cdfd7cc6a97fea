"""The plan of a run in updates, and the learning rate as a pure function of the update number."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from resilient_t5.config.schema import EvaluationConfig, OptimConfig, ScheduleConfig
from resilient_t5.config.values import Point, seconds, updates_at


@dataclass(frozen=True)
class Plan:
    """Every point of the run, in updates.

    `updates_per_epoch` and `tokens_per_update` (target tokens) are what points were translated with.
    """

    total_updates: int
    warmup_updates: int
    evaluate_every: int
    updates_per_epoch: float
    tokens_per_update: float
    max_time_s: float | None = None

    def to_updates(self, point: Point) -> int:
        """The update at which `point` lies in this run."""
        return updates_at(point, self.updates_per_epoch, self.tokens_per_update)


def make_plan(
    schedule: ScheduleConfig, evaluation: EvaluationConfig, updates_per_epoch: float, tokens_per_update: float
) -> Plan:
    """Translate the points of the configuration into updates."""
    total = schedule.max_updates or max(1, math.ceil(schedule.epochs * updates_per_epoch))
    if isinstance(schedule.warmup, str):
        warmup = updates_at(schedule.warmup, updates_per_epoch, tokens_per_update)
    else:
        warmup = round(schedule.warmup * total) if schedule.warmup < 1 else round(schedule.warmup)
    every = updates_at(evaluation.every, updates_per_epoch, tokens_per_update)
    return Plan(
        total_updates=total,
        warmup_updates=min(warmup, total),
        evaluate_every=max(1, every),
        updates_per_epoch=updates_per_epoch,
        tokens_per_update=tokens_per_update,
        max_time_s=None if schedule.max_time is None else seconds(schedule.max_time),
    )


def lr_at(update: int, plan: Plan, schedule: ScheduleConfig, optim: OptimConfig) -> float:
    """Learning rate of update number `update`, counted from 0.

    1. linear warm-up to the peak over `warmup_updates`;
    2. then the shape: constant; inverse_sqrt falls with 1/sqrt of the update; linear and cosine reach
       `final_share` of the peak at `total_updates`.
    """
    if update < plan.warmup_updates:
        return optim.lr * (update + 1) / plan.warmup_updates
    return optim.lr * SHAPES[schedule.shape](update, plan, schedule.final_share)


def _remaining_share(update: int, plan: Plan) -> float:
    span = max(1, plan.total_updates - plan.warmup_updates)
    return min(1.0, max(0.0, (plan.total_updates - update) / span))


def _constant(update: int, plan: Plan, final_share: float) -> float:
    return 1.0


def _linear(update: int, plan: Plan, final_share: float) -> float:
    return final_share + (1.0 - final_share) * _remaining_share(update, plan)


def _cosine(update: int, plan: Plan, final_share: float) -> float:
    done_share = 1.0 - _remaining_share(update, plan)
    return final_share + (1.0 - final_share) * 0.5 * (1.0 + math.cos(math.pi * done_share))


def _inverse_sqrt(update: int, plan: Plan, final_share: float) -> float:
    return math.sqrt(max(1, plan.warmup_updates) / (update + 1)) if update >= plan.warmup_updates else 1.0


SHAPES: dict[str, Callable[[int, Plan, float], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "inverse_sqrt": _inverse_sqrt,
}
