"""Several processes train one run with cut layers. Run: python -m pytest tests/resume/test_sharded.py"""

import json
import signal

import pytest

from tests.resume.harness import Arena, differences, newest_checkpoint, whole_rows
from tests.resume.several import console, run_together, start_together, summary, wait_for_both
from tests.resume.test_several import UPDATES, assert_close, order

CUT = (*UPDATES, "--hardware.shard_layers", "true")


@pytest.fixture(scope="module")
def arena(fork_server, tmp_path_factory):
    """A folder with a store and the run of one process over 20 updates, dropout and several micro-batches included."""
    arena = Arena(fork_server, tmp_path_factory.mktemp("sharded"))
    arena.finish("alone", *UPDATES)
    return arena


@pytest.fixture(scope="module")
def two(arena):
    """The same run on two processes that hold half of the layers each."""
    assert run_together(arena, "two", 2, *CUT) == [0, 0], console(arena, "two")
    return arena.folder / "two"


def test_two_processes_with_cut_layers_give_the_losses_of_one(arena, two):
    """Twenty updates: losses and gradient norms to 1e-6, the same examples, and evaluations with the same answers."""
    assert_close(two, arena.folder / "alone")
