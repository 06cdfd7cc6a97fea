"""Configuration sections for the training side: optimizer, schedule, stopping, evaluation, checkpoints, hardware, run.

A field has a type, one default and a docstring with its unit, which is the text of `bin/train --help`.
"""

from dataclasses import dataclass
from typing import Literal

from resilient_t5.config.values import DURATION, Point, above_zero, at_least, below_one, between, check, point_or_number


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
    compile: bool = False
    """Compile the layers with torch.compile; on a GPU worth the minute that it takes at the start."""
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
