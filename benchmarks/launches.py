"""How many kernels one update launches: ours and the tuned Seq2SeqTrainer, counted without a GPU.

    bin/benchmark launches [--corpus FILE --terms FILE] [--store DIR] [--model mt5-small] [--updates 3] [--quick] [--json FILE]

A `TorchDispatchMode` counts the aten calls of an update on a CPU in bf16, without views and without calls that only
allocate. On a CUDA card each of them is about one kernel launch, or less than one: attention and norms, which are several calls
here, are one kernel there. Both sides train the same masked examples from the same weights, with the settings that each has
on a card: ours with packed rows and the passes of a card (`batch.pack: true`). No CUDA graph is captured here; on a card a
captured pass is one launch.

The last line is JSON: `ours_calls_per_update`, `tuned_trainer_calls_per_update`, `ratio` (ours over the Trainer's),
`host_syncs_per_update` (operations that a card has to be waited for: reading a value, and results whose size depends on
values), `shapes_per_epoch` (distinct shapes of our micro-batches in one epoch), `useful_token_share` (of the tokens that our
micro-batches hold), and the most frequent calls.
"""

import argparse
import dataclasses
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, MT5ForConditionalGeneration, TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.circumstances import circumstances, write_json  # noqa: E402
from benchmarks.peers.ours import open_run, run_update  # noqa: E402
from benchmarks.peers.processes import in_fresh_process  # noqa: E402
from benchmarks.peers.setup import EXAMPLES_PER_UPDATE, masked_epoch  # noqa: E402
from benchmarks.peers.trainers import Dynamic, build_trainer, quiet  # noqa: E402
from benchmarks.throughput import parse as parse_throughput  # noqa: E402
from benchmarks.throughput import prepare_sides  # noqa: E402
from resilient_t5.model.memory import MAX_MICRO_TOKENS  # noqa: E402

SYNCS = ("aten._local_scalar_dense.default", "aten.nonzero.default", "aten.equal.default", "aten.masked_select.default")
READS = ("tolist", "numpy")
"""Methods that read a tensor without an aten call on a CPU; on a card they wait for it."""
NO_KERNEL = ("aten.empty", "aten.new_empty", "aten.promote_types", "aten._unsafe_view")
SHOWN_CALLS = 12
FEW_ROWS = 32_768
"""Vocabulary rows of the model. The calls of a pass do not depend on them, and products in bf16 are slow on most CPUs."""


class ReadCounter(TorchFunctionMode):
    """Counts the calls of `READS` on floating-point tensors; ids and masks are read on the host before they are copied."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS and args[0].is_floating_point():
            self.counts[f"read.{name}"] += 1
        return func(*args, **(kwargs or {}))


class CallCounter(TorchDispatchMode):
    """Counts the aten calls made inside it; views and allocations are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()

    def __enter__(self) -> "CallCounter":
        self._read_counter = ReadCounter(self.reads)
        self._read_counter.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._read_counter.__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and not str(func).startswith(NO_KERNEL):
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def per_update(counts: Counter[str], reads: int, updates: int) -> dict[str, Any]:
    """Figures of one update from the counts of several."""
    return {
        "calls_per_update": round(sum(counts.values()) / updates),
        "host_syncs_per_update": round((reads + sum(counts[name] for name in SYNCS)) / updates, 1),
        "most_frequent": {name: round(count / updates) for name, count in counts.most_common(SHOWN_CALLS)},
    }


def count_ours(setup: Any, seed: int) -> dict[str, Any]:
    """Our update as `bin/train` does it, with a card's micro-batches; runs in a process of its own."""
    run = open_run(setup, seed)
    run_update(run)  # the first one allocates gradients and optimizer state
    with CallCounter() as counter:
        for _ in range(setup.updates):
            run_update(run)
    shapes: Counter[tuple[int, ...]] = Counter()
    useful = padded = 0
    for number in range(int(run.batches.updates_per_epoch)):
        for micro_batch in run.batches.at(number):
            shapes[micro_batch.shape] += 1
            useful, padded = useful + micro_batch.useful_tokens, padded + micro_batch.padded_tokens
    pieces_per_update = sum(shapes.values()) / max(1, int(run.batches.updates_per_epoch))
    return per_update(counter.counts, counter.reads.total(), setup.updates) | {
        "shapes_per_epoch": len(shapes),
        "useful_token_share": round(useful / padded, 4),
        "micro_batches_per_update": round(pieces_per_update, 2),
    }


def count_trainer(setup: Any, seed: int) -> dict[str, Any]:
    """The updates of the tuned Trainer after the first one; runs in a process of its own."""
    quiet()
    examples = masked_epoch(setup, seed)
    # Neighbours in length from the middle: the calls do not depend on lengths, and one long text would pad all others.
    by_length = np.argsort(np.diff(examples.source_offsets), kind="stable")
    count = (setup.updates + 1) * EXAMPLES_PER_UPDATE
    chosen = by_length[(len(by_length) // 2 + np.arange(count)) % len(by_length)]
    tokenizer = AutoTokenizer.from_pretrained(Path(setup.store) / "tokenizer")
    model = MT5ForConditionalGeneration.from_pretrained(setup.model, dtype=torch.float32, attn_implementation="sdpa")
    settings = {
        "per_device_train_batch_size": EXAMPLES_PER_UPDATE,
        "optim": "adamw_torch_fused",
        "bf16": True,
        "max_steps": setup.updates + 1,
        "train_sampling_strategy": "sequential",
        "dataloader_num_workers": 0,
        "logging_steps": 10**6,
    }
    counter, at_update = CallCounter(), list[tuple[Counter[str], int]]()

    class Snapshots(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            at_update.append((counter.counts.copy(), counter.reads.total()))

    trainer = build_trainer(
        model,
        settings,
        setup.scratch,
        torch.device("cpu"),
        train_dataset=examples.only(chosen),
        data_collator=Dynamic(DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)),
        callbacks=[Snapshots()],
    )
    with counter:
        trainer.train()
    (first, first_reads), (last, last_reads) = at_update[0], at_update[-1]
    return per_update(last - first, last_reads - first_reads, setup.updates)


def main(argv: Sequence[str]) -> int:
    """Print a table and one line of JSON."""
    parser = argparse.ArgumentParser(
        prog="bin/benchmark launches", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, help="text, a document a line")
    parser.add_argument("--terms", type=Path, help="terms, one a line")
    parser.add_argument("--store", type=Path, help="keep the prepared corpus in this directory and reuse it")
    parser.add_argument("--model", default="mt5-small", help="shape; the weights are random")
    parser.add_argument("--updates", type=int, default=3, help="counted updates of each side")
    parser.add_argument("--quick", action="store_true", help="a tiny model on built-in notes: checks the script, not the claim")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    options = parser.parse_args(argv)
    if options.updates < 1:
        parser.error("--updates must be at least 1")
    if missing := [str(path) for path in (options.corpus, options.terms) if path is not None and not path.is_file()]:
        parser.error(f"not a file: {', '.join(missing)}")
    given = [("--corpus", options.corpus), ("--terms", options.terms), ("--store", options.store)]
    shared = [str(word) for name, path in given if path is not None for word in (name, path)]
    shared += ["--model", options.model, "--updates", str(options.updates), "--device", "cpu", "--rows", str(FEW_ROWS)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        setup = in_fresh_process(prepare_sides, parse_throughput(shared + ["--quick"] * options.quick), folder)
        setup = dataclasses.replace(
            setup, scratch=str(folder / "run"), micro_tokens=MAX_MICRO_TOKENS[True], pad_multiple=8, pack=True, precision="bf16"
        )
        ours, trainer = (in_fresh_process(count, setup, 42) for count in (count_ours, count_trainer))
    figures = {
        "ours_calls_per_update": ours["calls_per_update"],
        "tuned_trainer_calls_per_update": trainer["calls_per_update"],
        "ratio": round(ours["calls_per_update"] / trainer["calls_per_update"], 3),
        "host_syncs_per_update": ours["host_syncs_per_update"],
        "tuned_trainer_host_syncs_per_update": trainer["host_syncs_per_update"],
        "micro_batches_per_update": ours["micro_batches_per_update"],
        "shapes_per_epoch": ours["shapes_per_epoch"],
        "useful_token_share": ours["useful_token_share"],
    }
    for name, value in figures.items():
        print(f"{name:<38} {value}")
    described = {
        "model": "tiny" if options.quick else options.model,
        "most_frequent": {"ours": ours["most_frequent"], "tuned_trainer": trainer["most_frequent"]},
    }
    write_json(circumstances("launches", ("torch", "transformers", "accelerate")) | figures | described, options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
