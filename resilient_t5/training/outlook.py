"""What a run will do: its plan in updates, its phases and its memory, told by a run or known before its model is built."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from resilient_t5.config.schema import Config
from resilient_t5.data.batches import Batches
from resilient_t5.data.dataset import Corpus
from resilient_t5.data.store.store import Store
from resilient_t5.model.precision import Precision
from resilient_t5.training.build import batch_sizes, planned
from resilient_t5.training.convergence.machine import Rules
from resilient_t5.training.hardware.device import build_device
from resilient_t5.training.hardware.memory_fit import Fit, fit_run
from resilient_t5.training.run import Run
from resilient_t5.training.schedule import Plan


@dataclass(frozen=True)
class Outlook:
    """What can be said of a run before its first update."""

    config: Config
    device: torch.device
    precision: Precision
    fit: Fit
    store: Store
    plan: Plan
    rules: Rules

    @property
    def directory(self) -> Path:
        """The run directory, which need not be there yet."""
        return Path(self.config.run.dir)


def outlook_of(run: Run) -> Outlook:
    """The outlook of a run that has been built."""
    return Outlook(run.config, run.device, run.precision, run.fit, run.store, run.plan, run.convergence.rules)


def outlook_over(config: Config, store: Store) -> Outlook:
    """The outlook of the run that `config` asks for: no model is built or read, and nothing is written.

    One thing may still come out otherwise: a 16-bit format that was chosen for a GPU is tried when the model is there.

    Raises:
        ConfigError, DataError: a part cannot be built as it is configured.
    """
    device, precision, _ = build_device(config)
    corpus = Corpus.over(store, config)
    fit = fit_run(config, store, device, precision.name)
    sizes = batch_sizes(config, device, fit.choice.micro_tokens)
    batches = Batches(corpus.train, corpus.table, config, seed=config.run.seed, **sizes)
    return Outlook(config, device, precision, fit, store, *planned(config, batches))


def nearest_existing(path: Path) -> Path:
    """`path`, or the nearest directory above it that is there: its disk is the one that will be written to."""
    found = Path(os.path.abspath(path))
    while not found.is_dir():
        found = found.parent
    return found
