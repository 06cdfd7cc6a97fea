"""Random states come back exactly, through a checkpoint on disk.

python -m pytest tests/checkpoint/test_rng.py
"""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from resilient_t5.checkpoint import rng
from resilient_t5.errors import ResumeMismatch
from tests.checkpoint.harness import make_manager, make_parts


@pytest.fixture(autouse=True)
def restored_streams():
    """These tests must not change what other tests draw."""
    tensors, rest = rng.capture()
    yield
    rng.restore(tensors, rest)


def draw():
    """Some of everything, with halves of pairs left pending."""
    return (
        [random.random() for _ in range(3)],
        random.gauss(0, 1),
        np.random.rand(3).tolist(),
        np.random.randn(1).tolist(),
        torch.rand(3).tolist(),
        torch.randn(3).tolist(),
    )


@pytest.mark.parametrize("draws_before", [0, 1, 2, 7])
def test_the_draws_after_a_resume_are_the_draws_without_one(scratch, draws_before):
    """Also in the middle of a pair of normal draws, where a seed alone would not do."""
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    for _ in range(draws_before):
        random.gauss(0, 1), np.random.randn(1), torch.randn(1)
    tensors, rest = rng.capture()
    manager = make_manager(scratch)
    manager.save(replace(make_parts(1), tensors={"rng": tensors}, state={"rng": rest}), best=False)
    expected = [draw() for _ in range(3)]
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    loaded = make_manager(scratch).load_newest()
    rng.restore(loaded.tensors["rng"], loaded.state["rng"])
    assert [draw() for _ in range(3)] == expected


def test_to_capture_changes_nothing():
    """Two captures in a row are equal, and so are the draws."""
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    one, rest = rng.capture()
    two, again = rng.capture()
    assert rest == again and all(torch.equal(one[name], two[name]) for name in one)
    assert draw() == expected


@pytest.mark.parametrize("name", ["python", "numpy", "torch"])
@pytest.mark.parametrize("damage", ["missing", "short", "kind"])
def test_a_state_that_does_not_fit_is_refused_by_name_of_the_problem(name, damage):
    """Exit 78: another version of a library, never a silent fresh seed."""
    tensors, rest = rng.capture()
    if damage == "missing":
        del tensors[name]
    elif damage == "short":
        tensors[name] = tensors[name][:-1]
    else:
        tensors[name] = tensors[name].to(torch.float64)[:5]
    with pytest.raises(ResumeMismatch, match="random state"):
        rng.restore(tensors, rest)


def test_a_device_that_is_missing_here_is_named():
    """A run of two devices that resumes on one is not bitwise the same, and the missing state is reported."""
    tensors, rest = rng.capture()
    assert rng.restore(tensors, rest) == []
    tensors["cuda:7"] = torch.zeros(16, dtype=torch.uint8)
    assert rng.restore(tensors, rest) == ["cuda:7"]


@pytest.mark.gpu
def test_the_draws_of_a_device_come_back():
    """Each device has its own stream."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.cuda.manual_seed_all(5)
    torch.rand(3, device="cuda")
    tensors, rest = rng.capture()
    expected = torch.rand(5, device="cuda")
    torch.cuda.manual_seed_all(6)
    assert rng.restore(tensors, rest) == []
    assert torch.equal(torch.rand(5, device="cuda"), expected)
