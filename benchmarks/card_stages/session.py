"""The session of `bin/benchmark card`: options, sizes, time left, and the result that is rewritten after every measurement."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.card_stages.limited import Child, Outcome, run_limited
from resilient_t5.config.sections import ModelConfig

MT5_ROWS = 250_112
MIN_MEASUREMENT_S = 5.0
"""With less time left nothing is started."""
UPDATES_SHARE = 0.85
"""Of the time of a measurement; the rest is for its end."""
TINY = ModelConfig(preset="mt5-small", d_model=64, d_ff=128, num_layers=2, num_heads=2)


@dataclass(frozen=True)
class Sizes:
    """How much is measured: on a GPU, on a CPU, or with --quick."""

    name: str
    models: dict[str, ModelConfig]
    """The two models: `mt5-small` and `mt5-base`."""
    rows: int
    pieces: int
    """Of the tokenizer for a corpus that is given."""
    updates: int
    """At most so many timed updates of a side; 50 are one window, with the same examples on both sides."""
    time_s: float
    """End the timed updates of a side after this time."""
    warm_updates: int
    rounds: int
    compile_backend: str
    compile_s: float
    """At most for the warm-up of a compiled Trainer."""
    long_examples: int
    """Examples of an update of long texts."""
    long_micro_examples: tuple[int, ...]
    long_micro_tokens: tuple[int | str, ...]
    scratch_model: ModelConfig
    scratch_examples: int
    scratch_updates: int
    resume_updates: int
    quickstart: tuple[str, ...] = ()
    """Further settings of the quickstart."""


GPU = Sizes(
    name="gpu",
    models={name: ModelConfig(preset=name) for name in ("mt5-small", "mt5-base")},  # type: ignore[arg-type]
    rows=MT5_ROWS,
    pieces=32_000,
    updates=50,
    time_s=8.0,
    warm_updates=8,
    rounds=3,
    compile_backend="inductor",
    compile_s=75.0,
    long_examples=64,
    long_micro_examples=(64, 32, 16),
    long_micro_tokens=("auto", 32768),
    scratch_model=ModelConfig(preset="small"),
    scratch_examples=256,
    scratch_updates=30,
    resume_updates=24,
)
CPU = Sizes(
    name="cpu",
    models=GPU.models,
    rows=MT5_ROWS,
    pieces=32_000,
    updates=50,
    time_s=15.0,
    warm_updates=1,
    rounds=3,
    compile_backend="inductor",
    compile_s=120.0,
    long_examples=2,
    long_micro_examples=(2,),
    long_micro_tokens=("auto",),
    scratch_model=ModelConfig(preset="mini"),
    scratch_examples=64,
    scratch_updates=5,
    resume_updates=8,
)
QUICK = Sizes(
    name="quick",
    models={"mt5-small": TINY, "mt5-base": TINY},
    rows=4096,
    pieces=1000,
    updates=4,
    time_s=2.0,
    warm_updates=1,
    rounds=1,
    compile_backend="aot_eager",  # no C++ compiler, shows that the side runs, not its speed
    compile_s=8.0,
    long_examples=4,
    long_micro_examples=(4, 2),
    long_micro_tokens=("auto",),
    scratch_model=ModelConfig(preset="tiny"),
    scratch_examples=32,
    scratch_updates=2,
    resume_updates=6,
    quickstart=(
        *("--schedule.max_updates", "6", "--schedule.warmup", "2", "--evaluation.every", "6"),
        *("--data.sample_notes", "300", "--evaluation.examples", "8", "--evaluation.restore_examples", "4"),
    ),
)


@dataclass
class Session:
    """One call of the benchmark."""

    folder: Path
    device: str
    """`cuda` or `cpu`."""
    sizes: Sizes
    corpus: Path | None
    terms: Path | None
    memory_gib: float
    multiprocessors: int
    end_s: float
    """When the time is over, on the monotonic clock."""
    result: dict[str, Any]
    say: Callable[[str], None]
    stage_end_s: float = 0.0
    """When the time of the stage is over."""
    named: tuple[str, ...] = ()
    """Stages named with --only."""
    prepares_only: bool = False
    """Whether nothing is measured, so that no result is written."""
    inputs: dict[str, Any] = field(default_factory=dict)
    """Prepared stores and models of this session, by name."""

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device == "cuda"

    @property
    def log(self) -> Path:
        """Output of all measurements."""
        return self.folder / "card.log"

    @property
    def left_s(self) -> float:
        """Seconds left in the session and in its stage."""
        return min(self.end_s, self.stage_end_s) - time.monotonic()

    def deadline_s(self, share: float = 1.0) -> float:
        """When the updates of a measurement must end that has this share of the time left, on the monotonic clock."""
        return time.monotonic() + UPDATES_SHARE * share * max(0.0, self.left_s)

    def run(self, function: Callable[..., Any], *arguments: Any, limit_s: float | None = None) -> Outcome:
        """Run a function of a module in a new process, within the time left."""
        limit_s = self.left_s if limit_s is None else min(limit_s, self.left_s)
        if limit_s < MIN_MEASUREMENT_S:
            return Outcome(reason="no time left")
        return run_limited(function, arguments, limit_s, self.log)

    def prepare(self, function: Callable[..., Any], *arguments: Any) -> Outcome:
        """Run a function in a new process in the time of the session, without a cost to the time of the stage."""
        started_s = time.monotonic()
        limit_s = self.end_s - started_s
        if limit_s < MIN_MEASUREMENT_S:
            return Outcome(reason="no time left")
        outcome = run_limited(function, arguments, limit_s, self.log)
        self.stage_end_s += time.monotonic() - started_s
        return outcome

    def start(self, function: Callable[..., Any], *arguments: Any) -> Child:
        """Start a function of a module in a new process."""
        return Child(function, arguments, self.log)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A new folder that is deleted in the end."""
        folder = self.folder / "scratch"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def record(self, stage: str, figures: dict[str, Any]) -> None:
        """Add figures to the record of a stage and save the result. They get no path of this machine."""
        plain = json.loads(json.dumps(figures).replace(str(self.folder), "OUT"))
        self.result["stages"].setdefault(stage, {}).update(plain)
        self.save()

    def save(self) -> None:
        """Rewrite the result file atomically."""
        if self.prepares_only:
            return
        path = self.folder / "card.json"
        temporary = path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps(self.result, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
