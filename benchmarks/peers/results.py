"""Turn rounds of measurements into medians, ratios within a round, a table and JSON."""

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
}
PACKAGES = ("torch", "transformers", "accelerate", "numpy")
Rounds = Sequence[dict[str, Any]]


def document(rounds: Rounds, sides: Sequence[str]) -> dict[str, Any]:
    """Return the medians of every side and our ratio to each peer; None where a side did not fit into memory."""
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
    """Add the useful operations of every side as a share of the device's peak."""
    result["peak_tflops"] = peak_tflops
    for figures in result["sides"].values():
        if figures is not None:
            figures["useful_share_of_peak"] = round(figures["useful_gflop_per_s"] / (1000 * peak_tflops), 4)


def speed(figures: dict[str, float]) -> float:
    """Examples per second of wall time."""
    return figures["examples"] / figures["wall_s"]


def cpu_speed(figures: dict[str, float]) -> float:
    """Examples per CPU second."""
    return figures["examples"] / figures["cpu_s"]


def inverse_flops(figures: dict[str, float]) -> float:
    """Examples per operation; higher is cheaper."""
    return figures["examples"] / figures["flops"]


def _medians(rounds: Sequence[dict[str, float] | None]) -> dict[str, float] | None:
    measured = [one for one in rounds if one is not None]
    if not measured:
        return None

    def median(value: Any) -> float:
        return round(statistics.median(value(one) for one in measured), 4)

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
        "vocabulary_rows": measured[0]["vocabulary_rows"],
    }


def table(result: dict[str, Any], sides: Sequence[str]) -> list[str]:
    """Format the medians as a table, one line per side."""
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
            lines.append(f"{side:<14} does not fit into the memory limit")
            continue
        ratio = result.get(f"ratio_over_{PEERS.get(side, '')}")
        ours_is = f"{ratio:>9.2f}x" if ratio else ""
        lines.append(f"{side:<14}" + "".join(f"{figures[key]:>12.{digits}f}" for _, key, digits in columns) + ours_is)
    return lines


def environment(device: str, memory_gib: float | None) -> dict[str, Any]:
    """Hardware and package versions, without host name or paths."""
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
    """Replace paths in the options by file names: a published result must not contain local directories."""
    return [Path(part).name if "/" in part else part for part in argv]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
