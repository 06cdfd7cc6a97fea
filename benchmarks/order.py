"""The order of an epoch of a billion examples, computed in pieces and never stored.

    python benchmarks/order.py [--examples 1000000000] [--json FILE]

An epoch is a keyed permutation (`data/counter_rng.py`): the example at a position is computed, so nothing is planned, sharded
or saved, and every process computes the positions that it needs. Measured are:

- exact: all positions of one epoch, in pieces of different length, mark their examples; every example must be marked once.
  The marks (one byte per example) belong to the benchmark.
- seek: a window of 800 positions at random positions of random epochs: time, and memory by tracemalloc.
- mixing, compared with numpy's permutations of a million examples: neighbours of the text in one window of 800, correlation
  of adjacent positions, and chi-square of position against example in 100 x 100 cells (also over the whole epoch).

One thread; all times are CPU times. The last line is JSON.
"""

import argparse
import resource
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
from circumstances import circumstances, write_json

sys.path.insert(0, str(Path(__file__).parents[1]))

from resilient_t5.data.counter_rng import order  # noqa: E402

SEED, EPOCH = 42, 3
WINDOW = 800
SEEKS = 200
PIECE = 1 << 18
CELLS = 100
MIXED = 1_000_000
EPOCHS_MIXED = 20
FIGURES = ("neighbours_in_one_window", "correlation_of_neighbours", "chi_square_over_expected")


def pieces(examples, draw):
    """Positions 0 .. examples - 1 in pieces of different length, as processes and resumes request them."""
    begin = 0
    while begin < examples:
        end = min(examples, begin + int(draw.integers(1, 2 * PIECE)))
        yield begin, end
        begin = end


def exact(examples):
    """Whether an epoch has every example once, the rate, and how uniformly positions map to examples."""
    marks, cells = np.zeros(examples, np.uint8), np.zeros((CELLS, CELLS), np.int64)
    draw, order_s, asked = np.random.default_rng(1), 0.0, 0
    for begin, end in pieces(examples, draw):
        asked += 1
        started_s = time.process_time()
        found = order(SEED, EPOCH, np.arange(begin, end), examples)
        order_s += time.process_time() - started_s
        marks[found] += 1
        first, last = begin * CELLS // examples, (end - 1) * CELLS // examples
        rows = np.arange(begin, end) * CELLS // examples if last > first else np.full(end - begin, first)
        cells += np.bincount(rows * CELLS + found * CELLS // examples, minlength=CELLS * CELLS).reshape(CELLS, CELLS)
    return {
        "examples": examples,
        "each_exactly_once": bool(marks.min() == marks.max() == 1),
        "pieces": asked,
        "positions_per_core_s": round(examples / order_s),
        "core_s_of_the_epoch": round(order_s, 1),
        "chi_square_over_expected": round(chi_square(cells), 4),
    }


def chi_square(cells):
    """Pearson's statistic over its degrees of freedom in a doubly balanced table: about 1 for a random permutation."""
    expected = cells.sum() / cells.size
    return float(((cells - expected) ** 2 / expected).sum() / (CELLS - 1) ** 2)


def seek(examples):
    """A window at random positions of random epochs: CPU milliseconds and peak KiB."""
    draw, taken_ms = np.random.default_rng(2), []
    for _ in range(SEEKS):
        begin, epoch = int(draw.integers(0, examples - WINDOW)), int(draw.integers(0, 1 << 40))
        started_s = time.process_time()
        order(SEED, epoch, np.arange(begin, begin + WINDOW), examples)
        taken_ms.append(1000 * (time.process_time() - started_s))
    tracemalloc.start()
    order(SEED, EPOCH, np.arange(examples - WINDOW, examples), examples)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {
        "window_positions": WINDOW,
        "seeks": SEEKS,
        "median_core_ms": round(float(np.median(taken_ms)), 3),
        "max_core_ms": round(max(taken_ms), 3),
        "peak_kib": round(peak / 1024, 1),
        "state_bytes": 0,
    }


def mixing():
    """Quality of the shuffle, ours and numpy's, over several epochs of a million examples."""
    draw = np.random.default_rng(3)
    ours = [figures(order(SEED, epoch, np.arange(MIXED), MIXED)) for epoch in range(EPOCHS_MIXED)]
    theirs = [figures(draw.permutation(MIXED)) for _ in range(EPOCHS_MIXED)]
    return {
        "examples": MIXED,
        "epochs": EPOCHS_MIXED,
        "expected_neighbours_in_one_window": WINDOW - 1,
        **{
            name: {"ours": spread([row[column] for row in ours]), "numpy": spread([row[column] for row in theirs])}
            for column, name in enumerate(FIGURES)
        },
    }


def figures(permutation):
    """The values of FIGURES: neighbouring examples in one window, correlation of adjacent positions, chi-square."""
    window_of = np.empty(MIXED, np.int64)
    window_of[permutation] = np.arange(MIXED) // WINDOW
    together = int((window_of[1:] == window_of[:-1]).sum())
    correlation = float(np.corrcoef(permutation[1:], permutation[:-1])[0, 1])
    rows = np.arange(MIXED) * CELLS // MIXED
    cells = np.bincount(rows * CELLS + permutation * CELLS // MIXED, minlength=CELLS * CELLS).reshape(CELLS, CELLS)
    return together, correlation, chi_square(cells)


def spread(values):
    """Mean and standard deviation over epochs."""
    return {"mean": round(float(np.mean(values)), 5), "sd": round(float(np.std(values)), 5)}


def main():
    """Measure, print tables and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1_000_000_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.examples <= 2 * WINDOW:
        parser.error(f"--examples is to be above {2 * WINDOW}")
    result = {**circumstances("order", ("numpy",)), "seek": seek(options.examples), "mixing": mixing()}
    result["exact"] = exact(options.examples)
    result["peak_mib_of_the_benchmark"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    for name in ("seek", "mixing", "exact"):
        sys.stdout.write(f"{name}: " + ", ".join(f"{key} {value}" for key, value in result[name].items()) + "\n")
    write_json(result, options.json)
    return int(not result["exact"]["each_exactly_once"])


if __name__ == "__main__":
    raise SystemExit(main())
