"""Our side of the comparison: a run as built by bin/train, with its reader, updater and counters."""

from pathlib import Path
from typing import Any

from benchmarks.peers.flops import MicroShape, our_flops, useful_flops
from benchmarks.peers.limits import limit_device
from benchmarks.peers.processes import Meter
from benchmarks.peers.setup import Setup
from resilient_t5.checkpoint.manager import CheckpointManager
from resilient_t5.config.schema import Config
from resilient_t5.data.batches import MicroBatch
from resilient_t5.data.store.store import Store
from resilient_t5.training.build import build_run
from resilient_t5.training.hardware.machine import choose_device
from resilient_t5.training.run import Run
from resilient_t5.training.schedule import learning_rate
from resilient_t5.training.telemetry.console import Console
from resilient_t5.training.telemetry.run_log import RunLog


def run_ours(setup: Setup, seed: int) -> dict[str, Any]:
    """Measure our timed updates in this process, without the training loop (see loop_overhead.py)."""
    device = choose_device(setup.device)
    limit_device(device, setup)
    meter = Meter(device)
    run = open_run(setup, seed)
    meter.forget_peak()
    try:
        for _ in range(setup.warm_updates):
            run_update(run)
        # Restart at the first update, so that the timed updates are exactly the first window.
        run.prefetcher.restart(0)
        meter.start()
        done = [micro_batch for _ in range(setup.updates) for micro_batch in run_update(run)]
        figures = meter.stop()
    finally:
        run.prefetcher.close()
        run.log.close()
    model, checkpointing = run.updater.model, run.updater.model.encoder.gradient_checkpointing
    shapes = [MicroShape(*m.shape, m.target_tokens) for m in done]
    return figures | {
        "updates": setup.updates,
        "examples": sum(len(m.example_ids) for m in done),
        "target_tokens": sum(m.target_tokens for m in done),
        "useful_flops": useful_flops(model.config, (pair for m in done for pair in _lengths(m))),
        "flops": sum(our_flops(model.config, s, checkpointing=checkpointing) for s in shapes),
        "vocabulary_rows": model.config.vocab_size,
        "loss": run.state.window_nll_sum / max(1, run.state.window_tokens),
    }


def _lengths(micro_batch: MicroBatch) -> list[tuple[int, int]]:
    """Return the (source, target) tokens of each example."""
    return list(zip(*micro_batch.lengths(), strict=True))


def open_run(setup: Setup, seed: int) -> Run:
    """Create a run at update 0 in a new directory."""
    return open_config(setup.config(seed))


def open_config(config: Config) -> Run:
    """Create a run of this configuration, whose `data.store` exists, at update 0 in the directory `run.dir`."""
    assert config.data.store is not None
    directory = Path(config.run.dir)
    directory.mkdir(parents=True, exist_ok=True)
    log = RunLog(Console("quiet", directory / "train.log"), directory, tensorboard=config.telemetry.tensorboard)
    manager = CheckpointManager(directory, run_id="0" * 32, settings=config.checkpoint, audit=log.checkpoint_event)
    return build_run(config, Store.open(Path(config.data.store)), manager, None, log)


def run_update(run: Run) -> list[MicroBatch]:
    """Run the next update as the loop does, and return its micro-batches."""
    micro_batches = run.prefetcher.take()
    rate = learning_rate(run.state.update, run.plan, run.config, run.convergence, run.guard)
    result = run.updater(micro_batches, run.state.attempted, rate, lambda: False)
    if result is None or not result.applied:
        raise FloatingPointError("an update was skipped, so the timing would include work without effect")
    run.state.count(result)
    return micro_batches
