"""The configuration of a run, the checks across its sections, and the settings that a resume may change.

The sections are defined in `config/sections.py`; `config/parse.py` reads YAML and the command line.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from resilient_t5.config.sections import (
    BatchConfig,
    Check,
    CheckpointConfig,
    ConvergenceConfig,
    CorruptionConfig,
    DataConfig,
    EvaluationConfig,
    HardwareConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    TelemetryConfig,
    TokenizerConfig,
    check,
)
from resilient_t5.errors import ConfigError

# A resume may change paths, logging and saving intervals, settings that affect speed or memory only, and the patience:
# raising it continues a run that has saturated.
FREE_SECTIONS = ("checkpoint.", "telemetry.")
FREE_KEYS = (
    "batch.micro_tokens",
    "batch.pack",
    "batch.pad_multiple",
    "batch.readers",
    "convergence.patience",
    "data.encoding",
    "data.store",
    "data.terms",
    "data.train",
    "data.validation",
    "hardware.deterministic",
    "hardware.device",
    "hardware.graphs",
    "hardware.memory_gib",
    "hardware.shard_layers",
    "hardware.threads",
    "model.gradient_checkpointing",
    "model.name_or_path",
    "run.deadline_s",
    "run.dir",
    "run.fork",
    "run.on_usr1",
    "run.resume",
    "run.signal_exit",
    "schedule.max_time",
    "tokenizer.max_unknown_share",
    "tokenizer.name_or_path",
)
LENGTH_KEYS = ("schedule.max_updates", "schedule.epochs")


class RemovedKey(NamedTuple):
    """A setting of an earlier version: the values that had no effect, and advice for any other value."""

    inert: tuple[Any, ...]
    hint: str


REMOVED_KEYS = {
    "checkpoint.ballast": RemovedKey((False,), "Remove it; keep free space for one more checkpoint on the disk"),
    "convergence.patience_max": RemovedKey((None, 0), "Remove it and raise convergence.patience instead"),
    "convergence.overfit_percent": RemovedKey((None, 0.0), "Remove it; convergence.patience ends a run that overfits"),
    "convergence.overfit_windows": RemovedKey((None, 6), "Remove it; convergence.patience ends a run that overfits"),
    "hardware.compile": RemovedKey((False,), "Remove it; hardware.graphs reduces the launches of a GPU instead"),
}
"""An inert value is accepted, since every config.yaml of an earlier version contains one; any other value is an error."""


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    corruption: CorruptionConfig = field(default_factory=CorruptionConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    convergence: ConvergenceConfig = field(default_factory=ConvergenceConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        check(
            (
                self.tokenizer.name_or_path is None or self.tokenizer.train_vocab_size is None,
                "tokenizer.name_or_path and tokenizer.train_vocab_size exclude each other: load a tokenizer or train one",
            ),
            (
                self.model.name_or_path is None or self.model.preset is None,
                "model.name_or_path and model.preset exclude each other: load a checkpoint or build from scratch",
            ),
            (
                self.model.name_or_path is None or self.tokenizer.train_vocab_size is None,
                "tokenizer.train_vocab_size: a checkpoint needs its own tokenizer; remove this setting or model.name_or_path",
            ),
            (
                self.run.fork is None or self.run.resume == "auto",
                "run.fork and run.resume exclude each other: a fork starts a new run",
            ),
            (
                not self.optim.name.startswith("adafactor") or self.optim.weight_decay == 0.0,
                "optim.weight_decay: adafactor does not decay weights; set it to 0",
            ),
            *self._in_backward_checks(),
            *self._sharding_checks(),
            (
                self.corruption.task == "correct" or self.corruption.max_sentinels < self.data.max_target_tokens // 2,
                f"corruption.max_sentinels: {self.corruption.max_sentinels} spans do not fit into "
                f"data.max_target_tokens {self.data.max_target_tokens}",
            ),
            (
                self.corruption.task == "restore" or self.data.max_target_tokens >= self.data.max_source_tokens,
                f"data.max_target_tokens: {self.data.max_target_tokens} is below data.max_source_tokens; "
                "with corruption.task correct the target is the whole text",
            ),
            (
                self.evaluation.criterion == "loss" or self.evaluation.restore_every == 1,
                "evaluation.criterion: term_restoration needs evaluation.restore_every 1",
            ),
        )

    def _in_backward_checks(self) -> tuple[Check, ...]:
        """Settings that adafactor_in_backward excludes, since it updates each tensor during the backward pass."""
        if self.optim.name != "adafactor_in_backward":
            return ()
        one_group = self.batch.window_updates == 1 or self.batch.groups_per_update == 1
        return (
            (
                self.optim.clip_norm == 0,
                "optim.clip_norm: adafactor_in_backward clips per tensor, not globally; set it to 0",
            ),
            (
                one_group,
                "batch.groups_per_update: adafactor_in_backward needs each update in one micro-batch; set it to 1",
            ),
            (self.hardware.precision != "fp16", "hardware.precision: adafactor_in_backward has no loss scaler for fp16"),
        )

    def _sharding_checks(self) -> tuple[Check, ...]:
        """Settings that sharded layers exclude."""
        if not self.hardware.shard_layers:
            return ()
        name = self.optim.name
        return (
            (
                name == "adamw",
                f"hardware.shard_layers needs optim.name adamw: {name} needs whole matrices or blocks of them",
            ),
            (
                self.hardware.precision != "fp16",
                "hardware.shard_layers does not support the loss scaler of fp16",
            ),
        )


def check_preparable(config: Config) -> None:
    """Raise ConfigError if the text or the tokenizer for preparing a store is missing."""
    check(
        (bool(config.data.train_inputs()), "data.train is not set: give text files, folders, or builtin:clinical"),
        (
            (config.tokenizer.name_or_path or config.tokenizer.train_vocab_size or config.model.name_or_path) is not None,
            "no tokenizer: set tokenizer.name_or_path, or tokenizer.train_vocab_size, or model.name_or_path",
        ),
    )


def optimizer_problems(config: Config) -> list[str]:
    """Reasons against training the model with this optimizer; they do not prevent an export of a trained model."""
    if config.optim.name != "muon" or config.model.name_or_path is None:
        return []
    return [
        "optim.name: muon is for models from scratch and degrades pretrained ones such as model.name_or_path "
        f"{config.model.name_or_path} (arXiv 2605.10468: Adam-pretrained models); use adamw"
    ]


def check_trainable(config: Config) -> None:
    """Raise ConfigError if text, tokenizer or model is missing, or the optimizer does not suit the model."""
    has_model = config.model.name_or_path is not None or config.model.preset is not None
    missing = "no model: set model.name_or_path (a checkpoint) or model.preset (from scratch)"
    problems = [*([] if has_model else [missing]), *optimizer_problems(config)]
    try:
        check_preparable(config)
    except ConfigError as error:
        problems = [*error.problems, *problems]
    check(*((False, problem) for problem in problems))


def flat(config: Config) -> dict[str, Any]:
    """The configuration as {"section.key": value}, in the order of the dataclasses."""
    sections = dataclasses.asdict(config)
    return {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}


def non_default_settings(config: Config) -> dict[str, Any]:
    """The settings that differ from the defaults, as {"section.key": value}."""
    defaults = flat(Config())
    return {key: value for key, value in flat(config).items() if value != defaults[key]}


def trajectory_settings(config: Config) -> dict[str, Any]:
    """The settings that a resume must not change, as {"section.key": value}.

    The planned length is included only if the learning rate depends on it. Text, terms and tokenizer are compared by the
    fingerprint of the store, not by path.
    """
    warmup = config.schedule.warmup
    is_share = isinstance(warmup, float) and warmup < 1
    length_is_free = config.schedule.shape in ("constant", "inverse_sqrt") and not is_share
    free = FREE_KEYS + (LENGTH_KEYS if length_is_free else ())
    return {key: value for key, value in flat(config).items() if key not in free and not key.startswith(FREE_SECTIONS)}


def trajectory_sha256(config: Config) -> str:
    """Hash of `trajectory_settings`, stored in every checkpoint."""
    return hashlib.sha256(json.dumps(trajectory_settings(config), sort_keys=True).encode()).hexdigest()
