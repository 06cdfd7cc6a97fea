"""Run: the parts of one training run as plain data. `build_run` of build.py constructs it."""

from dataclasses import dataclass, field

import numpy as np
import torch

from resilient_t5.checkpoint.manager import CheckpointManager
from resilient_t5.config.schema import Config
from resilient_t5.data.batches import Batches, Prefetcher
from resilient_t5.data.store.store import Store
from resilient_t5.model.precision import Precision
from resilient_t5.training.convergence.machine import ConvergenceMachine
from resilient_t5.training.evaluator import Evaluator
from resilient_t5.training.hardware.memory_fit import Fit
from resilient_t5.training.hardware.process_group import ProcessGroup
from resilient_t5.training.out_of_memory import MemoryGuard
from resilient_t5.training.recovery import Recovery, SuspendDetector
from resilient_t5.training.saver import Saver
from resilient_t5.training.schedule import Plan
from resilient_t5.training.spike_guard import SpikeGuard
from resilient_t5.training.state import RunState
from resilient_t5.training.telemetry.run_log import RunLog
from resilient_t5.training.telemetry.timing import Timing
from resilient_t5.training.update import Updater


@dataclass(frozen=True)
class Run:
    """The parts of a run. The fields never change; the training state is inside the second group."""

    # Settings and plan
    config: Config
    device: torch.device
    precision: Precision
    fit: Fit
    plan: Plan
    store: Store
    trained_ids: np.ndarray
    """Full token ids of the model's vocabulary rows, ascending."""

    # Training state: what a checkpoint holds
    updater: Updater
    convergence: ConvergenceMachine
    guard: SpikeGuard
    state: RunState

    # Services
    batches: Batches
    prefetcher: Prefetcher
    memory_guard: MemoryGuard
    evaluator: Evaluator
    manager: CheckpointManager
    saver: Saver
    recovery: Recovery
    log: RunLog
    timing: Timing
    group: ProcessGroup
    graphs_note: str = ""
    """Line of the start banner about CUDA graphs; empty if there is nothing to say."""
    suspend: SuspendDetector = field(default_factory=SuspendDetector)
