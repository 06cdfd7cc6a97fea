"""Keyed randomness: every draw of the data path is a pure function of a key and a counter.

A key is a 64-bit hash of (seed, stream, parts); a draw is output number `counter` of SplitMix64 started at that key
(Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", with the finalizer that Stafford called
mix13). Nothing is advanced, so any draw of any example costs the same and no draw depends on another one.

`order` is a keyed permutation of any size: a Feistel network on the next power of two, applied repeatedly until the result is
inside the domain (cycle walking; Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). It has no table, so one
position of an epoch of a billion examples costs the same as one of ten.
"""

from enum import IntEnum

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15
FIRST_MULTIPLIER = np.uint64(0xBF58476D1CE4E5B9)
SECOND_MULTIPLIER = np.uint64(0x94D049BB133111EB)
WORD = 2**64
# Four rounds suffice for a large domain; small ones need more for a nearly uniform permutation.
FEISTEL_ROUNDS = 12


class Stream(IntEnum):
    """Purpose of a draw; two purposes never share a stream. The numbers determine the results of a run: never renumber them."""

    ORDER = 1
    DEAL = 2
    TERM_CHANCE = 3
    TERM_RANK = 4
    SPAN_PHASE = 5
    SPAN_LENGTH = 6
    SPAN_RANK = 7
    FALLBACK = 8
    NOISE_BURST = 9
    NOISE_KIND = 10
    NOISE_REPLACEMENT = 11
    MASK_RATIO = 12


def mix(words: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit words in which every bit of the input reaches every bit of the output; uint64 array in and out."""
    words = words ^ (words >> np.uint64(30))
    words *= FIRST_MULTIPLIER
    words ^= words >> np.uint64(27)
    words *= SECOND_MULTIPLIER
    words ^= words >> np.uint64(31)
    return words


def keys(seed: int, stream: Stream, *parts: np.ndarray | int) -> np.ndarray:
    """One key for each element of the broadcast `parts`.

    Args:
        seed: any integer not below 0.
        parts: whole numbers not below 0, such as epochs and example ids.

    Returns:
        uint64, of the broadcast shape of the parts, at least one-dimensional.
    """
    key = mix(np.array([(seed ^ (seed >> 64)) % WORD], dtype=np.uint64) + np.uint64(stream * GOLDEN % WORD))
    for part in parts:
        key = mix(key + np.atleast_1d(np.asarray(part)).astype(np.uint64) * np.uint64(GOLDEN) + np.uint64(GOLDEN))
    return key


def bits(key: np.ndarray, counter: np.ndarray | int) -> np.ndarray:
    """Output number `counter` of each key: uint64, of the broadcast shape of an array of keys and the counters."""
    return mix(key + (np.atleast_1d(counter).astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN))


def uniform(key: np.ndarray, counter: np.ndarray | int) -> np.ndarray:
    """float64 draws from [0, 1) in units of 2**-53."""
    return (bits(key, counter) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def below(key: np.ndarray, counter: np.ndarray | int, limit: np.ndarray | int) -> np.ndarray:
    """int64 draws from 0 to `limit` - 1, for 1 <= limit <= 2**31; no value is favoured by more than `limit` / 2**32."""
    top = bits(key, counter) >> np.uint64(32)
    return ((top * np.asarray(limit).astype(np.uint64)) >> np.uint64(32)).astype(np.int64)


def order(seed: int, epochs: np.ndarray | int, positions: np.ndarray, count: int) -> np.ndarray:
    """Example at each position of the random order of an epoch.

    Args:
        epochs: epoch of each position, or one epoch for all.
        positions: int64 (m,), from 0 to `count` - 1.
        count: examples of an epoch, from 1 to 2**62.

    Returns:
        int64 (m,). For one (seed, epoch), positions 0 .. count - 1 give every example exactly once.
    """
    values = np.array(positions, dtype=np.uint64)
    key = np.broadcast_to(keys(seed, Stream.ORDER, epochs), values.shape)
    width = max(2, (count - 1).bit_length())
    outside = np.arange(len(values))
    while len(outside):
        values[outside] = _feistel(values[outside], key[outside], width)
        outside = outside[values[outside] >= count]
    return values.astype(np.int64)


def shuffle(seed: int, stream: Stream, number: int, count: int) -> np.ndarray:
    """A permutation of 0 .. count - 1 for one (seed, stream, number); int64 (count,). Costs `count`, unlike `order`."""
    return np.argsort(bits(keys(seed, stream, number), np.arange(count)), kind="stable")


def _feistel(values: np.ndarray, key: np.ndarray, width: int) -> np.ndarray:
    """A keyed permutation of the `width`-bit words, element by element; uint64 in and out."""
    low_width = np.uint64(width // 2)
    low_mask = np.uint64(2 ** (width // 2) - 1)
    high_mask = np.uint64(2 ** (width - width // 2) - 1)
    low, high = values & low_mask, values >> low_width
    for number in range(0, FEISTEL_ROUNDS, 2):
        high = high ^ (bits(key ^ low, number) & high_mask)
        low = low ^ (bits(key ^ high, number + 1) & low_mask)
    return (high << low_width) | low
