"""How fast the same masked examples train: our run beside the usual Seq2SeqTrainer script and a tuned Seq2SeqTrainer.

    bin/benchmark throughput [--corpus FILE --terms FILE] [--model mt5-small] [--rounds 3] [--updates 50] [--quick]
                             [--device auto] [--memory-gib GIB] [--search] [--compile] [--peak-tflops X]
                             [--store DIR] [--json FILE] [--png FILE]

Four sides (benchmarks/peers/trainers.py says what each does): `script` as it is, `script_mended`, `tuned_trainer`, `ours`.
Same corpus, tokenizer, masked examples, model shape and first weights (setup.py says how tokenizer and vocabulary go
together). In every round each side runs once, in a process of its own, the order turning; a warm-up update, then the
timed ones, with everything that an update costs: batches, forward, backward, clipping, optimizer. A ratio is taken within
a round, and the median of the rounds counts. Peak memory is that of training, without that of loading.

--search lets the tuned Trainer and ours first try micro-batches of several sizes and keep the fastest that fits; the script
is what it is. --compile adds ours with compiled layers as a side. --peak-tflops is what the device can do in its number
format: each side then has `useful_share_of_peak`, the operations that its tokens need, without padding and recomputation.

The last line is JSON: {"ratio_over_script", "ratio_over_mended_script", "ratio_over_tuned_trainer" (examples a second),
the same as cpu_ratio_* (CPU seconds an example), "flops_ratio_*", "sides": {side: medians}, ...}.
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
"""What --search tries: a field of Setup, and its values."""
SEARCH_UPDATES = 10
PRESETS = ("mt5-small", "mt5-base", "mt5-large")
SHARED = Path(os.environ.get("RESILIENT_T5_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"
QUICK_ROWS = 4096


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options; checked."""
    parser = argparse.ArgumentParser(
        prog="bin/benchmark throughput", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, default=SHARED / "zh_medical_25mb_open.txt", help="text, a document a line")
    parser.add_argument("--terms", type=Path, default=SHARED / "zh_terms.txt", help="terms, one a line")
    parser.add_argument("--store", type=Path, help="keep the prepared corpus here, and use it again")
    parser.add_argument("--pieces", type=int, default=32_000, help="pieces of the tokenizer trained on the corpus")
    parser.add_argument("--model", choices=PRESETS, default="mt5-small", help="shape; the weights are random")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--updates", type=int, default=50, help="timed updates of ours and the tuned Trainer; 50 are the same examples"
    )
    parser.add_argument("--script-updates", type=int, default=1, help="timed updates of the script, ten times as dear")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--memory-gib", type=float, help="let each side have no more of the GPU than this")
    parser.add_argument("--search", action="store_true", help="each side at the micro-batch that is fastest for it")
    parser.add_argument("--compile", action="store_true", help="one more side: ours with compiled layers")
    parser.add_argument("--peak-tflops", type=float, help="of the device, for the share of it that is used")
    parser.add_argument("--quick", action="store_true", help="a tiny model on built-in notes: checks the script, not the claim")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    parser.add_argument("--png", type=Path, help="draw the picture here")
    options = parser.parse_args(argv)
    if min(options.rounds, options.updates, options.script_updates) < 1:
        parser.error("--rounds, --updates and --script-updates must be at least 1")
    if options.peak_tflops is not None and options.peak_tflops <= 0:
        parser.error("--peak-tflops must be above 0")
    if not options.quick and not (options.corpus.is_file() and options.terms.is_file()):
        parser.error(f"{options.corpus} or {options.terms} is not there: name files with --corpus and --terms, or use --quick")
    return options


def prepare_sides(options: argparse.Namespace, folder: Path) -> Any:
    """Corpus, store and model directory of all sides; runs in a process of its own."""
    from benchmarks.peers.setup import EXAMPLES_PER_UPDATE, MT5_ROWS, Setup, make_model, make_store
    from resilient_t5.config.data import DataConfig, ModelConfig, TokenizerConfig
    from resilient_t5.training.hardware.machine import choose_device

    if options.quick:
        data = DataConfig(train="builtin:clinical", sample_notes=200, max_source_tokens=128, max_target_tokens=64)
        tokenizer = TokenizerConfig(train_vocab_size=700)
        model = ModelConfig(preset="mt5-small", d_model=64, d_ff=128, num_layers=2, num_heads=2)
    else:
        data = DataConfig(train=str(options.corpus), terms=str(options.terms), document="line", validation_share=0.01)
        tokenizer, model = TokenizerConfig(train_vocab_size=options.pieces), ModelConfig(preset=options.model)
    store = make_store(data, tokenizer, model, options.store or folder / "store")
    make_model(store, model, QUICK_ROWS if options.quick else MT5_ROWS, folder / "model")
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
    """Figures of one side; runs in a process of its own."""
    from benchmarks.peers.ours import run_ours
    from benchmarks.peers.trainers import run_script, run_tuned

    if side.startswith("ours"):
        return run_ours(dataclasses.replace(setup, compiled=side == "ours_compiled"), seed)
    return run_tuned(setup, seed) if side == "tuned_trainer" else run_script(setup, seed, side == "script_mended")


def fastest(setup: Any, folder: Path) -> dict[str, Any]:
    """The fields of Setup at which each side that is searched is fastest; a size that does not fit is passed over."""
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the side ends too, and the model directory goes
    sides = (*SIDES, "ours_compiled") if options.compile else SIDES
    rounds: list[dict[str, Any]] = []
    begun_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        setup = in_fresh_process(prepare_sides, options, folder)
        print(f"prepared in {time.perf_counter() - begun_s:.0f} s", flush=True)
        chosen = fastest(setup, folder) if options.search else {}
        setup = dataclasses.replace(setup, **chosen)
        for number in range(options.rounds):
            found: dict[str, Any] = {}
            for side in sides[number % len(sides) :] + sides[: number % len(sides)]:
                own = dataclasses.replace(setup, scratch=str(folder / f"{side}-{number}"))
                figures = in_fresh_process(run_side, side, own, 42 + number)
                fits = not isinstance(figures, OutOfDeviceMemory)
                found[side] = figures if fits else None
                shown = (
                    f"{figures['examples'] / figures['wall_s']:8.3f} examples/s" if fits else f"does not fit: {figures.message}"
                )
                print(f"round {number + 1}  {side:<14} {shown}", flush=True)
            rounds.append(found)
    result = document(rounds, sides) | {
        "model": "tiny" if options.quick else options.model,
        "rounds": options.rounds,
        "timed_updates": {side: setup.script_updates if "script" in side else setup.updates for side in sides},
        "searched": chosen,
        "benchmark_s": round(time.perf_counter() - begun_s),
        **in_fresh_process(environment, setup.device, setup.memory_gib),
        "command": " ".join(["bin/benchmark throughput", *shown_options(argv)]),
    }
    if options.peak_tflops is not None:
        add_utilisation(result, options.peak_tflops)
    print("\n".join(table(result, sides)))
    if options.png is not None:
        from benchmarks.peers.picture import draw_throughput

        draw_throughput(result, sides, options.png)
    write_json(result, options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
