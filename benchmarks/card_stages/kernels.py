"""Kernels of an update, how busy the device is, and the measured peak memory compared with the plan.

Each side runs in a new process: a warm-up, updates without the profiler for their time, then updates with it. On a CPU aten
calls are counted instead of kernels (`CallCounter` of launches.py), the busy share is that of the processor, and the plan is
compared for a small case.
"""

import dataclasses
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from benchmarks.card_stages.inputs import setup_of
from benchmarks.card_stages.session import Session
from benchmarks.card_stages.sides import at_largest_batch, spread, warm_up
from benchmarks.launches import SYNCS, CallCounter
from benchmarks.peers.limits import limit_device
from benchmarks.peers.ours import open_run, run_update
from benchmarks.peers.setup import Setup
from benchmarks.peers.trainers import train_timed, tuned_batches, tuned_collator, tuned_settings
from benchmarks.plan import measure, predicted
from resilient_t5.training.hardware.machine import MIB, choose_device
from resilient_t5.training.run import Run
from resilient_t5.training.schedule import learning_rate

TIMED, PROFILED = 10, 5
CPU_TIMED, CPU_PROFILED = 1, 1
OWN_SHARE = 0.55
"""Of the time left, for our side."""
WARM_S = 8.0
SEED = 42
SHOWN_KERNELS = 12
PLAN_CASE = ("mini", 8000, "fp32", "adamw", False, 16, 128, 64)
"""Of benchmarks/plan.py."""
COPIES = ("Memcpy", "Memset")
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cuGraphLaunch")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def kernels_and_memory(session: Session, stage: str, model: str) -> None:
    """Record both sides of a model, one after the other."""
    with session.scratch() as scratch:
        setup = setup_of(session, model, scratch)
        record: dict[str, Any] = {"sides": {}, "failed_sides": {}}
        for side, function, share in (("ours", profile_ours, OWN_SHARE), ("trainer", profile_trainer, 1.0)):
            own = dataclasses.replace(setup, scratch=str(scratch / side))
            outcome = session.run(function, own, SEED, limit_s=share * session.left_s)
            if outcome.done:
                record["sides"][side] = outcome.value
                if side == "ours" and not session.on_gpu and (plan := session.run(cpu_peaks)).done:
                    record["sides"][side] |= plan.value
                calls = outcome.value.get("kernels_per_update", outcome.value.get("calls_per_update"))
                session.say(f"  {side:<8} {calls} {'kernels' if session.on_gpu else 'calls'} an update")
            else:
                record["failed_sides"][side] = outcome.reason
                session.say(f"  {side:<8} {outcome.reason}")
            session.record(stage, record | _ratios(record["sides"]))
    if not record["sides"]:
        raise RuntimeError("no side could be measured")


def _ratios(sides: dict[str, Any]) -> dict[str, Any]:
    if set(sides) != {"ours", "trainer"}:
        return {}
    result = {}
    for key in ("kernels_per_update", "calls_per_update"):
        if key in sides["ours"] and sides["ours"][key]:
            result[f"{key}_ratio"] = round(sides["ours"][key] / sides["trainer"][key], 3)
    if "allocated_peak_mib" in sides["trainer"]:
        result["peak_ratio"] = round(sides["trainer"]["allocated_peak_mib"] / sides["ours"]["allocated_peak_mib"], 2)
    return result


class Counts:
    """Kernels of a GPU from the profiler, or aten calls of a CPU, between `start` and `stop`."""

    def __init__(self, device: torch.device):
        self.device = device
        activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
        self._profile = profile(activities=activities) if device.type == "cuda" else None
        self._calls = CallCounter()

    def start(self) -> None:
        """Start to count."""
        if self._profile is None:
            self._calls.__enter__()
            return
        torch.cuda.synchronize(self.device)
        self._profile.start()

    def stop(self, updates: int) -> dict[str, Any]:
        """Figures of one update."""
        if self._profile is None:
            self._calls.__exit__(None, None, None)
            counts = self._calls.counts
            return {
                "calls_per_update": round(sum(counts.values()) / updates),
                "waits_per_update": round(sum(counts[name] for name in SYNCS) / updates, 1),
                "most_frequent": {name: round(count / updates) for name, count in counts.most_common(SHOWN_KERNELS)},
            }
        torch.cuda.synchronize(self.device)
        self._profile.stop()
        return kernel_figures(self._profile.profiler.kineto_results.events(), updates)


def kernel_figures(events: list[Any], updates: int) -> dict[str, Any]:
    """Kernels, launches and busy time of one update from the events of the profiler."""
    on_device = [event for event in events if "CUDA" in str(event.device_type()) and not event.is_user_annotation()]
    kernels = [event for event in on_device if not event.name().startswith(COPIES)]
    host = [event.name() for event in events if "CPU" in str(event.device_type())]
    spent_ns: Counter[str] = Counter()
    for event in kernels:
        spent_ns[event.name()[:80]] += event.duration_ns()
    busy_ns = covered([(event.start_ns(), event.start_ns() + event.duration_ns()) for event in on_device])
    return {
        "kernels_per_update": round(len(kernels) / updates),
        "launches_per_update": round(sum(name.startswith(LAUNCHES) for name in host) / updates),
        "graph_launches_per_update": round(sum("GraphLaunch" in name for name in host) / updates, 1),
        "copies_per_update": round((len(on_device) - len(kernels)) / updates),
        "waits_per_update": round(sum(name in WAITS for name in host) / updates, 1),
        "busy_s_per_update": round(busy_ns / 1e9 / updates, 6),
        "longest_kernels_ms": {name: round(spent / 1e6 / updates, 3) for name, spent in spent_ns.most_common(SHOWN_KERNELS)},
    }


def covered(spans: list[tuple[int, int]]) -> int:
    """Length of the union of (start, end) spans."""
    total = end = 0
    for start, stop in sorted(spans):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total


def counts_of(device: torch.device) -> tuple[int, int]:
    """Timed and profiled updates on a device."""
    return (TIMED, PROFILED) if device.type == "cuda" else (CPU_TIMED, CPU_PROFILED)


def with_busy_share(figures: dict[str, Any], update_s: float, cpu_s: float, device: torch.device) -> dict[str, Any]:
    """Add the time of an update without profiler, and the share of it that the device is busy."""
    busy_s = figures.get("busy_s_per_update", cpu_s / max(1, torch.get_num_threads()))
    return figures | {"update_s": round(update_s, 5), "busy_share": round(busy_s / update_s, 4)}


def profile_ours(setup: Setup, seed: int) -> dict[str, Any]:
    """Our updates, and the peak of one with the longest examples compared with the plan."""
    device = choose_device(setup.device)
    limit_device(device, setup)
    timed, profiled = counts_of(device)
    run = open_run(setup, seed)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # loading does not count
    try:
        warm_up(run, setup, WARM_S if device.type == "cuda" else 0.0)
        run.prefetcher.restart(0)
        update_s, cpu_s = _timed(device, lambda: run_update(run), timed)
        counts = Counts(device)
        counts.start()
        for _ in range(profiled):
            run_update(run)
        figures = counts.stop(profiled)
        if device.type == "cuda":
            figures |= peaks(run)
    finally:
        run.prefetcher.close()
        run.log.close()
    return with_busy_share(figures, update_s, cpu_s, device)


def _timed(device: torch.device, call: Callable[[], object], count: int) -> tuple[float, float]:
    """Wall and CPU seconds of a call, on average."""
    _wait(device)
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    for _ in range(count):
        call()
    _wait(device)
    return (time.perf_counter() - wall_s) / count, (time.process_time() - cpu_s) / count


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peaks(run: Run) -> dict[str, Any]:
    """Peak of the GPU's allocator so far and after updates of the longest examples, and the planned peak, in MiB."""
    usual = torch.cuda.max_memory_allocated(run.device) / MIB
    longest = run.batches.longest()
    rate = learning_rate(run.state.update, run.plan, run.config, run.convergence, run.guard)
    for _ in range(2):
        run.updater(longest, run.state.attempted, rate, lambda: False)
    longest_mib, planned_mib = torch.cuda.max_memory_allocated(run.device) / MIB, run.fit.choice.peak.total / MIB
    return {
        "allocated_peak_mib": round(usual, 1),
        "longest_peak_mib": round(longest_mib, 1),
        "reserved_peak_mib": round(torch.cuda.max_memory_reserved(run.device) / MIB, 1),
        "planned_peak_mib": round(planned_mib, 1),
        "planned_over_measured": round(planned_mib / longest_mib, 3),
    }


def cpu_peaks() -> dict[str, Any]:
    """Peak of a small case on a CPU, as benchmarks/plan.py measures it: the longest examples of a large model take minutes."""
    planned_mib, measured_mib = predicted(PLAN_CASE) / MIB, measure(PLAN_CASE)["measured"] / MIB
    return {
        "plan_case": " ".join(map(str, PLAN_CASE)),
        "longest_peak_mib": round(measured_mib, 1),
        "planned_peak_mib": round(planned_mib, 1),
        "planned_over_measured": round(planned_mib / measured_mib, 3),
    }


class Profiling(TrainerCallback):
    """Time `timed` updates after the warm-up, then count in `profiled` further ones."""

    def __init__(self, device: torch.device, warm: int, timed: int, profiled: int):
        self.device, self.steps, self.profiled = device, (warm, warm + timed, warm + timed + profiled), profiled
        self.counts, self.timed = Counts(device), timed
        self.figures: dict[str, Any] = {}
        self.update_s: list[float] = []
        self.cpu_s: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called after every update."""
        first, second, last = self.steps
        if first <= state.global_step <= second:
            _wait(self.device)
            self.update_s.append(time.perf_counter())
            self.cpu_s.append(time.process_time())
        if state.global_step == second:
            self.counts.start()
        if state.global_step == last:
            self.figures = self.counts.stop(self.profiled)


def profile_trainer(setup: Setup, seed: int) -> dict[str, Any]:
    """The same of the tuned Trainer, eager, at its largest batch that fits."""
    return at_largest_batch(lambda own: _profiled_trainer(own, seed), setup)


def _profiled_trainer(setup: Setup, seed: int) -> dict[str, Any]:
    device = choose_device(setup.device)
    timed, profiled = counts_of(device)
    examples, batches = tuned_batches(setup, seed)
    order = spread(len(batches))
    warm = np.resize(order if device.type == "cpu" else np.concatenate([[0], order]), setup.warm_updates)
    chosen = np.concatenate([warm, np.resize(order, timed + profiled)])
    callback = Profiling(device, len(warm), timed, profiled)
    figures = train_timed(
        dataclasses.replace(setup, warm_updates=len(warm), time_s=None),
        examples.only(batches[chosen].ravel()),
        tuned_collator(setup),
        tuned_settings(setup),
        updates=timed + profiled,
        corrected=True,
        callbacks=[callback],
    )
    update_s = statistics.mean(np.diff(callback.update_s))
    cpu_s = statistics.mean(np.diff(callback.cpu_s))
    peak = {key: round(figures[key], 1) for key in ("allocated_peak_mib",) if key in figures}
    return with_busy_share(callback.figures | peak, float(update_s), float(cpu_s), device)
