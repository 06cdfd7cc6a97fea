"""Whether a run packs its rows, and what it says about it. Run: python -m pytest tests/training/test_packed_run.py"""

import dataclasses

import numpy as np
import pytest
import torch

from resilient_t5.config.parse import parse_config
from resilient_t5.data.batches import IGNORED, Batches
from resilient_t5.data.corruption.gap_encoding import GapEncoding
from resilient_t5.data.dataset import Dataset
from resilient_t5.data.store.prepare import prepare
from resilient_t5.model.precision import Precision
from resilient_t5.training.build import packing_of, plan_batches
from resilient_t5.training.hardware.memory_fit import task_of
from resilient_t5.training.reports.preview import banner_lines, preview_over

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ROOM = ("--hardware.memory_gib", "4")
WHOLE = ("--optim.name", "adafactor_in_backward", "--optim.clip_norm", "0", "--batch.micro_tokens", "auto")
WHOLE += ("--batch.groups_per_update", "1")


def settings(tiny_config, *argv):
    """The tiny run's configuration with these options."""
    return parse_config(["--config", str(tiny_config), *ROOM, *argv], "train", "")


@pytest.fixture(scope="module")
def store(tiny_config, tmp_path_factory):
    """The tiny run's prepared corpus."""
    return prepare(settings(tiny_config), tmp_path_factory.mktemp("store") / "store")


def batches_on(device, tiny_config, store, *argv):
    """The batches of a run on this device; nothing is computed there."""
    config = settings(tiny_config, *argv)
    return plan_batches(config, Dataset.over(store, config), device, Precision("fp32", ""))[2]


def test_rows_are_packed_on_a_gpu_or_where_asked(tiny_config, store):
    """`auto` packs on a GPU only, and an optimizer that takes an update in one micro-batch never gets packed rows."""
    for device, argv, is_packed in (
        (CPU, (), False),
        (GPU, (), True),
        (CPU, ("--batch.pack", "true"), True),
        (GPU, ("--batch.pack", "false"), False),
        (GPU, WHOLE, False),
        (CPU, (*WHOLE, "--batch.pack", "true"), False),
    ):
        batches = batches_on(device, tiny_config, store, *argv)
        assert bool(batches.shapes) == is_packed
        assert (batches.at(0)[0].target_segments_BT is not None) == is_packed


def test_three_epochs_of_a_store_fit_into_the_shapes(tiny_config, store):
    """With the planned bounds of lengths; every update has the same examples and target tokens as it has unpacked."""
    packed, plain = (batches_on(GPU, tiny_config, store, "--batch.pack", pack) for pack in ("true", "false"))
    shapes = set(packed.shapes)
    for update in range(int(3 * packed.updates_per_epoch)):
        found = packed.at(update)
        assert {m.shape for m in found} <= shapes
        ids, others = (sorted(int(id_) for m in ms for id_ in m.example_ids) for ms in (found, plain.at(update)))
        assert ids == others
        labels = [
            np.sort(np.concatenate([m.labels_BT[m.labels_BT != IGNORED] for m in ms])) for ms in (found, plain.at(update))
        ]
        assert np.array_equal(*labels)


def test_an_update_has_a_micro_batch_for_each_process(tiny_config, store):
    """The number of processes is the least number of micro-batches."""
    config = settings(tiny_config, "--batch.pack", "true")
    corpus = Dataset.over(store, config)
    packing = packing_of(config, CPU, corpus, task_of(config, store), processes=3)
    batches = Batches(corpus.train, corpus.table, config, seed=1, micro_tokens=4096, pad_multiple=8, packing=packing)
    assert all(len(batches.at(update)) >= 3 for update in range(6))


def test_where_gaps_lengthen_sources_the_setting_bounds_them(tiny_config, store):
    """The rest of a word after a gap may be divided into more pieces than the text had."""
    config = settings(tiny_config, "--batch.pack", "true")
    corpus, task = Dataset.over(store, config), dataclasses.replace(task_of(config, store), source_tokens=50)
    none, some = np.zeros(corpus.table.size, bool), np.ones(corpus.table.size, bool)
    for starts_word, bound in ((none, 50), (some, config.data.max_source_tokens)):
        gaps = GapEncoding(none, none, none, starts_word, corpus.active_to_full, corpus.active_to_full, store.tokenizer)
        of_tokenizer = dataclasses.replace(corpus, table=dataclasses.replace(corpus.table, gap_encoding=gaps))
        assert packing_of(config, CPU, of_tokenizer, task).longest == (bound, task.target_tokens)


def test_the_banner_says_how_rows_are_packed(tiny_config, store):
    """The number of shapes and their lengths; why not, where it was asked for in vain; nothing otherwise."""

    def line(*argv):
        lines = banner_lines(preview_over(settings(tiny_config, *argv), store), {}, None)
        return [line for line in lines if line.startswith("rows")]

    shapes = batches_on(CPU, tiny_config, store, "--batch.pack", "true").shapes
    (packed,) = line("--batch.pack", "true")
    assert f"{len(shapes)} shapes of {shapes[0][0]} rows" in packed
    assert f"from {shapes[0][1]} + {shapes[0][2]} to {shapes[-1][1]} + {shapes[-1][2]} tokens" in packed
    assert line() == []
    (refused,) = line(*WHOLE, "--batch.pack", "true")
    assert "not packed: adafactor_in_backward" in refused
