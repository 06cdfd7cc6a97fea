"""Configuration sections for the input side: text, tokenizer, corruption, model, batches.

A field has a type, one default and a docstring with its unit, which is the text of `bin/train --help`. No value is spelled
yes, no, on or off, which YAML reads as a boolean.
"""

from dataclasses import dataclass, field
from typing import Literal

from resilient_t5.config.values import as_tuple, at_least, below_one, between, check

DocumentMode = Literal["auto", "file", "blank_line", "line"]
NoiseKind = Literal["drop", "double", "swap", "replace"]


@dataclass(frozen=True)
class DataConfig:
    """Text files, and how documents are split into examples."""

    train: str | list[str] = ""
    """Files, folders or globs to train on; `builtin:clinical` is the built-in corpus."""
    validation: str | list[str] | None = None
    """Files, folders or globs to evaluate on; null holds out a share of the training documents."""
    validation_share: float = 0.02
    """Share of the documents to hold out if `validation` is not given."""
    terms: str | None = None
    """File with one domain term per line; the built-in corpus has its own terms."""
    encoding: str = "auto"
    """Encoding of the text files; `auto` tries byte order marks, UTF-8, GB18030 and UTF-16, strictly."""
    text_field: str = "text"
    """Field of a .jsonl line that contains the text."""
    column: str | None = None
    """Column of a .csv or .tsv file that contains the text; null uses all text columns."""
    document: DocumentMode = "auto"
    """Document unit in plain text files; `auto`: parts between blank lines, else the whole file if it is small, else lines."""
    max_source_tokens: int = 512
    """Maximum encoder input length, in tokens, including the end token."""
    max_target_tokens: int = 256
    """Maximum decoder target length, in tokens, including the end token."""
    overlap_tokens: int = 0
    """Tokens that a chunk of a long document repeats from the previous chunk."""
    store: str | None = None
    """Directory of the prepared corpus; null uses `store` in the run directory."""
    sample_notes: int = 4000
    """Number of notes that `builtin:clinical` generates."""

    def __post_init__(self) -> None:
        check(
            (0.0 < self.validation_share < 1.0, f"data.validation_share: {self.validation_share} is not between 0 and 1"),
            *at_least("data", self, max_source_tokens=16, max_target_tokens=8, sample_notes=100),
            (
                0 <= self.overlap_tokens <= self.max_source_tokens // 2,
                f"data.overlap_tokens: {self.overlap_tokens} is not between 0 and half of data.max_source_tokens",
            ),
        )

    def train_inputs(self) -> tuple[str, ...]:
        """The training inputs as a tuple."""
        return as_tuple(self.train)

    def validation_inputs(self) -> tuple[str, ...]:
        """The validation inputs as a tuple; empty if a share is held out."""
        return as_tuple(self.validation)


@dataclass(frozen=True)
class TokenizerConfig:
    """Tokenizer to load, or to train on the corpus."""

    name_or_path: str | None = None
    """Directory or hub name of a T5 or mT5 tokenizer; null uses that of `model.name_or_path`."""
    train_vocab_size: int | None = None
    """Train a SentencePiece model with this many pieces on the corpus; sentinels are added to them."""
    character_coverage: float = 0.9995
    """Share of the corpus characters that get their own piece; the others are encoded as bytes."""
    max_unknown_share: float = 0.2
    """Maximum share of corpus characters without a piece; preparing a corpus above it fails."""

    def __post_init__(self) -> None:
        check(
            *at_least("tokenizer", self, train_vocab_size=300),
            *between("tokenizer", self, character_coverage=(0.9, 1), max_unknown_share=(0, 1)),
        )


@dataclass(frozen=True)
class CorruptionConfig:
    """Masking and noise; drawn again in every epoch, fixed for evaluation."""

    task: Literal["restore", "correct"] = "restore"
    """`restore`: the target is the masked text (span corruption); `correct`: the target is the whole clean text."""
    mask_ratio: float = 0.20
    """Share of the tokens to mask."""
    mask_ratio_spread: float = 0.0
    """Draw the ratio of each training example uniformly from `mask_ratio` plus or minus this; evaluation uses `mask_ratio`."""
    term_probability: float = 0.5
    """Probability of masking a term occurrence; random spans then fill up to `mask_ratio`."""
    max_span_tokens: int = 3
    """Maximum length of a random span, in tokens; terms may be longer."""
    max_sentinels: int = 27
    """Maximum number of masked spans per example; pretrained T5 degrades above 27."""
    noise_ratio: float = 0.03
    """Share of the visible tokens to corrupt with character noise."""
    noise_kinds: list[NoiseKind] = field(default_factory=lambda: ["drop", "double", "swap", "replace"])
    """Kinds of noise to draw from."""
    noise_burst_tokens: int = 3
    """Mean length of a run of noisy tokens."""
    confusions: str | None = None
    """TSV file (character, tab, similar-looking characters) that extends the built-in table for `replace`."""

    def __post_init__(self) -> None:
        highest = round(self.mask_ratio + self.mask_ratio_spread, 6)  # 0.56 + 0.34 is slightly above 0.9
        check(
            (0.0 < self.mask_ratio <= 0.9, f"corruption.mask_ratio: {self.mask_ratio} is not in (0, 0.9]"),
            (
                self.mask_ratio_spread == 0.0 or (0.0 < self.mask_ratio_spread <= self.mask_ratio and highest <= 0.9),
                f"corruption.mask_ratio_spread: {self.mask_ratio_spread} takes mask_ratio {self.mask_ratio} out of 0 to 0.9",
            ),
            *between("corruption", self, term_probability=(0, 1), max_sentinels=(1, 100), noise_ratio=(0, 0.5)),
            *at_least("corruption", self, max_span_tokens=1, noise_burst_tokens=1),
            (
                self.noise_ratio == 0.0 or len(self.noise_kinds) > 0,
                "corruption.noise_kinds: empty, but corruption.noise_ratio is above 0",
            ),
        )


@dataclass(frozen=True)
class ModelConfig:
    """T5 or mT5 model to fine-tune, or to build from scratch."""

    name_or_path: str | None = None
    """Directory or hub name of a T5 or mT5 checkpoint."""
    preset: Literal["tiny", "mini", "small", "mt5-small", "mt5-base", "mt5-large", "mt5-xl"] | None = None
    """Architecture of a model with random weights, instead of `name_or_path`."""
    d_model: int | None = None
    """Hidden size; overrides the preset."""
    d_ff: int | None = None
    """Feed-forward size; overrides the preset."""
    num_layers: int | None = None
    """Number of encoder layers and of decoder layers; overrides the preset."""
    num_heads: int | None = None
    """Number of attention heads; overrides the preset."""
    dropout: float | None = None
    """Dropout probability; null keeps that of the checkpoint or preset."""
    active_vocabulary: Literal["corpus", "full"] = "corpus"
    """`corpus`: train only the vocabulary rows that the corpus uses, and export all rows; `full`: train all rows."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Recompute activations in the backward pass: less memory, about a third more time; `auto`: only if needed to fit."""

    def __post_init__(self) -> None:
        check(*at_least("model", self, d_model=1, d_ff=1, num_layers=1, num_heads=1), *below_one("model", self, "dropout"))


@dataclass(frozen=True)
class BatchConfig:
    """Examples per update, and how they are grouped into micro-batches."""

    examples_per_update: int = 16
    """Examples per optimizer update, over all processes (the effective batch size)."""
    micro_tokens: int | Literal["auto"] = "auto"
    """Maximum padded tokens (source and target) of a micro-batch; affects speed and memory only. `auto`: fit to the memory."""
    window_updates: int = 50
    """Number of updates whose examples are sorted by length together; 1 keeps purely random updates."""
    groups_per_update: int = 4
    """Number of length groups that an update is composed of if `window_updates` is above 1."""
    pad_multiple: int | Literal["auto"] = "auto"
    """Pad lengths to a multiple of this; `auto`: 1 on a CPU, 8 on a GPU."""
    readers: int = 1
    """Threads that prepare batches in advance; 0 prepares them in the training loop. Does not affect the results."""

    def __post_init__(self) -> None:
        check(
            *at_least(
                "batch", self, examples_per_update=1, micro_tokens=1, window_updates=1, groups_per_update=1, pad_multiple=1
            ),
            *between("batch", self, readers=(0, 64)),
        )
