"""Stages that play a smaller card: a limit of its memory, and a limit of its memory and its multiprocessors."""

import dataclasses
from typing import Any

from benchmarks.card_stages.inputs import setup_of
from benchmarks.card_stages.kernels import peaks
from benchmarks.card_stages.session import Session
from benchmarks.card_stages.sides import measure_ours, measure_trainer, tokens, warm_up
from benchmarks.card_stages.speed import EAGER, NO_GRAPHS, OURS, SEED, WARM_S, speed, summary
from benchmarks.peers.limits import WAYS, judge_probe, limit_device, probe_speeds
from benchmarks.peers.ours import open_run, run_update
from benchmarks.peers.processes import Meter
from benchmarks.peers.setup import Setup
from resilient_t5.training.hardware.machine import choose_device

PROBE_S = 45.0
WARM_SHARE = 0.3
"""Share of the time left for our warm-up, at most."""


class NeedsGpu(RuntimeError):
    """The stage limits a GPU, and the device is a CPU."""


def memory_cap(session: Session, stage: str) -> None:
    """Train mT5-base with float32 AdamW and without recomputation in a part of the memory; plan against allocator."""
    _require_gpu(session)
    with session.scratch() as scratch:
        base = setup_of(session, "mt5-base", scratch)
        limited = dataclasses.replace(base, memory_gib=session.memory_gib, checkpointing=False, updates=10)
        session.record(stage, {"memory_gib": session.memory_gib, "optimizer": "adamw, float32", "checkpointing": False})
        for side, function in (("ours", train_capped), ("trainer", measure_trainer)):
            setup = dataclasses.replace(limited, scratch=str(scratch / side))
            outcome = session.run(function, setup, SEED)
            figures = capped_figures(outcome.value) if outcome.done else {"fits": False, "reason": outcome.reason}
            session.say(f"  {side:<8} {'trains' if outcome.done else outcome.reason}")
            session.record(stage, {side: figures})


def train_capped(setup: Setup, seed: int) -> dict[str, Any]:
    """Train a few updates and two of the longest examples; return the measured peak and the planned one."""
    device = choose_device(setup.device)
    limit_device(device, setup)
    meter, run = Meter(device), open_run(setup, seed)
    try:
        warm_up(run, setup, 0.0)
        meter.forget_peak()
        meter.start()
        done = [run_update(run) for _ in range(setup.updates)]
        figures = meter.stop() | tokens(done) | {"updates": len(done)}
        figures |= peaks(run) | {"micro_tokens": run.fit.choice.micro_tokens, "checkpointing": run.fit.choice.checkpointing}
    finally:
        run.prefetcher.close()
        run.log.close()
    return figures | {"vocabulary_rows": run.updater.model.config.vocab_size}


def capped_figures(figures: dict[str, Any]) -> dict[str, Any]:
    """What counts with a limit of the memory."""
    result = {"fits": True, "examples_per_s": round(speed(figures), 3), "updates": figures["updates"]}
    kept = ("allocated_peak_mib", "longest_peak_mib", "planned_peak_mib", "planned_over_measured", "peak_mib", "micro_tokens")
    return result | {key: figures[key] for key in (*kept, "micro_examples", "vocabulary_rows") if key in figures}


def small_card(session: Session, stage: str) -> None:
    """Compare the sides on a part of the multiprocessors and of the memory; the limit is probed first."""
    _require_gpu(session)
    probes = probe_limits(session)
    probe = probes[-1]
    session.record(stage, {"multiprocessors": session.multiprocessors, "memory_gib": session.memory_gib, "probes": probes})
    if not (probe["holds"].get("forward") and probe["holds"].get("backward")):
        raise RuntimeError("no limit of the multiprocessors holds with this torch and driver; `probes` has the details")
    sides, failed, measured = [OURS if probe["holds"].get("graph") else NO_GRAPHS, EAGER], dict[str, str](), dict[str, Any]()
    with session.scratch() as scratch:
        setup = setup_of(session, "mt5-small", scratch)
        limits = {
            "multiprocessors": session.multiprocessors,
            "memory_gib": session.memory_gib,
            "limited_by": probe["way"],
            "graphs": "auto" if probe["holds"].get("graph") else False,
        }
        setup = dataclasses.replace(setup, **limits)
        for side in sides:
            own = dataclasses.replace(setup, scratch=str(scratch / side), deadline_s=session.deadline_s())
            warm_s = min(WARM_S, WARM_SHARE * session.left_s)
            call = (measure_trainer, own, SEED) if side == EAGER else (measure_ours, own, SEED, warm_s)
            outcome = session.run(*call)
            if outcome.done:
                measured[OURS if side == NO_GRAPHS else side] = outcome.value
            else:
                failed[side] = outcome.reason
            session.say(f"  {side:<20} {f'{speed(outcome.value):9.2f} examples/s' if outcome.done else outcome.reason}")
            session.record(stage, {"graphs": limits["graphs"]} | summary([measured], [OURS, EAGER], failed))


def probe_limits(session: Session) -> list[dict[str, Any]]:
    """Try the ways to limit the multiprocessors until one holds for forward and backward products; it is the last one."""
    free = session.run(probe_speeds, session.device, None, "", limit_s=PROBE_S)
    if not free.done:
        raise RuntimeError(f"the card without a limit could not be probed: {free.reason}")
    probes = []
    for way in WAYS:
        outcome = session.run(probe_speeds, session.device, session.multiprocessors, way, limit_s=PROBE_S)
        if outcome.done:
            probes.append(judge_probe(free.value, outcome.value, session.multiprocessors, way))
        else:
            probes.append({"way": way, "errors": {"process": outcome.reason}, "holds": {}})
        if probes[-1]["holds"].get("forward") and probes[-1]["holds"].get("backward"):
            break
    return probes


def _require_gpu(session: Session) -> None:
    if not session.on_gpu:
        raise NeedsGpu("needs a GPU: it limits the memory or the multiprocessors of one")
