"""Configuration sections: a frozen dataclass each, and the value types and range checks that they share.

A field has a type, one default and a docstring with its unit, which is the text of `bin/train --help`. No value is spelled
yes, no, on or off, which YAML reads as a boolean. A *point* in training is an integer (updates) or a string: `0.5ep` (epochs)
or `50Mtok` (target tokens; `ktok`, `Mtok`, `Gtok`). A *duration* has a unit: `30min`, `12h`.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from resilient_t5.errors import ConfigError

Point = int | str
POINT = re.compile(r"(?P<number>\d+(\.\d+)?)(?P<unit>ep|[kMG]?tok)")
DURATION = re.compile(r"(?P<number>\d+(\.\d+)?)(?P<unit>s|min|h|d)")
TOKEN_UNITS = {"tok": 1, "ktok": 10**3, "Mtok": 10**6, "Gtok": 10**9}
DURATION_UNITS_S = {"s": 1, "min": 60, "h": 3600, "d": 86400}

DocumentMode = Literal["auto", "file", "blank_line", "line"]
NoiseKind = Literal["drop", "double", "swap", "replace"]

Check = tuple[bool, str]
"""Whether a setting is valid, and the problem to report if it is not."""


def check(*checks: Check) -> None:
    """Raise one ConfigError with the problem of every check that failed."""
    problems = [problem for is_valid, problem in checks if not is_valid]
    if problems:
        raise ConfigError(*problems)


def at_least(section: str, settings: object, **minimum: float) -> list[Check]:
    """Check the named settings against their minimum; None and `auto` are valid."""
    values = {key: getattr(settings, key) for key in minimum}
    return [
        (value in (None, "auto") or float(value) >= minimum[key], f"{section}.{key}: {value} is below {minimum[key]}")
        for key, value in values.items()
    ]


def above_zero(section: str, settings: object, *keys: str) -> list[Check]:
    """Check that the named settings are finite numbers above 0; None and `auto` are valid."""
    values = {key: getattr(settings, key) for key in keys}
    return [
        (
            value in (None, "auto") or 0 < float(value) < math.inf,
            f"{section}.{key}: {value} is not a finite number above 0",
        )
        for key, value in values.items()
    ]


def between(section: str, settings: object, **bounds: tuple[float, float]) -> list[Check]:
    """Check that the named settings lie in their closed interval."""
    values = {key: getattr(settings, key) for key in bounds}
    return [
        (low <= values[key] <= high, f"{section}.{key}: {values[key]} is not between {low} and {high}")
        for key, (low, high) in bounds.items()
    ]


def below_one(section: str, settings: object, *keys: str) -> list[Check]:
    """Check that the named settings lie in [0, 1); None is valid."""
    values = {key: getattr(settings, key) for key in keys}
    return [(value is None or 0 <= value < 1, f"{section}.{key}: {value} is not in [0, 1)") for key, value in values.items()]


def point_or_number(name: str, value: Point | float | None) -> Check:
    """Check that `value` is a number of at least 0, a point with a unit, or None."""
    problem = f"{name}: {value!r} is not a point in training; write updates (6000), epochs (0.5ep) or tokens (50Mtok)"
    if isinstance(value, str):
        return POINT.fullmatch(value) is not None, problem
    return value is None or (math.isfinite(value) and value >= 0), problem


def as_tuple(value: str | list[str] | None) -> tuple[str, ...]:
    """One or several inputs as a tuple; empty for none."""
    if value is None or value == "":
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


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
    pack: bool | Literal["auto"] = "auto"
    """Pack several examples into each row of a micro-batch, so that a run has at most eight shapes; `auto`: on a GPU."""
    readers: int = 1
    """Threads that prepare batches in advance; 0 prepares them in the training loop. Does not affect the results."""

    def __post_init__(self) -> None:
        check(
            *at_least(
                "batch", self, examples_per_update=1, micro_tokens=1, window_updates=1, groups_per_update=1, pad_multiple=1
            ),
            *between("batch", self, readers=(0, 64)),
        )


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and loss."""

    name: Literal["adamw", "adamw8bit", "adafactor", "adafactor_in_backward", "muon"] = "adamw"
    """`adamw` (fused), `adamw8bit` (needs the extra lowmem), `adafactor` (T5's recipe), `adafactor_in_backward` (least memory),
    `muon` (fewer updates, for models from scratch only)."""
    lr: float = 5e-5
    """Peak learning rate, absolute for every optimizer."""
    weight_decay: float = 0.0
    """Decoupled weight decay; never applied to norms and biases."""
    beta1: float = 0.9
    """AdamW: decay of the first moment."""
    beta2: float = 0.999
    """AdamW: decay of the second moment."""
    eps: float = 1e-8
    """AdamW: added to the denominator."""
    clip_norm: float = 1.0
    """Maximum global gradient norm; 0 disables clipping."""
    label_smoothing: float = 0.0
    """Share of the target probability that is spread over the vocabulary."""
    z_loss: float = 0.0
    """Weight of the squared log-partition function in the loss, which keeps logits small."""

    def __post_init__(self) -> None:
        check(
            *above_zero("optim", self, "lr", "eps"),
            *at_least("optim", self, weight_decay=0, clip_norm=0, z_loss=0),
            *below_one("optim", self, "beta1", "beta2", "label_smoothing"),
        )


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate schedule and planned length of the run."""

    shape: Literal["linear", "cosine", "constant", "inverse_sqrt"] = "linear"
    """Decay of the learning rate after warmup."""
    warmup: float | str = 0.1
    """Warmup, as a share of the planned updates (below 1) or as a point in training."""
    final_share: float = 0.0
    """Learning rate at the planned end, as a share of the peak (linear and cosine)."""
    max_updates: int | None = None
    """Planned number of updates; null uses `epochs`."""
    epochs: float = 5.0
    """Planned number of passes over the corpus if `max_updates` is not given."""
    max_time: str | None = None
    """Time limit of the run, summed over all resumes, such as 90min or 12h."""

    def __post_init__(self) -> None:
        check(
            *at_least("schedule", self, max_updates=1),
            *above_zero("schedule", self, "epochs"),
            *between("schedule", self, final_share=(0, 1)),
            point_or_number("schedule.warmup", self.warmup),
            (
                self.max_time is None or DURATION.fullmatch(self.max_time) is not None,
                f"schedule.max_time: {self.max_time!r} is not a duration such as 30min, 12h or 2d",
            ),
        )


@dataclass(frozen=True)
class ConvergenceConfig:
    """Early stopping: when the run counts as saturated. Null uses the value of the preset."""

    preset: Literal["seed", "thorough", "short", "seed-code"] = "seed"
    """`seed`: start 6000, judge_from 12000, patience 5, min_gain 0.001; `thorough`: for important results; `short`: for short
    runs; `seed-code`: the rule of the original script."""
    start: Point | None = None
    """Point before which the run never stops and no evaluation is judged."""
    judge_from: Point | None = None
    """Point of the first evaluation that can count towards stopping."""
    patience: int | str | None = None
    """Evaluations without sufficient gain before the run is saturated; or a span with a unit, such as 1.5ep."""
    min_gain: float | None = None
    """Minimum decrease of the loss that counts as a gain, absolute, in nats per token."""
    min_gain_rel: float | None = None
    """Minimum decrease of the loss as a share of the reference loss; the larger of both minimums applies."""
    anchor_rule: Literal["counted", "best"] | None = None
    """Reference loss of a gain: the loss at the last counted gain, or the best loss so far."""
    on_saturation: Literal["stop", "cooldown", "continue"] | None = None
    """On saturation: stop, decay the learning rate to zero and stop, or only report it."""
    cooldown_share: float | None = None
    """Length of the cooldown, as a share of the updates so far."""
    divergence_factor: float | None = None
    """Stop as diverged if the loss exceeds this multiple of the best loss twice in a row; 0 disables it."""
    nonfinite_limit: int | None = None
    """Stop as diverged after this many evaluations with a non-finite loss; 0 disables it."""

    def __post_init__(self) -> None:
        is_count = isinstance(self.patience, int)
        check(
            *(point_or_number(f"convergence.{key}", getattr(self, key)) for key in ("start", "judge_from")),
            *(at_least("convergence", self, patience=1) if is_count else ()),
            (
                is_count or point_or_number("", self.patience)[0],
                f"convergence.patience: {self.patience!r} is neither a number of evaluations (8) nor a span (1.5ep, 20Mtok)",
            ),
            *at_least("convergence", self, min_gain=0, min_gain_rel=0, divergence_factor=0, nonfinite_limit=0),
            (
                self.cooldown_share is None or 0 < self.cooldown_share <= 1,
                f"convergence.cooldown_share: {self.cooldown_share} is not in (0, 1]",
            ),
        )


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation interval and examples."""

    every: Point = 1000
    """Interval between evaluations."""
    examples: int = 1000
    """Maximum number of validation examples for the loss; always the same examples."""
    restore_every: int = 1
    """Measure the term restoration rate at every n-th evaluation; 0: only at the start and at the end."""
    restore_examples: int = 200
    """Maximum number of validation examples for the term restoration rate (by generation); always the same examples."""
    criterion: Literal["loss", "term_restoration"] = "loss"
    """Metric that selects the best checkpoint."""

    def __post_init__(self) -> None:
        check(
            point_or_number("evaluation.every", self.every),
            *at_least("evaluation", self, examples=1, restore_every=0, restore_examples=0),
        )


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save the full training state, and how many checkpoints to keep."""

    every_minutes: float | None = 10.0
    """Minutes between checkpoints; null: by `every_updates` only."""
    every_updates: int | None = None
    """Updates between checkpoints; null: by `every_minutes` only."""
    keep_last: int = 3
    """Number of most recent checkpoints to keep, in addition to the best."""
    on_disk_full: Literal["continue", "wait", "stop"] = "continue"
    """If a checkpoint does not fit on the disk: continue and retry later, wait for space, or stop with exit code 73."""
    background: bool = True
    """Write checkpoints in a background thread if there is memory for a copy of the state."""

    def __post_init__(self) -> None:
        check(
            *above_zero("checkpoint", self, "every_minutes"),
            *at_least("checkpoint", self, every_updates=1),
            (self.keep_last >= 2, f"checkpoint.keep_last: {self.keep_last} is below 2; a damaged one needs a fallback"),
        )


@dataclass(frozen=True)
class TelemetryConfig:
    """Logging."""

    log_every: int = 100
    """Updates between training rows in metrics.jsonl."""
    progress: Literal["auto", "live", "plain", "quiet"] = "auto"
    """Console output: `live` view, `plain` lines, or errors only (`quiet`); `auto`: live on a terminal, else plain."""
    tensorboard: bool = True
    """Write the metrics to TensorBoard event files."""
    samples: int = 4
    """Number of restored examples to show at each measurement of the term restoration rate."""

    def __post_init__(self) -> None:
        check(*at_least("telemetry", self, log_every=1, samples=0))


@dataclass(frozen=True)
class HardwareConfig:
    """Device, precision and processes."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on; `auto`: the GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Mixed precision of matrix products; weights are always fp32. `auto`: bf16 on GPUs that support it, fp32 on a CPU."""
    memory_gib: float | Literal["auto"] = "auto"
    """Device memory to plan for, in GiB; `auto`: the memory that is free at the start."""
    threads: int | Literal["auto"] = "auto"
    """CPU threads for matrix products."""
    graphs: bool | Literal["auto"] = "auto"
    """Capture forward and backward as CUDA graphs, one for each shape; needs `batch.pack`. `auto`: on a GPU if they fit."""
    shard_layers: bool = False
    """Shard the layers, their gradients and optimizer state over all processes (FSDP), for models too large for one GPU."""
    deterministic: bool = False
    """Use deterministic GPU kernels only: slower, but a resume is bit-exact. On a CPU it always is."""

    def __post_init__(self) -> None:
        check(*above_zero("hardware", self, "memory_gib"), *at_least("hardware", self, threads=1))


@dataclass(frozen=True)
class RunConfig:
    """Run directory, resume, seed and signals."""

    dir: str = "runs/default"
    """Run directory; existing files are never deleted."""
    resume: str = "auto"
    """`auto`: resume the run in the directory, if any; `none`: fail if there is one; a path: resume from that checkpoint."""
    fork: str | None = None
    """Checkpoint of another run to take the initial weights from."""
    seed: int = 42
    """Random seed of data order, corruption, dropout and initial weights."""
    deadline_s: float = 25.0
    """Maximum seconds from SIGTERM or SIGHUP to exit, finished save or not; keep below the 30 s of most schedulers."""
    on_usr1: Literal["save", "requeue"] = "save"
    """On SIGUSR1: save and continue, or save and exit with 75, so that a batch script can requeue the job."""
    signal_exit: Literal["signal", "code"] = "signal"
    """After a stop signal: terminate by the same signal (128 + n in a shell), or exit with that number as exit code."""

    def __post_init__(self) -> None:
        check(
            *above_zero("run", self, "deadline_s"),
            (self.dir != "", "run.dir: empty"),
            (0 <= self.seed < 2**63, f"run.seed: {self.seed} is not between 0 and 2**63 - 1"),
        )


def updates_at(point: Point, updates_per_epoch: float, tokens_per_update: float) -> int:
    """Convert a point in training to a number of updates.

    Args:
        tokens_per_update: mean target tokens per update.
    """
    if isinstance(point, int):
        return point
    match = POINT.fullmatch(point)
    if match is None:
        raise ConfigError(point_or_number("point", point)[1])
    number, unit = float(match["number"]), match["unit"]
    if unit == "ep":
        return round(number * updates_per_epoch)
    return round(number * TOKEN_UNITS[unit] / tokens_per_update)


def seconds(duration: str) -> float:
    """Convert a duration such as `30min` to seconds."""
    match = DURATION.fullmatch(duration)
    if match is None:
        raise ConfigError(f"{duration!r} is not a duration such as 30min, 12h or 2d")
    return float(match["number"]) * DURATION_UNITS_S[match["unit"]]
