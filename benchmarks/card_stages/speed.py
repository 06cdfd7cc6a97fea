"""Stages that compare speeds: short texts with mT5-small and mT5-base, and texts that fill 512 tokens."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.card_stages.inputs import setup_of
from benchmarks.card_stages.limited import Outcome
from benchmarks.card_stages.session import Session
from benchmarks.card_stages.sides import measure_ours, measure_trainer
from benchmarks.peers.setup import Setup

OURS, EAGER, COMPILED, NO_GRAPHS = "ours", "trainer", "trainer_compiled", "ours_without_graphs"
TRAINERS = (EAGER, COMPILED)
SEED = 42
WARM_S = 8.0
"""Limit of our warm-up, which captures the graphs."""
FIRST_SHARE = 0.5
"""Of the time left, for a side of the first round that is not the last."""
RESERVE = 1.3
"""A further measurement starts if this multiple of its first duration is left."""
MIN_COMPILE_S = 10.0
KILL_S = 20.0
"""Between the limit of a compiled warm-up and that of its process."""


def short_texts(session: Session, stage: str, model: str) -> None:
    """Compare the speeds with short texts, 16 examples an update."""
    with session.scratch() as scratch:
        setup = setup_of(session, model, scratch)
        sides = [OURS, EAGER, NO_GRAPHS, COMPILED]
        skipped = {} if session.on_gpu else {NO_GRAPHS: "a CPU has no CUDA graphs"}
        if session.sizes.name == "cpu" and not session.named:
            skipped[COMPILED] = f"compiling takes minutes on a CPU; --only {stage} tries it"
        if session.sizes.compile_s == 0:
            skipped[COMPILED] = "left out by --compile-seconds 0"
        session.record(stage, {"skipped_sides": skipped})
        sides = [side for side in sides if side not in skipped]
        compare(session, stage, setup, sides)


def compare(session: Session, stage: str, setup: Setup, sides: list[str]) -> None:
    """Measure the sides in interleaved rounds while time is left; a side that failed is not tried again."""
    rounds: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    took_s: dict[str, float] = {}
    for number in range(session.sizes.rounds):
        rounds.append({})
        order = sides if number == 0 else sides[number % len(sides) :] + sides[: number % len(sides)]
        for side in order:
            if side in failed or (number > 0 and session.left_s < RESERVE * took_s[side]):
                continue
            started_s = time.monotonic()
            own = dataclasses.replace(setup, scratch=f"{setup.scratch}/{side}-{number}")
            share = 1.0 if number > 0 or side == order[-1] else FIRST_SHARE
            outcome = measure(session, side, own, SEED + number, share)
            took_s[side] = time.monotonic() - started_s
            if outcome.done:
                rounds[-1][side] = outcome.value | {"process_s": round(took_s[side], 1)}
                session.say(f"  {side:<20} {speed(outcome.value):9.2f} examples/s   ({took_s[side]:.0f} s)")
            else:
                failed[side] = outcome.reason
                session.say(f"  {side:<20} {outcome.reason}")
            session.record(stage, summary(rounds, sides, failed))
    if len(failed) == len(sides):
        raise RuntimeError("no side could be measured")


def measure(session: Session, side: str, setup: Setup, seed: int, share: float = 1.0) -> Outcome:
    """Measure one side in a share of the time left.

    A compiled Trainer that does not get warm in time has that as its reason.
    """
    setup = dataclasses.replace(setup, deadline_s=session.deadline_s(share))
    limit_s = share * session.left_s
    if side == OURS:
        return session.run(measure_ours, setup, seed, WARM_S if session.on_gpu else 0.0, limit_s=limit_s)
    if side == NO_GRAPHS:
        return session.run(measure_ours, dataclasses.replace(setup, graphs=False), seed, 0.0, limit_s=limit_s)
    if side == EAGER:
        return session.run(measure_trainer, setup, seed, limit_s=limit_s)
    timed_s = KILL_S + (setup.time_s or 0.0)
    limit_s = min(session.sizes.compile_s, session.left_s - timed_s)
    if limit_s < min(MIN_COMPILE_S, session.sizes.compile_s):
        return Outcome(reason=f"no time left to compile: {max(0.0, session.left_s):.0f} s")
    call = (measure_trainer, setup, seed, session.sizes.compile_backend, limit_s)
    outcome = session.run(*call, limit_s=limit_s + timed_s)
    if outcome.done and "wall_s" not in outcome.value:
        value = outcome.value
        return Outcome(reason=f"not warm after {value['warm_s']:.0f} s of compiling, {value['warm_updates']} updates")
    return outcome


def speed(figures: dict[str, Any]) -> float:
    """Examples per second."""
    return float(figures["examples"] / figures["wall_s"])


def summary(rounds: list[dict[str, Any]], sides: list[str], failed: dict[str, str]) -> dict[str, Any]:
    """Medians of every side, the ratios of a round, and the reasons of the sides without figures."""
    medians = {side: _medians([one[side] for one in rounds if side in one]) for side in sides}
    medians = {side: figures for side, figures in medians.items() if figures}
    result: dict[str, Any] = {"sides": medians, "failed_sides": failed, "rounds": [r for r in rounds if r]}
    best = max((s for s in TRAINERS if s in medians), key=lambda s: medians[s]["examples_per_s"], default=None)
    for peer in (*TRAINERS, NO_GRAPHS):
        ratios = [speed(one[OURS]) / speed(one[peer]) for one in rounds if OURS in one and peer in one]
        if ratios:
            result[f"ratio_over_{peer}"] = round(statistics.median(ratios), 3)
    if f"ratio_over_{best}" in result:
        result["best_trainer"] = best
        result["ratio_over_best_trainer"] = result[f"ratio_over_{best}"]
    return result


def _medians(measured: list[dict[str, Any]]) -> dict[str, Any]:
    if not measured:
        return {}

    def median(value: Callable[[dict[str, Any]], float], digits: int = 4) -> float:
        return round(statistics.median(value(one) for one in measured), digits)

    result = {
        "rounds": len(measured),
        "examples_per_s": median(speed),
        "update_s": median(lambda one: one["wall_s"] / one["updates"], 5),
        "tokens_per_s": median(lambda one: (one["source_tokens"] + one["target_tokens"]) / one["wall_s"], 1),
        "tokens_per_example": median(lambda one: (one["source_tokens"] + one["target_tokens"]) / one["examples"], 1),
        "cpu_share": median(lambda one: one["cpu_s"] / one["wall_s"]),
        "updates": min(one["updates"] for one in measured),
        "vocabulary_rows": measured[0]["vocabulary_rows"],
        "warm_s": median(lambda one: one["warm_s"], 2),
    }
    for key in ("peak_mib", "allocated_peak_mib"):
        if key in measured[0]:
            result[key] = median(lambda one, key=key: one[key], 1)
    return result


def long_texts(session: Session, stage: str) -> None:
    """Compare at the best batch of each side, with texts that fill the longest source; utilisation of the measured products."""
    sizes = session.sizes
    with session.scratch() as scratch:
        setup = setup_of(session, "mt5-small", scratch, long=True)
        found: dict[str, dict[str, Any]] = {}
        tried: dict[str, dict[str, Any]] = {OURS: {}, EAGER: {}}
        ours = [(OURS, "micro_tokens", tokens) for tokens in sizes.long_micro_tokens]
        trainer = [(EAGER, "micro_examples", examples) for examples in sizes.long_micro_examples]
        candidates = (*ours[:1], *trainer[:1], *ours[1:], *trainer[1:])
        for side, name, value in candidates:
            own = dataclasses.replace(setup, scratch=str(scratch / f"{side}-{value}"), **{name: value})
            outcome = measure(session, side, own, SEED, FIRST_SHARE if side == OURS else 1.0)
            tried[side][str(value)] = round(speed(outcome.value), 3) if outcome.done else outcome.reason
            if outcome.done and speed(outcome.value) > speed(found.get(side, {"examples": 0, "wall_s": 1})):
                found[side] = outcome.value
            session.say(f"  {side:<8} {name} {value}: {tried[side][str(value)]}{' examples/s' if outcome.done else ''}")
            session.record(stage, {"tried": tried, **utilisation(session, found)})
    if not found:
        raise RuntimeError("no side could be measured")


def utilisation(session: Session, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Speeds, the operations that the tokens need per second, and their share of the measured products.

    `useful_share` counts the rows of the vocabulary that the side trains. `needed_share` counts the rows that the corpus
    uses on both sides, so that it compares them.
    """
    ceilings = session.result["stages"].get("ceilings", {})
    result: dict[str, Any] = {"sides": {}}
    for side, figures in found.items():
        tflops = figures["useful_flops"] / figures["wall_s"] / 1e12
        per_example = (figures["source_tokens"] / figures["examples"], figures["target_tokens"] / figures["examples"])
        result["sides"][side] = {
            "examples_per_s": round(speed(figures), 3),
            "tokens_per_s": round((figures["source_tokens"] + figures["target_tokens"]) / figures["wall_s"], 1),
            "source_tokens_per_example": round(per_example[0], 1),
            "target_tokens_per_example": round(per_example[1], 1),
            "useful_tflops": round(tflops, 4),
            "updates": figures["updates"],
            "peak_mib": round(figures["peak_mib"], 1),
        }
        precision = found[OURS]["precision"] if OURS in found else "fp32"
        ceiling = ceilings.get(f"{precision}_tflops")
        if ceiling:
            result["sides"][side]["useful_share"] = round(tflops / ceiling, 4)
            if OURS in found:
                needed = found[OURS]["useful_flops"] / found[OURS]["examples"] * figures["examples"] / figures["wall_s"] / 1e12
                result["sides"][side]["needed_share"] = round(needed / ceiling, 4)
    if OURS in found and EAGER in found:
        result["ratio_over_trainer"] = round(speed(found[OURS]) / speed(found[EAGER]), 3)
    return result
