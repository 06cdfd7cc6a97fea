"""The plan of a run in updates, the time left, and the learning rate as a pure function of the update number."""

import math
from dataclasses import dataclass

from resilient_t5.config.schema import CheckpointConfig, Config, EvaluationConfig, OptimConfig, ScheduleConfig
from resilient_t5.config.sections import Point, seconds, updates_at
from resilient_t5.training.convergence.machine import ConvergenceMachine, cooldown_factor
from resilient_t5.training.spike_guard import SpikeGuard
from resilient_t5.training.telemetry.timing import TimeLeft, Timing


@dataclass(frozen=True)
class Plan:
    """Every point of the run, in updates; `tokens_per_update` counts target tokens."""

    total_updates: int
    warmup_updates: int
    evaluate_every: int
    updates_per_epoch: float
    tokens_per_update: float
    max_time_s: float | None = None

    def to_updates(self, point: Point) -> int:
        """Convert `point` to an update number."""
        return updates_at(point, self.updates_per_epoch, self.tokens_per_update)


def make_plan(
    schedule: ScheduleConfig, evaluation: EvaluationConfig, updates_per_epoch: float, tokens_per_update: float
) -> Plan:
    """Convert the points of the configuration to updates."""
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


def time_left(plan: Plan, update: int, timing: Timing, settings: CheckpointConfig) -> TimeLeft:
    """Project the time from `update` to the planned end, including evaluations and saves."""
    updates = plan.total_updates - update
    save_every_s = None if settings.every_minutes is None else settings.every_minutes * 60
    return timing.left(updates, math.ceil(updates / plan.evaluate_every), save_every_s)


def learning_rate(update: int, plan: Plan, config: Config, convergence: ConvergenceMachine, guard: SpikeGuard) -> float:
    """Learning rate of the update after `update` applied ones: the schedule times the cooldown and back-off factors."""
    cooldown = cooldown_factor(update, convergence.cooldown_start, convergence.cooldown_updates)
    return cooldown * guard.factor_at(update) * lr_at(update, plan, config.schedule, config.optim)


def lr_at(update: int, plan: Plan, schedule: ScheduleConfig, optim: OptimConfig) -> float:
    """Scheduled learning rate of update number `update`, counted from 0.

    1. Linear warm-up to the peak over `warmup_updates`.
    2. Then the shape: `constant`; `inverse_sqrt` decays with 1/sqrt of the update; `linear` and `cosine` reach
       `final_share` of the peak at `total_updates`.
    """
    if update < plan.warmup_updates:
        return optim.lr * (update + 1) / plan.warmup_updates
    final_share, span = schedule.final_share, max(1, plan.total_updates - plan.warmup_updates)
    remaining_share = min(1.0, max(0.0, (plan.total_updates - update) / span))
    match schedule.shape:
        case "constant":
            factor = 1.0
        case "inverse_sqrt":
            factor = math.sqrt(max(1, plan.warmup_updates) / (update + 1))
        case "linear":
            factor = final_share + (1.0 - final_share) * remaining_share
        case "cosine":
            done_share = 1.0 - remaining_share
            factor = final_share + (1.0 - final_share) * 0.5 * (1.0 + math.cos(math.pi * done_share))
    return optim.lr * factor
