"""Rounds of measurements -> medians, ratios within a round, a table, and one line of JSON."""

import importlib.metadata
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PEERS = {
    "script": "script",
    "script_mended": "mended_script",
    "tuned_trainer": "tuned_trainer",
    "ours_compiled": "ours_compiled",
}
PACKAGES = ("torch", "transformers", "accelerate", "numpy")
Rounds = Sequence[dict[str, Any]]


def document(rounds: Rounds, sides: Sequence[str]) -> dict[str, Any]:
    """Medians of every side and the ratios of ours over each peer; None where a side did not fit into memory."""
    result: dict[str, Any] = {"benchmark": "throughput"}
    for kind, value in (("ratio_over", speed), ("cpu_ratio_over", cpu_speed), ("flops_ratio_over", inverse_flops)):
        for side, name in PEERS.items():
            if side not in sides:
                continue
            pairs = [(one["ours"], one[side]) for one in rounds if one["ours"] is not None and one[side] is not None]
            ratios = [value(ours) / value(peer) for ours, peer in pairs]
            result[f"{kind}_{name}"] = round(statistics.median(ratios), 3) if ratios else None
            if kind == "ratio_over":
                result[f"{kind}_{name}_rounds"] = [round(ratio, 3) for ratio in ratios]
    result["sides"] = {side: _medians([one[side] for one in rounds]) for side in sides}
    return result


def add_utilisation(result: dict[str, Any], peak_tflops: float) -> None:
    """Give every side the share of the device's peak that its useful operations took."""
    result["peak_tflops"] = peak_tflops
    for figures in result["sides"].values():
        if figures is not None:
            figures["useful_share_of_peak"] = round(figures["useful_gflop_per_s"] / (1000 * peak_tflops), 4)


def speed(figures: dict[str, float]) -> float:
    """Examples a second by the wall clock."""
    return figures["examples"] / figures["wall_s"]


def cpu_speed(figures: dict[str, float]) -> float:
    """Examples a CPU second."""
    return figures["examples"] / figures["cpu_s"]


def inverse_flops(figures: dict[str, float]) -> float:
    """Examples an operation: more is cheaper."""
    return figures["examples"] / figures["flops"]


def _medians(rounds: Sequence[dict[str, float] | None]) -> dict[str, float] | None:
    found = [one for one in rounds if one is not None]
    if not found:
        return None

    def median(value: Any) -> float:
        return round(statistics.median(value(one) for one in found), 4)

    return {
        "examples_per_s": median(speed),
        "target_tokens_per_s": median(lambda one: one["target_tokens"] / one["wall_s"]),
        "examples_per_cpu_s": median(cpu_speed),
        "gflop_per_example": median(lambda one: one["flops"] / one["examples"] / 1e9),
        "gflop_per_s": median(lambda one: one["flops"] / one["wall_s"] / 1e9),
        "useful_gflop_per_s": median(lambda one: one["useful_flops"] / one["wall_s"] / 1e9),
        "target_tokens_per_example": median(lambda one: one["target_tokens"] / one["examples"]),
        "update_s": median(lambda one: one["wall_s"] / one["updates"]),
        "peak_mib": median(lambda one: one["peak_mib"]),
        "loading_peak_mib": median(lambda one: one["loading_peak_mib"]),
        "vocabulary_rows": found[0]["vocabulary_rows"],
    }


def table(result: dict[str, Any], sides: Sequence[str]) -> list[str]:
    """The medians for people, one line a side."""
    columns = (
        ("examples/s", "examples_per_s", 3),
        ("tokens/s", "target_tokens_per_s", 1),
        ("ex./CPU s", "examples_per_cpu_s", 3),
        ("GFLOP/ex.", "gflop_per_example", 1),
        ("update s", "update_s", 2),
        ("peak MiB", "peak_mib", 0),
        ("rows", "vocabulary_rows", 0),
    )
    lines = [f"{'':<14}" + "".join(f"{title:>12}" for title, _, _ in columns) + f"{'ours is':>10}"]
    for side in sides:
        figures = result["sides"][side]
        if figures is None:
            lines.append(f"{side:<14} does not fit into the memory that it was given")
            continue
        ratio = result.get(f"ratio_over_{PEERS.get(side, '')}")
        told = f"{ratio:>9.2f}x" if ratio else ""
        lines.append(f"{side:<14}" + "".join(f"{figures[key]:>12.{digits}f}" for _, key, digits in columns) + told)
    return lines


def environment(device: str, memory_gib: float | None) -> dict[str, Any]:
    """What it ran on and with: no name and no path of the machine."""
    import torch

    from resilient_t5.training.hardware.machine import choose_device, describe

    return {
        "device": describe(choose_device(device)),
        "processor": _processor(),
        "memory_gib_cap": memory_gib,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "threads": torch.get_num_threads(),
    }


def shown_options(argv: Sequence[str]) -> list[str]:
    """The options with file names instead of paths: a published result names no directory of the machine."""
    return [Path(part).name if "/" in part else part for part in argv]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
