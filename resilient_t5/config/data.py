"""Configuration sections of what goes in: text, tokenizer, damage, model, batches.

A field has a type, one default and one docstring line with its unit; `bin/train --help` shows it. No value is ever
spelled yes, no, on or off, which YAML would read as a boolean.
"""

from dataclasses import dataclass, field
from typing import Literal

from resilient_t5.config.values import as_tuple, check, share

NoiseKind = Literal["drop", "double", "swap", "replace"]


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it is cut."""

    train: str | list[str] = ""
    """Files, folders or globs to train on; `builtin:clinical` is the built-in corpus."""
    validation: str | list[str] | None = None
    """Files, folders or globs to evaluate on; without it a share of the documents is held out."""
    validation_share: float = 0.02
    """Share of the documents that is held out when `validation` is not given."""
    terms: str | None = None
    """File with one domain term per line; the built-in corpus brings its own."""
    encoding: str = "auto"
    """Encoding of the text files; `auto` tries byte order marks, UTF-8, GB18030 and UTF-16, strictly."""
    text_field: str = "text"
    """Field of a .jsonl line that holds the text."""
    column: str | None = None
    """Column of a .csv or .tsv that holds the text; without it all text columns are taken."""
    document: Literal["auto", "file", "blank_line", "line"] = "auto"
    """What a document is in a plain text file; `auto`: parts between blank lines, else a small file whole, else a line."""
    max_source_tokens: int = 512
    """Longest encoder input, in tokens, end mark included."""
    max_target_tokens: int = 256
    """Longest decoder target, in tokens, end mark included."""
    overlap_tokens: int = 0
    """Tokens of context that a chunk repeats from the chunk before it."""
    store: str | None = None
    """Directory of the prepared corpus; without it `store` in the run directory."""
    sample_notes: int = 4000
    """Notes that `builtin:clinical` generates."""

    def __post_init__(self) -> None:
        check(
            (0.0 < self.validation_share < 1.0, f"data.validation_share: {self.validation_share} is not between 0 and 1"),
            (self.max_source_tokens >= 16, f"data.max_source_tokens: {self.max_source_tokens} is below 16"),
            (self.max_target_tokens >= 8, f"data.max_target_tokens: {self.max_target_tokens} is below 8"),
            (
                0 <= self.overlap_tokens <= self.max_source_tokens // 2,
                f"data.overlap_tokens: {self.overlap_tokens} is not between 0 and half of data.max_source_tokens",
            ),
            (self.sample_notes >= 100, f"data.sample_notes: {self.sample_notes} is below 100"),
        )

    def train_inputs(self) -> tuple[str, ...]:
        """The training inputs as a tuple."""
        return as_tuple(self.train)

    def validation_inputs(self) -> tuple[str, ...]:
        """The validation inputs as a tuple; empty when a share is held out instead."""
        return as_tuple(self.validation)


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer: loaded, or trained on the corpus."""

    name_or_path: str | None = None
    """Directory or hub name of a T5/mT5 tokenizer; without it that of `model.name_or_path`."""
    train_vocab_size: int | None = None
    """Pieces of a SentencePiece model to train on the corpus, sentinels not counted."""
    character_coverage: float = 0.9995
    """Share of the corpus' characters that get a piece of their own; the rest is spelled in bytes."""
    max_unknown_share: float = 0.2
    """Largest share of the corpus' characters that may have no piece; a corpus above it is refused."""

    def __post_init__(self) -> None:
        size = self.train_vocab_size
        check(
            (size is None or size >= 300, f"tokenizer.train_vocab_size: {size} is below 300"),
            (
                0.9 <= self.character_coverage <= 1.0,
                f"tokenizer.character_coverage: {self.character_coverage} is not between 0.9 and 1",
            ),
            share("tokenizer.max_unknown_share", self.max_unknown_share),
        )


@dataclass(frozen=True)
class CorruptionConfig:
    """How a chunk is damaged; drawn anew every epoch, fixed for evaluation."""

    task: Literal["restore", "correct"] = "restore"
    """`restore`: the target is what is missing; `correct`: the target is the whole clean text."""
    mask_ratio: float = 0.20
    """Share of a chunk's tokens that is masked."""
    mask_ratio_spread: float = 0.0
    """Each training chunk draws its own ratio, up to this far below or above `mask_ratio`; evaluation stays at `mask_ratio`."""
    term_probability: float = 0.5
    """Probability that a term occurrence is masked, before random spans fill up to `mask_ratio`."""
    max_span_tokens: int = 3
    """Longest random span, in tokens; a term may be longer."""
    max_sentinels: int = 27
    """Most spans in one example; pretrained T5 degrades beyond 27."""
    noise_ratio: float = 0.03
    """Share of the visible tokens that is noised."""
    noise_kinds: list[NoiseKind] = field(default_factory=lambda: ["drop", "double", "swap", "replace"])
    """Kinds of noise to draw from."""
    noise_burst_tokens: int = 3
    """Mean length of a burst of noise, in tokens."""
    confusions: str | None = None
    """TSV file of look-alikes (character, tab, its look-alikes) that extends the built-in table."""

    def __post_init__(self) -> None:
        most = round(self.mask_ratio + self.mask_ratio_spread, 6)  # 0.56 + 0.34 is a little more than 0.9
        check(
            (0.0 < self.mask_ratio <= 0.9, f"corruption.mask_ratio: {self.mask_ratio} is not in (0, 0.9]"),
            (
                self.mask_ratio_spread == 0.0 or (0.0 < self.mask_ratio_spread <= self.mask_ratio and most <= 0.9),
                f"corruption.mask_ratio_spread: {self.mask_ratio_spread} takes mask_ratio {self.mask_ratio} out of 0 to 0.9",
            ),
            share("corruption.term_probability", self.term_probability),
            (self.max_span_tokens >= 1, f"corruption.max_span_tokens: {self.max_span_tokens} is below 1"),
            (1 <= self.max_sentinels <= 100, f"corruption.max_sentinels: {self.max_sentinels} is not between 1 and 100"),
            (0.0 <= self.noise_ratio <= 0.5, f"corruption.noise_ratio: {self.noise_ratio} is not between 0 and 0.5"),
            (self.noise_burst_tokens >= 1, f"corruption.noise_burst_tokens: {self.noise_burst_tokens} is below 1"),
            (
                self.noise_ratio == 0.0 or len(self.noise_kinds) > 0,
                "corruption.noise_kinds: empty, but corruption.noise_ratio is above 0",
            ),
        )


@dataclass(frozen=True)
class ModelConfig:
    """Which T5 or mT5 is trained."""

    name_or_path: str | None = None
    """Directory or hub name of a T5/mT5 checkpoint."""
    preset: Literal["tiny", "mini", "small", "mt5-small", "mt5-base", "mt5-large", "mt5-xl"] | None = None
    """Shape of a model that is built from scratch."""
    d_model: int | None = None
    """Width of a model from scratch; replaces the preset's."""
    d_ff: int | None = None
    """Feed-forward width of a model from scratch; replaces the preset's."""
    num_layers: int | None = None
    """Layers in each of encoder and decoder of a model from scratch; replaces the preset's."""
    num_heads: int | None = None
    """Attention heads of a model from scratch; replaces the preset's."""
    dropout: float | None = None
    """Dropout probability; without it the checkpoint's or preset's own."""
    active_vocabulary: Literal["corpus", "full"] = "corpus"
    """`corpus`: train only the vocabulary rows that the corpus can use and write them back at export; `full`: all rows."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Recompute activations in the backward pass: less memory, about a third more time."""

    def __post_init__(self) -> None:
        sizes = {key: getattr(self, key) for key in ("d_model", "d_ff", "num_layers", "num_heads")}
        check(
            *((value is None or value >= 1, f"model.{key}: {value} is below 1") for key, value in sizes.items()),
            (
                self.dropout is None or 0.0 <= self.dropout < 1.0,
                f"model.dropout: {self.dropout} is not in [0, 1)",
            ),
        )


@dataclass(frozen=True)
class BatchConfig:
    """How examples become updates and micro-batches."""

    examples_per_update: int = 16
    """Examples whose gradients make one update."""
    micro_tokens: int | Literal["auto"] = "auto"
    """Most padded tokens (source and target) of a micro-batch; changes speed and memory, not the mathematics."""
    window_updates: int = 50
    """Updates' worth of examples sorted by length together; 1 keeps every update what a random order gives."""
    groups_per_update: int = 4
    """Groups of similar length that are dealt to an update when `window_updates` is above 1."""
    pad_multiple: int | Literal["auto"] = "auto"
    """Lengths are padded to a multiple of this; auto: 1 on CPU, 8 on GPU."""
    readers: int = 1
    """Threads that prepare batches ahead; 0 prepares in the loop. Changes no bit of the run."""

    def __post_init__(self) -> None:
        check(
            (self.examples_per_update >= 1, f"batch.examples_per_update: {self.examples_per_update} is below 1"),
            (
                self.micro_tokens == "auto" or int(self.micro_tokens) >= 1,
                f"batch.micro_tokens: {self.micro_tokens} is below 1",
            ),
            (self.window_updates >= 1, f"batch.window_updates: {self.window_updates} is below 1"),
            (self.groups_per_update >= 1, f"batch.groups_per_update: {self.groups_per_update} is below 1"),
            (
                self.pad_multiple == "auto" or int(self.pad_multiple) >= 1,
                f"batch.pad_multiple: {self.pad_multiple} is below 1",
            ),
            (0 <= self.readers <= 64, f"batch.readers: {self.readers} is not between 0 and 64"),
        )
