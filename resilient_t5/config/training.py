"""Configuration sections of how training goes: optimizer, schedule, stopping, evaluation, saving, machine, run.

A field has a type, one default and one docstring line with its unit; `bin/train --help` shows it.
"""

import math
from dataclasses import dataclass
from typing import Literal

from resilient_t5.config.values import DURATION, Point, check, point_or_number, share


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and the loss it sees."""

    name: Literal["adamw", "adamw8bit", "adafactor", "adafactor_in_backward", "muon"] = "adamw"
    """`adamw` (fused), `adamw8bit` (extra lowmem), `adafactor` (T5's recipe), `adafactor_in_backward` (least memory), `muon`
    (fewer updates; for models from scratch only)."""
    lr: float = 5e-5
    """Peak learning rate, absolute for every optimizer."""
    weight_decay: float = 0.0
    """Decoupled weight decay; norms and biases are never decayed."""
    beta1: float = 0.9
    """AdamW: decay of the first moment."""
    beta2: float = 0.999
    """AdamW: decay of the second moment."""
    eps: float = 1e-8
    """AdamW: added to the denominator."""
    clip_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 never clips."""
    label_smoothing: float = 0.0
    """Share of the target probability spread over the vocabulary."""
    z_loss: float = 0.0
    """Weight of the squared log-partition that keeps logits small."""

    def __post_init__(self) -> None:
        check(
            (self.lr > 0 and math.isfinite(self.lr), f"optim.lr: {self.lr} is not a finite number above 0"),
            (self.weight_decay >= 0, f"optim.weight_decay: {self.weight_decay} is below 0"),
            (0 <= self.beta1 < 1, f"optim.beta1: {self.beta1} is not in [0, 1)"),
            (0 <= self.beta2 < 1, f"optim.beta2: {self.beta2} is not in [0, 1)"),
            (self.eps > 0, f"optim.eps: {self.eps} is not above 0"),
            (self.clip_norm >= 0, f"optim.clip_norm: {self.clip_norm} is below 0"),
            (0 <= self.label_smoothing < 1, f"optim.label_smoothing: {self.label_smoothing} is not in [0, 1)"),
            (self.z_loss >= 0, f"optim.z_loss: {self.z_loss} is below 0"),
        )


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the run, and the run's planned length."""

    shape: Literal["linear", "cosine", "constant", "inverse_sqrt"] = "linear"
    """How the learning rate goes down after warm-up."""
    warmup: float | str = 0.1
    """Warm-up: a share of the planned updates (below 1), or a point in training."""
    final_share: float = 0.0
    """Learning rate at the planned end, as a share of the peak (linear and cosine)."""
    max_updates: int | None = None
    """Planned updates; without it `epochs` decides."""
    epochs: float = 5.0
    """Planned passes over the corpus when `max_updates` is not given."""
    max_time: str | None = None
    """Wall-clock limit of the run over all its resumes, such as 90min or 12h."""

    def __post_init__(self) -> None:
        check(
            (self.max_updates is None or self.max_updates >= 1, f"schedule.max_updates: {self.max_updates} is below 1"),
            (self.epochs > 0 and math.isfinite(self.epochs), f"schedule.epochs: {self.epochs} is not above 0"),
            share("schedule.final_share", self.final_share),
            point_or_number("schedule.warmup", self.warmup),
            (
                self.max_time is None or DURATION.fullmatch(self.max_time) is not None,
                f"schedule.max_time: {self.max_time!r} is not a duration such as 30min, 12h or 2d",
            ),
        )


@dataclass(frozen=True)
class ConvergenceConfig:
    """When the run counts as saturated; unset values come from the preset."""

    preset: Literal["seed", "thorough", "short", "seed-code"] = "seed"
    """`seed`: 6000 / 12000 / 5 / 0.001; `thorough`: final results; `short`: small runs; `seed-code`: the peer's rule."""
    start: Point | None = None
    """Point up to which training always continues."""
    judge_from: Point | None = None
    """Point of the first evaluation that may count towards a stop."""
    patience: int | str | None = None
    """Judged windows without a counted gain after which the run is saturated; or a span with its unit, such as 1.5ep."""
    min_gain: float | None = None
    """Smallest decrease of the loss that counts, in nats per token."""
    min_gain_rel: float | None = None
    """Smallest decrease of the loss that counts, as a share of the anchor; the larger of the two thresholds applies."""
    anchor_rule: Literal["counted", "best"] | None = None
    """What a gain is measured against: the last counted loss, or the best loss so far."""
    on_saturation: Literal["stop", "cooldown", "continue"] | None = None
    """Action at saturation: stop, decay the learning rate to zero and stop, or only report it."""
    cooldown_share: float | None = None
    """Length of the cooldown, as a share of the completed updates."""
    divergence_factor: float | None = None
    """A loss above this multiple of the best, twice in a row, ends the run as diverged; 0 disables it."""
    nonfinite_limit: int | None = None
    """Evaluations with a non-finite loss after which the run has diverged; 0 disables it."""

    def __post_init__(self) -> None:
        windows_given = isinstance(self.patience, int)
        not_negative = ("min_gain", "min_gain_rel", "divergence_factor", "nonfinite_limit")
        check(
            *(point_or_number(f"convergence.{key}", getattr(self, key)) for key in ("start", "judge_from")),
            (not windows_given or self.patience >= 1, "convergence.patience: below 1"),  # type: ignore[operator]
            (
                windows_given or point_or_number("", self.patience)[0],
                f"convergence.patience: {self.patience!r} is neither a count of windows (8) nor a span (1.5ep, 20Mtok)",
            ),
            *((getattr(self, k) is None or getattr(self, k) >= 0, f"convergence.{k}: below 0") for k in not_negative),
            (
                self.cooldown_share is None or 0 < self.cooldown_share <= 1,
                f"convergence.cooldown_share: {self.cooldown_share} is not in (0, 1]",
            ),
        )


@dataclass(frozen=True)
class EvaluationConfig:
    """What is evaluated, and how often."""

    every: Point = 1000
    """Point after which each evaluation comes; the span between two is a window."""
    examples: int = 1000
    """Most validation examples whose loss is measured; always the same ones."""
    restore_every: int = 1
    """Evaluations between two measurements of the term restoration rate; 0 measures it only at start and end."""
    restore_examples: int = 200
    """Most validation examples that are restored by generation; always the same ones."""
    criterion: Literal["loss", "term_restoration"] = "loss"
    """What makes an evaluation the best."""

    def __post_init__(self) -> None:
        check(
            point_or_number("evaluation.every", self.every),
            (self.examples >= 1, f"evaluation.examples: {self.examples} is below 1"),
            (self.restore_every >= 0, f"evaluation.restore_every: {self.restore_every} is below 0"),
            (self.restore_examples >= 0, f"evaluation.restore_examples: {self.restore_examples} is below 0"),
        )


@dataclass(frozen=True)
class CheckpointConfig:
    """When the whole state is saved, and what is kept."""

    every_minutes: float | None = 10.0
    """Wall-clock minutes between two saves; null saves by updates only."""
    every_updates: int | None = None
    """Updates between two saves; null saves by the clock only."""
    keep_last: int = 3
    """Newest checkpoints that are kept, beside the best."""
    on_disk_full: Literal["continue", "wait", "stop"] = "continue"
    """A save that finds no room: go on and try later, wait for room, or stop with 73."""
    background: bool = True
    """Write in a thread while training goes on, where memory allows a second copy."""

    def __post_init__(self) -> None:
        check(
            (self.every_minutes is None or self.every_minutes > 0, "checkpoint.every_minutes: not above 0"),
            (self.every_updates is None or self.every_updates >= 1, "checkpoint.every_updates: below 1"),
            (self.keep_last >= 2, f"checkpoint.keep_last: {self.keep_last} is below 2; one alone cannot fall back"),
        )


@dataclass(frozen=True)
class TelemetryConfig:
    """What is written about the run, and how often."""

    log_every: int = 100
    """Updates between two training rows."""
    progress: Literal["auto", "live", "plain", "quiet"] = "auto"
    """Console: a live view on a terminal, plain lines, or nothing but errors."""
    tensorboard: bool = True
    """Draw metrics.jsonl into TensorBoard event files."""
    samples: int = 4
    """Restored probe examples shown at each restoration."""

    def __post_init__(self) -> None:
        check(
            (self.log_every >= 1, f"telemetry.log_every: {self.log_every} is below 1"),
            (self.samples >= 0, f"telemetry.samples: {self.samples} is below 0"),
        )


@dataclass(frozen=True)
class HardwareConfig:
    """The machine."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU when there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the matrix products; weights are always fp32. auto: bf16 where a GPU does it natively, fp32 on a CPU."""
    memory_gib: float | Literal["auto"] = "auto"
    """Device memory to plan for, in GiB."""
    threads: int | Literal["auto"] = "auto"
    """CPU threads of the matrix products."""
    compile: bool = False
    """Compile the layers; worth its minute of start-up on a GPU."""
    shard_layers: bool = False
    """Cut the layers, their gradients and optimizer state over the processes of a launcher, for a model too large for one."""
    deterministic: bool = False
    """Only deterministic GPU kernels: bit-exact resume there, at a price. A CPU run always is."""

    def __post_init__(self) -> None:
        check(
            (self.memory_gib == "auto" or float(self.memory_gib) > 0, "hardware.memory_gib: not above 0"),
            (self.threads == "auto" or int(self.threads) >= 1, "hardware.threads: below 1"),
        )


@dataclass(frozen=True)
class RunConfig:
    """The run directory and how it starts."""

    dir: str = "runs/default"
    """Directory of the run; never wiped."""
    resume: str = "auto"
    """`auto` continues what the directory holds, `none` refuses a directory that holds a run, a path names one checkpoint."""
    fork: str | None = None
    """Checkpoint of another run whose weights this new run starts from."""
    seed: int = 42
    """Seed of order, corruption, dropout and initial weights."""
    deadline_s: float = 25.0
    """Seconds after SIGTERM or SIGHUP at which the process leaves with what is committed; below the 30 s of schedulers."""
    on_usr1: Literal["save", "requeue"] = "save"
    """What SIGUSR1 asks for: save and go on, or save and leave with 75 so that a batch script queues the job again."""
    signal_exit: Literal["signal", "code"] = "signal"
    """After a stopping signal: die by that signal, as the shell's 128 + n, or leave with that number as a plain exit code."""

    def __post_init__(self) -> None:
        check(
            (self.deadline_s > 0, f"run.deadline_s: {self.deadline_s} is not above 0"),
            (self.dir != "", "run.dir: empty"),
            (0 <= self.seed < 2**63, f"run.seed: {self.seed} is not between 0 and 2**63 - 1"),
        )
