"""Evaluation has no side effects. Run: python -m pytest tests/training/test_evaluator.py"""

import dataclasses
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from resilient_t5.checkpoint.manager import CheckpointManager
from resilient_t5.config.parse import parse_config
from resilient_t5.data.store.prepare import prepare
from resilient_t5.training.build import build_run
from resilient_t5.training.evaluator import ExampleSums, evaluate, restore_terms, summarise
from resilient_t5.training.saver import model_tensors
from resilient_t5.training.telemetry.console import Console
from resilient_t5.training.telemetry.run_log import RunLog


@pytest.fixture(scope="module")
def run(tiny_config, tmp_path_factory):
    """A tiny run at update 0."""
    directory = tmp_path_factory.mktemp("evaluate") / "run"
    directory.mkdir()
    config = parse_config(["--config", str(tiny_config), "--run.dir", str(directory)], "train", "test")
    log = RunLog(Console("quiet", None), directory)
    manager = CheckpointManager(directory, run_id="0" * 32, settings=config.checkpoint, audit=log.checkpoint_event)
    store = prepare(config, directory / "store")
    run = build_run(config, store, manager, None, log)
    yield run
    run.prefetcher.close()
    run.log.close()
    torch.set_flush_denormal(False)  # a run flushes denormals for its whole process; other tests here need them


def random_states():
    """Python's, numpy's and torch's global streams."""
    return random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()


@pytest.mark.parametrize("measure", [evaluate, restore_terms])
def test_evaluation_is_a_pure_reader(run, measure):
    """No random state and no weight changes, the mode is restored, and a second evaluation gives the same results."""
    before, weights = random_states(), {name: tensor.clone() for name, tensor in model_tensors(run.updater.model).items()}
    first, second = measure(run.evaluator, lambda: False), measure(run.evaluator, lambda: False)
    assert random_states() == before
    assert run.updater.model.training
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model_tensors(run.updater.model).items())
    numbers = [value.as_row() if hasattr(value, "as_row") else dataclasses.asdict(value) for value in (first, second)]
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize("measure", [evaluate, restore_terms])
def test_a_stop_request_drops_the_evaluation_whole(run, measure):
    """No partial result is returned, and the model is in training mode again."""
    assert measure(run.evaluator, lambda: True) is None
    assert run.updater.model.training


def test_the_loss_is_that_of_transformers(run):
    """Summed over the fixed examples and divided by their tokens, as the plain model computes it."""
    model, nll, tokens = run.updater.model, 0.0, 0
    model.eval()
    for batch in run.evaluator.loss_batches:
        micro = batch.micro_batch
        with torch.no_grad():
            out = model(input_ids=micro.source_BS, attention_mask=micro.source_mask_BS, labels=micro.labels_BT)
        nll, tokens = nll + float(out.loss) * micro.target_tokens, tokens + micro.target_tokens
    model.train()
    found = evaluate(run.evaluator, lambda: False)
    assert found.target_tokens == tokens
    assert found.loss == pytest.approx(nll / tokens, rel=1e-5)


def test_the_loss_of_terms_is_that_of_their_labels_alone(run):
    """With every other label hidden, transformers gives `loss_terms`; with those hidden, `loss_rest`; the right ones agree."""
    model, sums, right = run.updater.model, {True: [0.0, 0], False: [0.0, 0]}, 0
    model.eval()
    for batch in run.evaluator.loss_batches:
        micro, of_terms_BT = batch.micro_batch, batch.of_terms_BT
        with torch.no_grad():
            logits_BTV = model(
                input_ids=micro.source_BS, attention_mask=micro.source_mask_BS, labels=micro.labels_BT
            ).logits.float()
        for terms, total in sums.items():
            kept_BT = (micro.labels_BT != -100) & (of_terms_BT == terms)
            labels_BT = micro.labels_BT.where(kept_BT, -100)
            total[0] += float(torch.nn.functional.cross_entropy(logits_BTV.transpose(1, 2), labels_BT, reduction="sum"))
            total[1] += int(kept_BT.sum())
        right += int(((logits_BTV.argmax(-1) == micro.labels_BT) & of_terms_BT).sum())
    model.train()
    found = evaluate(run.evaluator, lambda: False)
    assert 0 < found.term_tokens == sums[True][1] < found.target_tokens
    assert found.loss_terms == pytest.approx(sums[True][0] / sums[True][1], rel=1e-5)
    assert found.loss_rest == pytest.approx(sums[False][0] / sums[False][1], rel=1e-5)
    assert found.term_token_accuracy == right / found.term_tokens


def test_the_standard_error_is_that_of_a_ratio():
    """Against a bootstrap over examples."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(5, 50, 400)
    nll = tokens * generator.gamma(4.0, 0.5, 400)
    nothing = ExampleSums(np.zeros(1), np.zeros(1, int), np.zeros(1, int))
    found = summarise(ExampleSums(nll, tokens, np.zeros(400, int)), nothing)
    picks = generator.integers(0, 400, (2000, 400))
    resampled = nll[picks].sum(1) / tokens[picks].sum(1)
    assert found.loss == pytest.approx(nll.sum() / tokens.sum())
    assert found.loss_se == pytest.approx(resampled.std(), rel=0.1)
    assert found.loss_terms is found.term_token_accuracy is None and found.loss_rest == found.loss
    assert math.isinf(summarise(ExampleSums(nll[:1], tokens[:1], np.zeros(1, int)), nothing).loss_se)


def test_every_part_of_the_evaluation_set_is_fixed(run, tiny_config, tmp_path: Path):
    """Another process evaluates the same examples with the same masks."""
    again = [batch.micro_batch for batch in run.evaluator.loss_batches]
    config = parse_config(["--config", str(tiny_config), "--run.dir", str(tmp_path)], "train", "test")
    log = RunLog(Console("quiet", None), tmp_path)
    manager = CheckpointManager(tmp_path, run_id="1" * 32, settings=config.checkpoint, audit=log.checkpoint_event)
    store = prepare(config, tmp_path / "store")
    other = build_run(config, store, manager, None, log)
    other.prefetcher.close()
    other.log.close()
    torch.set_flush_denormal(False)
    for one, two in zip(again, [batch.micro_batch for batch in other.evaluator.loss_batches], strict=True):
        assert torch.equal(one.source_BS, two.source_BS)
        assert torch.equal(one.labels_BT, two.labels_BT)
