"""Captured passes, on a CPU with a stand-in for torch.cuda that runs the captured function again at every replay.

What only a GPU shows is not tested here: kernels, streams and memory. Run: python -m pytest
tests/training/hardware/test_graphs.py
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from resilient_t5.checkpoint.manager import CheckpointManager
from resilient_t5.config.parse import parse_config
from resilient_t5.data.store.prepare import prepare
from resilient_t5.errors import DeviceLost
from resilient_t5.model.dropout import seed_dropout
from resilient_t5.training.build import build_run
from resilient_t5.training.hardware.graphs import capture, example_input, largest_offset
from resilient_t5.training.telemetry.console import Console
from resilient_t5.training.telemetry.run_log import RunLog

UPDATES = 2
LEARNING_RATE = 0.01
GENERATOR = "generator in capture mode"


class Device:
    """The parts of torch.cuda that a capture uses. A capture computes without a trace, as kernels that do not run.

    `run_pass` must be wrapped by `observed`.
    """

    def __init__(self, monkeypatch):
        self.graph, self.error_at_end, self.stream, self.modes = None, None, "main", []
        self.wrapped, self.broken = None, False
        generator = SimpleNamespace(clone_state=lambda: "before", graphsafe_set_state=self._set_generator)
        self.generator = "before"
        device = self

        class Graph:
            def __init__(self):
                self.call = self.result = None

            def replay(self):
                self.result.copy_(device.wrapped(*self.call))

        class Capture:
            def __init__(self, graph, *, pool, stream, capture_error_mode):
                assert stream == "side" and capture_error_mode == "thread_local" and pool == "pool"
                self.graph = graph

            def __enter__(self):
                device.graph, device.stream, device.generator = self.graph, "side", GENERATOR

            def __exit__(self, *_):
                device.graph = None
                if device.error_at_end is not None:
                    raise RuntimeError(device.error_at_end)  # stream and generator stay as they are, as torch's do
                device.stream, device.generator = "main", "before"

        stand_ins = {
            "current_device": lambda: 0,
            "default_generators": [generator],
            "current_stream": lambda *_: SimpleNamespace(wait_stream=lambda stream: None, name="main"),
            "Stream": lambda *_: Side(),
            "stream": lambda stream: contextlib.nullcontext(),
            "set_stream": lambda stream: setattr(self, "stream", stream.name),
            "graph_pool_handle": lambda: "pool",
            "CUDAGraph": Graph,
            "graph": Capture,
            "get_sync_debug_mode": lambda: 0,
            "set_sync_debug_mode": self.modes.append,
            "empty_cache": lambda: None,
        }
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)

    def _set_generator(self, state):
        self.generator = state

    def observed(self, run_pass, gradients):
        """`run_pass`; in a capture the graph notes the call, and the gradients do not change."""
        self.wrapped = run_pass

        def run(given, divisor):
            if self.broken or (self.generator == GENERATOR and self.graph is None):
                raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
            if self.graph is None:
                return run_pass(given, divisor)
            before, random_state = [g.clone() for g in gradients()], torch.get_rng_state()
            self.graph.call, self.graph.result = (given, divisor), run_pass(given, divisor)
            for gradient, value in zip(gradients(), before, strict=True):
                gradient.copy_(value)
            torch.set_rng_state(random_state)
            return self.graph.result

        return run


class Side(str):
    """A stream that is equal to "side"."""

    def __new__(cls):
        """The name."""
        return super().__new__(cls, "side")

    def wait_stream(self, stream):
        """Nothing to wait for."""


@pytest.fixture
def device(monkeypatch):
    """The stand-in."""
    return Device(monkeypatch)


@pytest.fixture(scope="module")
def store(tiny_config, tmp_path_factory):
    """The tiny run's prepared corpus."""
    return prepare(parse_config(["--config", str(tiny_config)], "train", "test"), tmp_path_factory.mktemp("store") / "store")


@pytest.fixture
def new_run(tiny_config, store, tmp_path):
    """() -> a run of packed rows with dropout at update 0; always the same."""
    runs = []

    def make():
        directory = tmp_path / f"run{len(runs)}"
        directory.mkdir()
        options = ["--config", tiny_config, "--run.dir", directory, "--batch.pack", "true", "--batch.readers", "0"]
        config = parse_config([str(option) for option in options], "train", "test")
        log = RunLog(Console("quiet", None), directory)
        manager = CheckpointManager(directory, run_id="0" * 32, settings=config.checkpoint, audit=log.checkpoint_event)
        runs.append(build_run(config, store, manager, None, log))
        assert config.model.dropout > 0
        return runs[-1]

    yield make
    for run in runs:
        run.prefetcher.close()
        run.log.close()
    torch.set_flush_denormal(False)  # a run flushes denormals for its whole process


def trained(run):
    """The parameters with a gradient."""
    return [p for p in run.updater.model.parameters() if p.requires_grad]


def captured(run, device, shapes=None, run_pass=None):
    """`capture` of a run, with its shapes or these."""
    updater = run.updater
    parameters = trained(run)
    observed = device.observed(run_pass or updater.run_pass, lambda: [p.grad for p in parameters])
    rows = updater.model.shared.weight.shape[0]
    shapes = run.batches.shapes if shapes is None else shapes
    begin_update = updater.buffers.begin_update
    return capture(observed, shapes, rows, parameters, begin_update, lambda: seed_dropout(updater.seed, 0, 0))


def train(run, observe=lambda: None):
    """Losses, gradient norms and final weights of a few updates."""
    results = []
    for update in range(UPDATES):
        result = run.updater(run.batches.at(update), update, LEARNING_RATE, lambda: False)
        assert result.applied
        results.append((result.nll_sum, result.gradient_norm))
        observe()
    return results, [p.detach().clone() for p in run.updater.model.parameters()]


def test_replayed_updates_are_eager_ones_bit_for_bit(new_run, device, monkeypatch):
    """Dropout, several micro-batches of several shapes an update, and weights that change after the capture."""
    eager, run = new_run(), new_run()
    expected, expected_weights = train(eager)
    run.updater.graphs, why_not = captured(run, device)
    assert why_not == "" and run.updater.graphs is not None
    assert all(not p.grad.any() for p in trained(run))
    monkeypatch.setattr(run.updater, "run_pass", None)  # all shapes are captured
    found, weights = train(run)
    assert found == expected
    assert all(torch.equal(a, b) for a, b in zip(weights, expected_weights, strict=True))
    assert len({m.shape for update in range(UPDATES) for m in run.batches.at(update)}) > 1


def test_gradients_stay_where_the_graphs_add_to_them(new_run, device):
    """Through the capture and the steps of the optimizer, which sets them to None."""
    run = new_run()
    run.updater.buffers.begin_update()
    before = [p.grad.data_ptr() for p in trained(run)]
    run.updater.graphs, _ = captured(run, device, shapes=run.batches.shapes[:2])
    addresses = []

    def observe():
        assert all(p.grad is None for p in trained(run))
        run.updater.buffers.begin_update()
        addresses.append([p.grad.data_ptr() for p in trained(run)])

    train(run, observe)
    assert addresses == [before] * UPDATES


def test_a_shape_without_a_graph_runs_eagerly(new_run, device):
    """The results are the same whichever shapes are captured."""
    eager, run = new_run(), new_run()
    run.updater.graphs, _ = captured(run, device, shapes=run.batches.shapes[:1])
    eagerly, run_pass = [], run.updater.run_pass
    run.updater.run_pass = lambda given, divisor: eagerly.append(given.shape) or run_pass(given, divisor)
    assert train(run)[0] == train(eager)[0]
    assert eagerly and run.batches.shapes[0] not in eagerly


def test_a_failed_capture_names_its_cause_and_the_run_goes_on(new_run, device):
    """The end of the capture fails too, and leaves stream and generator unusable."""
    eager, run = new_run(), new_run()
    run_pass = run.updater.run_pass

    def fails_in_a_capture(given, divisor):
        if device.graph is not None:
            device.error_at_end = "operation failed due to a previous error during capture"
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return run_pass(given, divisor)

    graphs, why_not = captured(run, device, shapes=run.batches.shapes[:1], run_pass=fails_in_a_capture)
    assert (graphs, why_not) == (None, "operation not permitted when stream is capturing")
    assert (device.stream, device.generator) == ("main", "before")
    assert train(run)[0] == train(eager)[0]


def test_a_graph_that_computes_something_else_is_refused(new_run, device):
    """The gradient of a replay is 5 % larger."""
    run = new_run()
    run_pass, parameters, calls = run.updater.run_pass, trained(run), []

    def drifts(given, divisor):
        calls.append(given.shape)
        result = run_pass(given, divisor)
        if calls.count(given.shape) > 3:  # two eager passes and the capture
            for parameter in parameters:
                parameter.grad *= 1.05
        return result

    graphs, why_not = captured(run, device, shapes=run.batches.shapes[:1], run_pass=drifts)
    assert graphs is None and "differs from an eager one by 5.0e-02" in why_not
    assert all(not p.grad.any() for p in parameters)


def test_a_value_that_is_read_on_the_host_is_found_before_a_capture(new_run, device):
    """torch raises at it in its debug mode, which is off again afterwards."""
    run = new_run()
    run_pass, in_capture = run.updater.run_pass, []

    def reads(given, divisor):
        in_capture.append(device.graph is not None)
        if device.modes[-1:] == ["error"]:
            raise RuntimeError("called a synchronizing CUDA operation")
        return run_pass(given, divisor)

    assert captured(run, device, shapes=run.batches.shapes[:1], run_pass=reads) == (
        None,
        "called a synchronizing CUDA operation",
    )
    assert not any(in_capture) and device.modes == ["error", 0]


def test_a_gpu_that_is_lost_in_a_capture_ends_the_run_with_advice(new_run, device):
    """No eager pass works any more."""
    run = new_run()
    run_pass = run.updater.run_pass

    def breaks(given, divisor):
        device.broken = device.broken or device.graph is not None
        if device.broken:
            raise RuntimeError("an illegal memory access was encountered")
        return run_pass(given, divisor)

    with pytest.raises(DeviceLost, match="--hardware.graphs false"):
        captured(run, device, shapes=run.batches.shapes[:1], run_pass=breaks)


def test_out_of_memory_frees_the_graphs_first(new_run, device, monkeypatch):
    """Their memory is of no use for the smaller micro-batches of the repeated update."""
    run = new_run()
    run.updater.graphs, _ = captured(run, device, shapes=run.batches.shapes[:1])
    run.memory_guard.conditions["graphs"] = True
    accumulate, graphs = run.updater.accumulate, []

    def lacks_memory_once(*arguments):
        graphs.append(run.updater.graphs)
        if len(graphs) == 1:
            raise MemoryError
        return accumulate(*arguments)

    monkeypatch.setattr(run.updater, "accumulate", lacks_memory_once)
    result = run.memory_guard(run.batches.at(0), run.state, LEARNING_RATE, SimpleNamespace(requested=False))
    assert result.applied and graphs[0] is not None and not any(graphs[1:])
    assert run.saver.conditions["graphs"] is False


def test_offsets_are_relative_to_the_whole_gradient():
    """A parameter with a gradient of nearly zero may differ by much of it; a value that is not finite never passes."""
    assert largest_offset([2.0, 3.0, 4.0, 1e-9], [2.0, 3.0, 4.0, 3e-9]) < 1e-8
    assert largest_offset([2.0, 3.3, 4.0], [2.0, 3.0, 4.0]) == pytest.approx(0.06)
    assert largest_offset([2.2, 3.0, 4.0], [2.0, 3.0, 4.0]) == pytest.approx(0.1)
    assert not largest_offset([2.0, float("nan"), 4.0], [2.0, 3.0, 4.0]) <= 1


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 8), (2, 8, 1)])
def test_the_example_has_valid_ids_and_labels(shape):
    """For a vocabulary that is smaller than the input."""
    source, segments, labels, target_segments = example_input(shape, 11, torch.device("cpu")).tensors()
    assert source.shape == segments.shape == shape[:2] and labels.shape == target_segments.shape == (shape[0], shape[2])
    assert source.min() >= 0 and source.max() < 11 and labels.max() < 11
    assert torch.equal(labels >= 0, target_segments > 0) and bool((labels >= 0).any())
