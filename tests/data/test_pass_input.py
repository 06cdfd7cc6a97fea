"""Micro-batches as one tensor. Run: python -m pytest tests/data/test_pass_input.py"""

import pytest
import torch

from resilient_t5.data.pass_input import IGNORED, CopyAhead, PassInput

SOURCE, SEGMENTS = torch.tensor([[5, 6, 1], [7, 1, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
LABELS = torch.tensor([[8, 1], [1, IGNORED]])


def test_the_tensors_are_those_of_the_micro_batch():
    """In int32; without segments every label that is not padding belongs to the one example of its row."""
    given = PassInput.of(SOURCE, SEGMENTS, LABELS, None)
    assert given.shape == (2, 3, 2) and given.flat.dtype == torch.int32
    source, segments, labels, target_segments = given.tensors()
    assert torch.equal(source, SOURCE.int()) and torch.equal(segments, SEGMENTS.int())
    assert torch.equal(labels, LABELS.int())
    assert torch.equal(target_segments, torch.tensor([[1, 1], [1, 0]], dtype=torch.int32))


def test_a_reader_thread_without_gpu_memory_copies_nothing(monkeypatch):
    """The run goes on, and the update copies the micro-batch itself; any other error is raised."""
    failure = torch.OutOfMemoryError("CUDA out of memory")

    def fail(*_):
        raise failure

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", fail)
    copy_ahead, given = CopyAhead(torch.device("cuda")), PassInput.of(SOURCE, SEGMENTS, LABELS, None)
    assert copy_ahead(given) is None
    failure = RuntimeError("an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal"):
        copy_ahead(given)
