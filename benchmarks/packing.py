"""Useful tokens, shapes and micro-batches of packed rows, of length buckets, and without either.

    bin/benchmark packing --corpus FILE [--terms FILE] [--join 1] [--examples 16] [--micro-tokens 4096] [--quick] [--json FILE]

Counts a whole epoch; nothing is trained. Length buckets have as many rows as an update has examples, so one example in each
row, and eight shapes; the budget does not limit them. Unpacked micro-batches are those of `batch.pack: false` with lengths
padded to multiples of 8. `attention_share`: operations of the attention scores as a share of those of mT5-small's layers,
padding included.

The last line is JSON: for each side `useful_token_share`, `micro_batches_per_update`, `shapes`, `rows`, `attention_share`;
and `best_share`, a bound for eight shapes and one micro-batch an update, whatever the rows.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.circumstances import circumstances, write_json  # noqa: E402
from benchmarks.peers.processes import in_fresh_process  # noqa: E402

# Attention over rows of this many tokens takes as many operations as the products of mT5-small's layers.
EQUAL_TOKENS = 3072


def attention(shapes: Sequence[tuple[int, int, int]]) -> float:
    """Operations of attention scores as a share of those of the layers, over micro-batches of these shapes."""
    layers = sum(rows * (source + target) for rows, source, target in shapes)
    scores = sum(rows * (source**2 + source * target + target**2) for rows, source, target in shapes)
    return scores / EQUAL_TOKENS / layers


def side(shapes: list[tuple[int, int, int]], useful: int, updates: int) -> dict[str, Any]:
    """Figures of the micro-batches of an epoch."""
    padded = sum(rows * (source + target) for rows, source, target in shapes)
    return {
        "useful_token_share": round(useful / padded, 4),
        "micro_batches_per_update": round(len(shapes) / updates, 3),
        "shapes": len(set(shapes)),
        "rows": sorted({rows for rows, *_ in shapes}),
        "attention_share": round(attention(shapes), 3),
    }


def best_share(tokens: np.ndarray, shapes: int) -> float:
    """Useful share if each update has one micro-batch, of the best `shapes` sizes for these totals; by dynamic programming."""
    sizes, counts = np.unique(tokens, return_counts=True)
    before = np.concatenate(([0], np.cumsum(counts)))
    least = np.where(np.arange(len(sizes) + 1) == 0, 0.0, np.inf)
    for _ in range(shapes):
        ends = range(1, len(sizes) + 1)
        runs = [float((least[:end] + (before[end] - before[:end]) * sizes[end - 1]).min()) for end in ends]
        least = np.array([0.0, *runs])
    return float(tokens.sum() / least[-1])


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Prepare the store and count an epoch. Runs in a new process."""
    from benchmarks.peers.setup import make_store
    from resilient_t5.config.schema import Config
    from resilient_t5.config.sections import BatchConfig, DataConfig, ModelConfig, TokenizerConfig
    from resilient_t5.data.batches import Batches
    from resilient_t5.data.dataset import Dataset
    from resilient_t5.data.packing import MAX_SHAPES, Packing, RowShapes, fit_shapes, pack
    from resilient_t5.training.hardware.memory_fit import task_of

    if options.quick:
        data = DataConfig(train="builtin:clinical", sample_notes=400, max_source_tokens=128, max_target_tokens=64)
    else:
        lines = options.corpus.read_text(encoding="utf-8").split("\n")
        joined = ["".join(lines[begin : begin + options.join]) for begin in range(0, len(lines), options.join)]
        (folder / "corpus.txt").write_text("\n".join(joined), encoding="utf-8")
        terms = None if options.terms is None else str(options.terms)
        data = DataConfig(train=str(folder / "corpus.txt"), terms=terms, document="line", validation_share=0.01)
    pieces = TokenizerConfig(train_vocab_size=700 if options.quick else options.pieces)
    store = make_store(data, pieces, ModelConfig(preset="mt5-small"), options.store or folder / "store")
    batch = BatchConfig(examples_per_update=options.examples, groups_per_update=options.groups)
    config = Config(data=data, batch=batch)
    corpus, task = Dataset.over(store, config), task_of(config, store)
    longest = (task.source_tokens, task.target_tokens)

    def batches(packing: Packing | None) -> Batches:
        sizes = {"micro_tokens": options.micro_tokens, "pad_multiple": 8}
        return Batches(corpus.train, corpus.table, config, seed=42, packing=packing, **sizes)

    plain, packed = batches(None), batches(Packing(longest))
    updates = [plain.at(update) for update in range(max(1, int(plain.updates_per_epoch)))]
    lengths = [
        tuple(np.concatenate(of_side) for of_side in zip(*(m.lengths() for m in update), strict=True)) for update in updates
    ]
    useful = sum(m.useful_tokens for update in updates for m in update)
    buckets = fit_shapes(lengths[:512], options.examples, options.micro_tokens, longest)
    chosen = RowShapes(packed.shapes[0][0], tuple((source, target) for _, source, target in packed.shapes))
    sides = {
        "packed": [part.shape for update in lengths for part in pack(update, chosen)],
        "buckets": [part.shape for update in lengths for part in pack(update, buckets)],
        "unpacked": [m.shape for update in updates for m in update],
    }
    totals = np.array([int(source.sum() + target.sum()) for source, target in lengths])
    figures = {name: side(shapes, useful, len(updates)) for name, shapes in sides.items()}
    return figures | {"best_share": round(best_share(totals, MAX_SHAPES), 4), "chosen": packed.shapes, "updates": len(updates)}


def main(argv: Sequence[str]) -> int:
    """Print a table and one line of JSON."""
    parser = argparse.ArgumentParser(
        prog="bin/benchmark packing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, help="text, a document a line")
    parser.add_argument("--terms", type=Path, help="terms, one a line")
    parser.add_argument("--join", type=int, default=1, help="lines joined to one document; 400 fill the maximum length")
    parser.add_argument("--pieces", type=int, default=32_000, help="vocabulary size of the tokenizer trained on the corpus")
    parser.add_argument("--store", type=Path, help="where the prepared corpus is or will be")
    parser.add_argument("--examples", type=int, default=16, help="examples an update")
    parser.add_argument("--groups", type=int, default=4, help="batch.groups_per_update")
    parser.add_argument("--micro-tokens", type=int, default=4096, help="most padded tokens of a micro-batch")
    parser.add_argument("--quick", action="store_true", help="built-in notes: checks the script, not the claim")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    options = parser.parse_args(argv)
    if options.corpus is None and not options.quick:
        parser.error("--corpus is needed, or --quick")
    if missing := [str(path) for path in (options.corpus, options.terms) if path is not None and not path.is_file()]:
        parser.error(f"not a file: {', '.join(missing)}")
    if min(options.examples, options.groups, options.micro_tokens, options.join) < 1:
        parser.error("--examples, --groups, --micro-tokens and --join must be at least 1")
    with tempfile.TemporaryDirectory() as name:
        figures = in_fresh_process(measure, options, Path(name))
    for name in ("packed", "buckets", "unpacked"):
        print(f"{name:<9} {', '.join(f'{key} {value}' for key, value in figures[name].items())}")
    print(f"best      useful_token_share {figures['best_share']} with eight shapes and one micro-batch an update")
    write_json(circumstances("packing", ("numpy", "torch")) | figures, options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
