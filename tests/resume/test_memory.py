"""A resume needs no more memory than a start. Run: python -m pytest tests/resume/test_memory.py

benchmarks/checkpoint_io.py measures what this test holds fast.
"""

import dataclasses
import weakref

import pytest

from resilient_t5.checkpoint.manager import CheckpointManager
from resilient_t5.config.parse import parse_config
from resilient_t5.data.store.prepare import prepare
from resilient_t5.training.build import build_run
from resilient_t5.training.loop import train
from resilient_t5.training.signals import StopSignal
from resilient_t5.training.telemetry.console import Console
from resilient_t5.training.telemetry.run_log import RunLog

pytestmark = pytest.mark.slow


def test_a_restored_checkpoint_is_not_held_in_memory_a_second_time(tiny_config, tmp_path):
    """Of the loaded tensors those of the model are gone after their copy, and those of the optimizer are its own."""
    config = parse_config(["--config", str(tiny_config), "--run.dir", str(tmp_path)], "test", "")
    config = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, every=1000))
    log = RunLog(Console("quiet", tmp_path / "train.log"), tmp_path)
    manager = CheckpointManager(tmp_path, run_id="0" * 32, settings=config.checkpoint, audit=log.checkpoint_event)
    run = build_run(config, prepare(config, tmp_path / "store"), manager, None, log)
    plan = dataclasses.replace(run.plan, total_updates=2)
    with StopSignal() as stop:
        train(dataclasses.replace(run, plan=plan), stop)
        run.saver.finish("final", stop)
    loaded = manager.load_newest()
    moments = {tensor.data_ptr() for name, tensor in loaded.tensors["optimizer"].items() if "exp_avg" in name}
    weights = [weakref.ref(tensor) for tensor in loaded.tensors["model"].values()]
    run.saver.restore(loaded)
    assert [reference for reference in weights if reference() is not None] == []
    states = run.updater.optimizer.state.values()
    assert moments == {state[key].data_ptr() for state in states for key in ("exp_avg", "exp_avg_sq")}
    run.prefetcher.close()
    run.saver.writer.close()
    run.log.close()
