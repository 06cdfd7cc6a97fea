"""Compare the planned peak memory with the measured one on this CPU, by shape, precision, optimizer and checkpointing.

The measured figure is the peak of torch's allocator during an update of two micro-batches of the longest shape: weights,
optimizer state and micro-batches, plus every allocation and release that the profiler records. On a GPU,
`torch.cuda.max_memory_allocated` counts the same. The figure is reproducible to the byte. The resident set size is printed for
comparison: it includes memory that malloc retains and buffers of the matrix library, and it varies. Each case runs in its own
process.

    python benchmarks/plan.py [--json benchmarks/results/plan.json]
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MIB = 1 << 20
# shape, rows, precision, optimizer, checkpointing, examples, source, target
CASES: list[tuple[str, int, str, str, bool, int, int, int]] = [
    ("tiny", 700, "fp32", "adamw", False, 8, 96, 48),
    ("tiny", 8000, "fp32", "adamw", False, 16, 128, 64),
    ("mini", 1200, "fp32", "adamw", False, 32, 64, 32),
    ("mini", 8000, "fp32", "adafactor", False, 16, 128, 64),
    ("mini", 8000, "fp32", "adamw", True, 16, 128, 64),
    ("mini", 8000, "bf16", "adamw", False, 16, 128, 64),
    ("small", 32128, "fp32", "adamw", False, 2, 256, 128),
    ("mt5-small", 32768, "fp32", "adamw", False, 2, 512, 256),
    ("mt5-small", 32768, "fp32", "adamw", True, 2, 512, 256),
    ("mt5-small", 32768, "bf16", "adamw", False, 2, 512, 256),
    ("mt5-small", 32768, "fp32", "adafactor", False, 8, 110, 46),
    ("mini", 8000, "fp32", "adafactor_in_backward", False, 16, 128, 64),
    ("mt5-small", 32768, "fp32", "adafactor_in_backward", True, 8, 110, 46),
]


def measure(case: Sequence[Any], *, recording: bool = True) -> dict[str, float]:
    """Measure the peak bytes of one update of two micro-batches; without `recording`, only run the update."""
    import numpy as np
    import torch
    from accelerate import Accelerator
    from torch.profiler import ProfilerActivity, profile

    from resilient_t5.config.sections import ModelConfig, OptimConfig
    from resilient_t5.data.batches import MicroBatch
    from resilient_t5.model.layers import install_lean_layers
    from resilient_t5.model.load import SpecialIds, build_model
    from resilient_t5.model.optimizer import build_optimizer, named_state
    from resilient_t5.training.hardware.sharding import ShardedModel
    from resilient_t5.training.update import Updater

    preset, rows, precision, name, checkpointing, examples, source, target = case
    torch.set_num_threads(1)
    model = build_model(ModelConfig(preset=preset), vocabulary_rows=rows, special=SpecialIds(0, 1, 0), seed=1).train()
    install_lean_layers(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    accelerator = Accelerator(mixed_precision="bf16" if precision == "bf16" else "no", cpu=True)
    settings = OptimConfig(name=name, clip_norm=0.0)
    updater = Updater(accelerator, ShardedModel(model), build_optimizer(model, settings, torch.device("cpu")), settings, 1)

    def micro_batch(seed: int) -> MicroBatch:
        generator = torch.Generator().manual_seed(seed)
        source_BS = torch.randint(2, rows, (examples, source), generator=generator)
        mask_BS = torch.ones_like(source_BS)
        mask_BS[0, source // 2 :] = 0
        labels_BT = torch.randint(2, rows, (examples, target), generator=generator)
        return MicroBatch(source_BS, mask_BS, labels_BT, np.arange(examples), labels_BT.numel(), 1, 1, (2, rows - 1))

    micro_batches = [micro_batch(0)] if name == "adafactor_in_backward" else [micro_batch(0), micro_batch(1)]
    updater(micro_batches, 0, 1e-4, lambda: False)
    if not recording:
        updater(micro_batches, 1, 1e-4, lambda: False)
        return {}
    states = named_state(updater.optimizer, model)[0]
    static = sum(p.untyped_storage().nbytes() for p in model.parameters())
    static += sum(tensor.untyped_storage().nbytes() for tensor in states.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        updater(micro_batches, 1, 1e-4, lambda: False)
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    allocated = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return {"measured": static + float(allocated.max()), "static": float(static)}


def resident(case: Sequence[Any]) -> float:
    """Growth of the peak resident set size in bytes, from before the model is built to the end of an update."""

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

    measure(("tiny", 300, case[2], "adamw", False, 2, 8, 8), recording=False)
    before = status("VmRSS")
    measure(case, recording=False)
    return float(status("VmHWM") - before)


def predicted(case: Sequence[Any]) -> float:
    """Planned peak in bytes for the same update."""
    from resilient_t5.model.load import PRESETS
    from resilient_t5.model.memory import Execution, MicroBatchShape, training_peak
    from resilient_t5.model.shapes import sizes_of_shape

    preset, rows, precision, name, checkpointing, examples, source, target = case
    sizes = sizes_of_shape(PRESETS[preset], rows)
    run = Execution(precision, checkpointing, on_gpu=False)
    return training_peak(sizes, name, run, MicroBatchShape(examples, source, target)).total


def main(argv: Sequence[str]) -> int:
    """Print a table and one line of JSON; with --case N, measure one case and print its figures."""
    if argv[:1] == ["--case"]:
        case = CASES[int(argv[1])]
        figures = measure(case) if argv[2] == "allocated" else {"resident": resident(case)}
        sys.stdout.write(json.dumps(figures) + "\n")
        return 0
    rows = []
    for number, case in enumerate(CASES):
        row: dict[str, Any] = {"case": list(case), "predicted": predicted(case)}
        for kind in ("allocated", "resident"):
            command = [sys.executable, __file__, "--case", str(number), kind]
            row |= json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        row["error"] = row["predicted"] / row["measured"] - 1
        rows.append(row)
        sys.stdout.write(
            f"{' '.join(map(str, case)):55} predicted {row['predicted'] / MIB:8.1f} MiB | measured {row['measured'] / MIB:8.1f}"
            f" | {100 * row['error']:+5.1f} % | weights and states {row['static'] / MIB:8.1f}"
            f" | resident {row['resident'] / MIB:8.1f}\n"
        )
        sys.stdout.flush()
    cases = [{"case": row["case"]} | {f"{k}_mib": row[k] / MIB for k in ("predicted", "measured", "resident")} for row in rows]
    result = {
        "benchmark": "plan",
        "worst_error_share": max(abs(row["error"]) for row in rows),
        "median_error_share": statistics.median(abs(row["error"]) for row in rows),
        "cases": cases,
    }
    if argv[:1] == ["--json"]:
        Path(argv[1]).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
