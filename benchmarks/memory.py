"""Peak memory of a micro-batch above weights and gradients: ours and the Seq2SeqTrainer, with the full vocabulary.

    bin/benchmark memory [--model mt5-small] [--rounds 5] [--micro-batches 4] [--quick] [--device auto] [--json FILE]

Both sides train the same shape in float32 with gradient checkpointing and accumulate micro-batches of 2 examples of 512 source
and 256 target tokens without padding, so that from the second one on the gradients exist already, as in any update of 2 x 8.
Each measurement is a separate process. The result is the peak resident size before the optimizer step (on a GPU the peak of
the allocator) minus the resident size before the first micro-batch and minus the gradients: activations, logits, temporary
gradients, memory cached by the C library, and code that is loaded on first use.

The last line is JSON: {"ours_mib", "trainer_mib" (medians), "ours_mib_rounds", "trainer_mib_rounds", "ratio", ...}.
"""

import argparse
import signal
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.circumstances import write_json  # noqa: E402
from benchmarks.peers.processes import in_fresh_process  # noqa: E402
from benchmarks.peers.results import environment, shown_options  # noqa: E402

PRESETS = ("mt5-small", "mt5-base", "mt5-large")
SIDES = ("ours", "trainer")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options; checked."""
    parser = argparse.ArgumentParser(
        prog="bin/benchmark memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=PRESETS, default="mt5-small", help="shape; the weights are random")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--micro-batches", type=int, default=4, help="micro-batches that are added up in a measurement")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--quick", action="store_true", help="a tiny model: checks the script, not the claim")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    options = parser.parse_args(argv)
    if options.rounds < 1 or options.micro_batches < 2:
        parser.error("--rounds must be at least 1, and --micro-batches at least 2: the gradients must be there already")
    return options


def run_side(side: str, options: argparse.Namespace, scratch: str) -> dict[str, float]:
    """MiB above weights and gradients, and CPU seconds; runs in a process of its own."""
    from benchmarks.peers.above import ours_above, trainer_above

    measure = ours_above if side == "ours" else trainer_above
    return measure(options.model, options.quick, options.device, options.micro_batches, scratch)


def main(argv: Sequence[str]) -> int:
    """Print a line a measurement and one line of JSON."""
    options = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the side ends too
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for side in SIDES[number % 2 :] + SIDES[: number % 2]:
                figures = in_fresh_process(run_side, side, options, folder)
                found[side].append(figures)
                above, cpu_s = figures["above_mib"], figures["cpu_s"]
                print(
                    f"round {number + 1}  {side:<8} {above:8.1f} MiB above weights and gradients, {cpu_s:.1f} CPU s", flush=True
                )
    median = {side: statistics.median(one["above_mib"] for one in found[side]) for side in SIDES}
    result: dict[str, Any] = {
        "benchmark": "memory",
        **{f"{side}_mib": round(median[side], 1) for side in SIDES},
        **{f"{side}_mib_rounds": [round(one["above_mib"], 1) for one in found[side]] for side in SIDES},
        "ratio": round(median["trainer"] / median["ours"], 2),
        **{f"{side}_cpu_s": round(statistics.median(one["cpu_s"] for one in found[side]), 2) for side in SIDES},
        **{key: found["ours"][0][key] for key in ("weights_mib", "vocabulary_rows", "source_tokens", "target_tokens")},
        "model": "tiny" if options.quick else options.model,
        "rounds": options.rounds,
        "micro_batches": options.micro_batches,
        **in_fresh_process(environment, options.device, None),
        "command": " ".join(["bin/benchmark memory", *shown_options(argv)]),
    }
    write_json(result, options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
