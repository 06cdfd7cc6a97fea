"""Training speed of resilient_t5, the usual Seq2SeqTrainer script and a tuned Seq2SeqTrainer on the same examples.

    bin/benchmark throughput [--corpus FILE --terms FILE] [--model mt5-small] [--rounds 3] [--updates 50] [--quick]
                             [--device auto] [--memory-gib GIB] [--search] [--peak-tflops X]
                             [--store DIR] [--json FILE] [--png FILE]

The four sides are `script` (unchanged), `script_mended` (loss corrected), `tuned_trainer` and `ours`; see
benchmarks/peers/trainers.py. All sides use the same corpus, tokenizer, masked examples, model shape and initial weights
(setup.py describes tokenizer and vocabulary). In every round each side runs once in a new process, and the order rotates.
After the warm-up, the timed updates include batching, forward, backward, clipping and optimizer. Ratios are taken within a
round; the median over the rounds is reported. Peak memory is that of training, without loading.

--search first tries several micro-batch sizes for the tuned Trainer and for ours, and keeps the fastest that fits.
--peak-tflops is the peak of the device in the number format used. Each side then reports `useful_share_of_peak`: the
operations that its tokens need, without padding and recomputation, as a share of that peak.

The last line is JSON: {"ratio_over_script", "ratio_over_mended_script", "ratio_over_tuned_trainer" (examples per second),
the same as cpu_ratio_* (CPU seconds per example), "flops_ratio_*", "sides": {side: medians}, ...}.
"""

import argparse
import dataclasses
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.circumstances import write_json  # noqa: E402
from benchmarks.peers.processes import OutOfDeviceMemory, in_fresh_process  # noqa: E402
from benchmarks.peers.results import add_utilisation, document, environment, shown_options, table  # noqa: E402

SIDES = ("script", "script_mended", "tuned_trainer", "ours")
SEARCHED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "tuned_trainer": ("micro_examples", (16, 8, 4, 2)),
    "ours": ("micro_tokens", ("auto", 1024, 2048, 4096, 8192, 16384, 32768)),
}
"""Fields of Setup that --search varies, and their values."""
SEARCH_UPDATES = 10
PRESETS = ("mt5-small", "mt5-base", "mt5-large")
SHARED = Path(os.environ.get("RESILIENT_T5_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"
QUICK_ROWS = 4096


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse and check the options."""
    parser = argparse.ArgumentParser(
        prog="bin/benchmark throughput", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, default=SHARED / "zh_medical_25mb_open.txt", help="text, one document per line")
    parser.add_argument("--terms", type=Path, default=SHARED / "zh_terms.txt", help="terms, one per line")
    parser.add_argument("--store", type=Path, help="keep the prepared corpus in this directory and reuse it")
    parser.add_argument("--pieces", type=int, default=32_000, help="vocabulary size of the tokenizer trained on the corpus")
    parser.add_argument("--rows", type=int, default=250_112, help="vocabulary rows of the model; those of mT5 by default")
    parser.add_argument("--model", choices=PRESETS, default="mt5-small", help="model shape; the weights are random")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--updates", type=int, default=50, help="timed updates of ours and the tuned Trainer; with 50, on the same examples"
    )
    parser.add_argument("--script-updates", type=int, default=1, help="timed updates of the script, ten times as slow")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--memory-gib", type=float, help="limit of GPU memory for each side")
    parser.add_argument("--search", action="store_true", help="use the fastest micro-batch size of each side")
    parser.add_argument("--peak-tflops", type=float, help="peak of the device, to report its utilisation")
    parser.add_argument("--quick", action="store_true", help="a tiny model on built-in notes, to test the script")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--png", type=Path, help="draw the plot to this file")
    options = parser.parse_args(argv)
    if min(options.rounds, options.updates, options.script_updates) < 1:
        parser.error("--rounds, --updates and --script-updates must be at least 1")
    if options.peak_tflops is not None and options.peak_tflops <= 0:
        parser.error("--peak-tflops must be above 0")
    if not options.quick and not (options.corpus.is_file() and options.terms.is_file()):
        parser.error(f"{options.corpus} or {options.terms} is missing: set --corpus and --terms, or use --quick")
    return options


def prepare_sides(options: argparse.Namespace, folder: Path) -> Any:
    """Prepare the corpus, store and model directory of all sides. Runs in a new process."""
    from benchmarks.peers.setup import EXAMPLES_PER_UPDATE, Setup, make_model, make_store
    from resilient_t5.config.sections import DataConfig, ModelConfig, TokenizerConfig
    from resilient_t5.training.hardware.machine import choose_device

    if options.quick:
        data = DataConfig(train="builtin:clinical", sample_notes=200, max_source_tokens=128, max_target_tokens=64)
        tokenizer = TokenizerConfig(train_vocab_size=700)
        model = ModelConfig(preset="mt5-small", d_model=64, d_ff=128, num_layers=2, num_heads=2)
    else:
        data = DataConfig(train=str(options.corpus), terms=str(options.terms), document="line", validation_share=0.01)
        tokenizer, model = TokenizerConfig(train_vocab_size=options.pieces), ModelConfig(preset=options.model)
    store = make_store(data, tokenizer, model, options.store or folder / "store")
    make_model(store, model, QUICK_ROWS if options.quick else options.rows, folder / "model")
    cuda = choose_device(options.device).type == "cuda"
    return Setup(
        store=str(store.directory),
        model=str(folder / "model"),
        scratch=str(folder),
        data=data,
        device=options.device,
        memory_gib=options.memory_gib,
        updates=min(options.updates, len(store.train) // EXAMPLES_PER_UPDATE),
        script_updates=options.script_updates,
        warm_updates=3 if cuda else 1,
    )


def run_side(side: str, setup: Any, seed: int) -> Any:
    """Measure one side. Runs in a new process."""
    from benchmarks.peers.ours import run_ours
    from benchmarks.peers.trainers import run_script, run_tuned

    if side == "ours":
        return run_ours(setup, seed)
    return run_tuned(setup, seed) if side == "tuned_trainer" else run_script(setup, seed, side == "script_mended")


def fastest(setup: Any, folder: Path) -> dict[str, Any]:
    """Return the fields of Setup at which each searched side is fastest; sizes that do not fit are skipped."""
    chosen: dict[str, Any] = {}
    for side, (name, values) in SEARCHED.items():
        speeds: dict[Any, float] = {}
        for value in values:
            scratch, updates = str(folder / f"{side}-search-{value}"), min(SEARCH_UPDATES, setup.updates)
            own = dataclasses.replace(setup, scratch=scratch, updates=updates, **{name: value})
            figures = in_fresh_process(run_side, side, own, 42)
            if not isinstance(figures, OutOfDeviceMemory):
                speeds[value] = figures["examples"] / figures["wall_s"]
                print(f"search   {side:<14} {name} {value}: {speeds[value]:8.3f} examples/s", flush=True)
        if speeds:
            chosen[name] = max(speeds, key=lambda value: speeds[value])
    return chosen


def main(argv: Sequence[str]) -> int:
    """Print a table and one line of JSON."""
    options = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # exit normally: ends the side and removes the model directory
    rounds: list[dict[str, Any]] = []
    started_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        setup = in_fresh_process(prepare_sides, options, folder)
        print(f"prepared in {time.perf_counter() - started_s:.0f} s", flush=True)
        chosen = fastest(setup, folder) if options.search else {}
        setup = dataclasses.replace(setup, **chosen)
        for number in range(options.rounds):
            measured: dict[str, Any] = {}
            for side in SIDES[number % len(SIDES) :] + SIDES[: number % len(SIDES)]:
                own = dataclasses.replace(setup, scratch=str(folder / f"{side}-{number}"))
                figures = in_fresh_process(run_side, side, own, 42 + number)
                fits = not isinstance(figures, OutOfDeviceMemory)
                measured[side] = figures if fits else None
                shown = (
                    f"{figures['examples'] / figures['wall_s']:8.3f} examples/s" if fits else f"does not fit: {figures.message}"
                )
                print(f"round {number + 1}  {side:<14} {shown}", flush=True)
            rounds.append(measured)
    result = document(rounds, SIDES) | {
        "model": "tiny" if options.quick else options.model,
        "rounds": options.rounds,
        "timed_updates": {side: setup.script_updates if "script" in side else setup.updates for side in SIDES},
        "searched": chosen,
        "benchmark_s": round(time.perf_counter() - started_s),
        **in_fresh_process(environment, setup.device, setup.memory_gib),
        "command": " ".join(["bin/benchmark throughput", *shown_options(argv)]),
    }
    if options.peak_tflops is not None:
        add_utilisation(result, options.peak_tflops)
    print("\n".join(table(result, SIDES)))
    if options.png is not None:
        from benchmarks.peers.picture import draw_throughput

        draw_throughput(result, SIDES, options.png)
    write_json(result, options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
