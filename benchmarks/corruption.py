"""Speed of corruption, and share of padding in micro-batches.

    python benchmarks/corruption.py [--store DIR] [--rounds 5] [--json FILE]

Without a store: random words with 12 % punctuation and a term about every 20 tokens; chunks of 256 tokens for the speed,
log-normal lengths of mean 156 (coefficient of variation 0.8, 30 % masked: about 126 / 66 tokens) for the padding. With
a store: its own training chunks under the default corruption. One thread; CPU time, median of the rounds, with wall-clock
figures in addition. For each window, `micro_tokens` is a budget of two mean examples, 4096, or none.
The last line is JSON: {"corruption_tokens_per_s", "useful_token_share": {window: {micro_tokens: figures}}, ...}.
"""

import argparse
import json
import os
import statistics
import sys
import time
import tracemalloc
from contextlib import closing
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np  # noqa: E402
from circumstances import circumstances  # noqa: E402

from resilient_t5.config.schema import BatchConfig, Config, CorruptionConfig, DataConfig  # noqa: E402
from resilient_t5.data.batches import Batches, Prefetcher  # noqa: E402
from resilient_t5.data.corruption.corruption import corrupt  # noqa: E402
from resilient_t5.data.corruption.token_table import build_token_table  # noqa: E402
from resilient_t5.data.counter_rng import order  # noqa: E402
from resilient_t5.data.store.store import Store  # noqa: E402
from tests.data.fake_split import FakeSplit, fake_table, log_normal_lengths, random_split  # noqa: E402

WINDOW_EXAMPLES = 800
HUGE_EPOCH = 10_000_000
PACKAGES = ("torch", "numpy")


def speed(split, table, config, rounds):
    """Source tokens per second of windows of 800 examples, and the masked share."""
    tokens_per_s, wall_tokens_per_s, shares = [], [], []
    for number in range(rounds + 1):
        ids = order(1, number, np.arange(min(WINDOW_EXAMPLES, len(split))), len(split))
        tokens = int((split.offsets[ids + 1] - split.offsets[ids]).sum())
        begin_s, begin_wall_s = time.process_time(), time.perf_counter()
        done = corrupt(split, ids, np.full(len(ids), number), seed=1, settings=config.corruption, data=config.data, table=table)
        core_s, wall_s = time.process_time() - begin_s, time.perf_counter() - begin_wall_s
        if number > 0:  # the first round warms caches and page tables
            tokens_per_s.append(tokens / core_s)
            wall_tokens_per_s.append(tokens / wall_s)
            shares.append((done.spans[:, 3] - done.spans[:, 2]).sum() / tokens)
    return {
        "tokens_per_core_s": round(statistics.median(tokens_per_s)),
        "tokens_per_wall_s": round(statistics.median(wall_tokens_per_s)),
        "masked_share": round(float(np.mean(shares)), 4),
    }


def padding(split, table, config, window_updates, micro_tokens):
    """Useful tokens, examples per micro-batch, and the spread of target tokens over updates."""
    batch = BatchConfig(examples_per_update=16, window_updates=window_updates, groups_per_update=4)
    shaped = Config(data=config.data, corruption=config.corruption, batch=batch)
    batches = Batches(split, table, shaped, seed=1, micro_tokens=micro_tokens, pad_multiple=1)
    updates = [batches.at(update) for update in range(min(200, max(1, len(split) // 16)))]
    micro_batches = [micro_batch for update in updates for micro_batch in update]
    targets = [sum(m.target_tokens for m in update) for update in updates]
    return {
        "useful_share": round(sum(m.useful_tokens for m in micro_batches) / sum(m.padded_tokens for m in micro_batches), 4),
        "examples_per_micro_batch": round(16 * len(updates) / len(micro_batches), 2),
        "target_variation": round(float(np.std(targets) / np.mean(targets)), 3),
    }


def reader_cost(split, table, config, updates):
    """CPU milliseconds per update without threads, including windows, and of the first update."""
    batches = Batches(split, table, config, seed=1, micro_tokens=4096, pad_multiple=1)
    with closing(Prefetcher(batches, 10**6, 0)) as reader:
        begin_s = time.process_time()
        reader.take()
        first_s = time.process_time() - begin_s
        for _ in range(updates - 1):
            reader.take()
        all_s = time.process_time() - begin_s
    return {"first_update_ms": round(1000 * first_s, 1), "update_ms": round(1000 * all_s / updates, 2)}


class TiledTokens:
    """The tokens of a split repeated up to `length`, computed on access."""

    def __init__(self, tokens, length):
        self._tokens, self._length = np.asarray(tokens), length

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        return self._tokens[index % len(self._tokens)]


def huge_epoch(split, table, config):
    """First batch at the beginning, middle and end of an epoch of ten million examples: maximum CPU time and memory."""
    lengths = np.resize(np.diff(split.offsets), HUGE_EPOCH)
    offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    huge = FakeSplit(TiledTokens(split.tokens, int(offsets[-1])), offsets, np.zeros((0, 4), np.int32))
    updates = HUGE_EPOCH // config.batch.examples_per_update
    first_s, peaks = [], []
    for update in (0, updates // 2, updates - 1, 10 * updates):
        for traced in (False, True):  # tracing takes time of its own
            if traced:
                tracemalloc.start()
            begin_s = time.process_time()
            Batches(huge, table, config, seed=1, micro_tokens=4096, pad_multiple=1).at(update)
            if traced:
                peaks.append(tracemalloc.get_traced_memory()[1])
                tracemalloc.stop()
            else:
                first_s.append(time.process_time() - begin_s)
    return {"first_batch_s": round(max(first_s), 4), "peak_mib": round(max(peaks) / 2**20, 1), "examples": HUGE_EPOCH}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.store is None:
        table, config = fake_table(), Config()
        speed_split = random_split(np.full(2 * WINDOW_EXAMPLES, 256), 1)
        split = random_split(log_normal_lengths(6400, 156.0, 0.8, 511, seed=2), 3)
        padded = Config(corruption=CorruptionConfig(mask_ratio=0.3, max_sentinels=100))
    else:
        store = Store.open(arguments.store)
        table = build_token_table(store.tokenizer, store.active_to_full, None)
        longest = int(np.diff(store.train.offsets).max()) + 1
        config = padded = Config(data=DataConfig(max_source_tokens=max(longest, 512)))
        speed_split = split = store.train

    report = {**circumstances("corruption", PACKAGES), "corruption": speed(speed_split, table, config, arguments.rounds)}
    report["corruption_tokens_per_s"] = report["corruption"]["tokens_per_core_s"]
    two_examples = round(2.3 * float(np.diff(split.offsets).mean()) * 1.25)
    report["useful_token_share"] = {
        window: {
            micro_tokens: padding(split, table, padded, window, micro_tokens) for micro_tokens in (two_examples, 4096, 10**9)
        }
        for window in (1, 4, 50)
    }
    report["reader"] = reader_cost(split, table, padded, 100)
    begin_s = time.perf_counter()
    order(1, 3, np.arange(HUGE_EPOCH - WINDOW_EXAMPLES, HUGE_EPOCH), HUGE_EPOCH)
    report["order_ms_at_any_position_of_10_million"] = round(1000 * (time.perf_counter() - begin_s), 2)

    print(f"corruption: {report['corruption']}")
    for window, figures in report["useful_token_share"].items():
        for micro_tokens, figure in figures.items():
            print(f"window {window:>3}, micro_tokens {micro_tokens:>10}: {figure}")
    report["huge_epoch"] = huge_epoch(split, table, padded)
    print(f"reader: {report['reader']}")
    print(f"epoch of ten million: {report['huge_epoch']}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
