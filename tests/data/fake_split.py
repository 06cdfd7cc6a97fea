"""A split, a vocabulary and their settings as tests want them, without text or tokenizer."""

from dataclasses import dataclass

import numpy as np

from resilient_t5.data.corruption.token_table import TokenTable

# Active ids: 0 padding, 1 end, 2 unknown, 3-12 bytes, 13-112 sentinels (descending), 113-142 punctuation, then words.
SIZE = 4000
FIRST_BYTE, FIRST_SENTINEL, FIRST_MARK, FIRST_WORD = 3, 13, 113, 143


@dataclass
class FakeSplit:
    """What corruption and batches read of a split of a store."""

    tokens: np.ndarray
    offsets: np.ndarray
    terms: np.ndarray
    pairs: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.pairs is None:
            self.pairs = np.broadcast_to(np.int32(-1), (len(self),))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def chunk(self, example: int) -> list[int]:
        """The clean tokens of an example."""
        return self.tokens[self.offsets[example] : self.offsets[example + 1]].tolist()

    def terms_of(self, example: int) -> list[tuple[int, int, int]]:
        """Start, end and term id of the occurrences in an example."""
        return [tuple(line[1:]) for line in self.terms.tolist() if line[0] == example]


def fake_table() -> TokenTable:
    """Every word has the next and the next but one word as look-alikes; marks have none."""
    ids = np.arange(SIZE)
    words = np.arange(FIRST_WORD, SIZE)
    look_alikes = np.stack((np.roll(words, -1), np.roll(words, -2)), axis=1)
    counts = np.where(ids < FIRST_WORD, 0, 2)
    return TokenTable(
        size=SIZE,
        pad_id=0,
        eos_id=1,
        sentinel_ids=np.arange(FIRST_MARK - 1, FIRST_SENTINEL - 1, -1, dtype=np.int32),
        punctuation=((ids >= FIRST_MARK) & (ids < FIRST_WORD)) | ((ids >= FIRST_BYTE) & (ids < FIRST_SENTINEL)),
        special=(ids < FIRST_BYTE) | ((ids >= FIRST_SENTINEL) & (ids < FIRST_MARK)),
        byte=(ids >= FIRST_BYTE) & (ids < FIRST_SENTINEL),
        confusions=look_alikes.ravel().astype(np.int32),
        confusion_offsets=np.concatenate(([0], np.cumsum(counts))),
    )


def split_of(chunks: list[list[int]], terms: list[tuple[int, int, int, int]] = (), pairs: list[int] | None = None) -> FakeSplit:
    """A split of given chunks and (example, start, end, term id) occurrences."""
    return FakeSplit(
        tokens=np.array([token for chunk in chunks for token in chunk], np.uint16),
        offsets=np.cumsum([0] + [len(chunk) for chunk in chunks]),
        terms=np.array(list(terms), np.int32).reshape(-1, 4),
        pairs=None if pairs is None else np.array(pairs, np.int32),
    )


def random_split(lengths: np.ndarray, seed: int, *, marks: float = 0.12, others: float = 0.01, term_gap: int = 20) -> FakeSplit:
    """Random words with a share of punctuation, a share of unknown and byte pieces, and a term about every `term_gap`."""
    generator = np.random.default_rng(seed)
    total = int(np.sum(lengths))
    tokens = generator.integers(FIRST_WORD, SIZE, total)
    draw = generator.random(total)
    tokens = np.where(draw < marks, generator.integers(FIRST_MARK, FIRST_WORD, total), tokens)
    tokens = np.where(draw > 1.0 - others, generator.integers(2, FIRST_SENTINEL, total), tokens)
    terms: list[tuple[int, int, int, int]] = []
    for example, length in enumerate(np.asarray(lengths).tolist()):
        start = int(generator.integers(0, 2 * term_gap + 1))
        while term_gap > 0 and start < length:
            end = min(start + int(generator.integers(1, 5)), length)
            terms.append((example, start, end, int(generator.integers(0, 50))))
            start = end + int(generator.integers(0, 2 * term_gap + 1))
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    return FakeSplit(tokens.astype(np.uint16), offsets, np.array(terms, np.int32).reshape(-1, 4))


def log_normal_lengths(count: int, mean: float, variation: float, longest: int, seed: int) -> np.ndarray:
    """Lengths as medical texts have them: log-normal with this mean and coefficient of variation, cut at `longest`."""
    sigma = np.sqrt(np.log(1.0 + variation**2))
    drawn = np.random.default_rng(seed).lognormal(np.log(mean) - sigma**2 / 2.0, sigma, count)
    return np.clip(np.rint(drawn), 4, longest).astype(np.int64)
