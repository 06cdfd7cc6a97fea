"""Evaluation: loss and term restoration on fixed examples with fixed corruption.

A pure reader (law 4 of the design): no global random state is drawn from, the model's mode comes back as it was, and
nothing of the run moves. What is cut short by a stop request is dropped whole and done again later.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator

from resilient_t5.data.batches import EvaluationBatch
from resilient_t5.model.loss import ExampleNll, token_nll
from resilient_t5.model.tables import T5Model
from resilient_t5.restoration.measure import Restorer, measure_restoration
from resilient_t5.restoration.report import RestorationReport


@dataclass(frozen=True)
class Evaluation:
    """Loss over the fixed examples, in nats per target token; pads are not counted."""

    loss: float
    loss_se: float
    """Standard error of `loss` over examples."""
    token_accuracy: float
    """Share of target tokens that are the argmax under teacher forcing."""
    target_tokens: int
    loss_terms: float | None
    """The loss over the tokens of masked terms alone; None where there is none."""
    loss_rest: float | None
    """The loss over all other tokens: sentinels, random spans, end marks."""
    term_token_accuracy: float | None
    """As `token_accuracy`, over the tokens of masked terms."""
    term_tokens: int


@dataclass(frozen=True)
class Evaluator:
    """The fixed examples and what is needed to score them; built once."""

    accelerator: Accelerator
    model: T5Model
    loss_batches: Sequence[EvaluationBatch]
    restore_batches: Sequence[EvaluationBatch]
    restorer: Restorer


def evaluate(evaluator: Evaluator, interrupted: Callable[[], bool]) -> Evaluation | None:
    """The loss of the model as it stands; None when `interrupted` between two batches."""
    found: list[ExampleNll] = []
    with _reading(evaluator):
        for batch in evaluator.loss_batches:
            if interrupted():
                return None
            micro_batch, device = batch.micro_batch, evaluator.accelerator.device
            nll = token_nll(
                evaluator.model,
                micro_batch.source_BS.to(device),
                micro_batch.source_mask_BS.to(device),
                micro_batch.labels_BT.to(device),
                part_BT=batch.of_terms_BT.to(device),
            )
            found.append(nll)
    return summarise(_sums(found), _sums([nll.part for nll in found if nll.part is not None]))


def restore_terms(evaluator: Evaluator, interrupted: Callable[[], bool]) -> RestorationReport | None:
    """Restore the fixed examples by greedy generation and score them; None when `interrupted` between two tokens."""
    with _reading(evaluator):
        batches = [(batch.micro_batch, batch.corrupted) for batch in evaluator.restore_batches]
        return measure_restoration(evaluator.model, batches, evaluator.restorer, interrupted)


@dataclass(frozen=True)
class ExampleSums:
    """Sums over the target tokens of each of E examples."""

    nll_E: np.ndarray
    tokens_E: np.ndarray
    correct_E: np.ndarray

    def totals(self) -> tuple[float, int, int]:
        """nll, tokens and correct tokens of all examples."""
        return float(self.nll_E.sum()), int(self.tokens_E.sum()), int(self.correct_E.sum())


def _sums(found: Sequence[ExampleNll]) -> ExampleSums:
    return ExampleSums(
        np.concatenate([nll.nll_sum_B.double().cpu().numpy() for nll in found]),
        np.concatenate([nll.tokens_B.cpu().numpy() for nll in found]),
        np.concatenate([nll.correct_B.cpu().numpy() for nll in found]),
    )


def summarise(all_tokens: ExampleSums, of_terms: ExampleSums) -> Evaluation:
    """Token-weighted losses of E examples, and the standard error of the whole (that of a ratio of sums, by linearisation)."""
    nll_sum_E, tokens_E = all_tokens.nll_E, all_tokens.tokens_E
    nll_sum, total, correct = all_tokens.totals()
    term_nll_sum, terms, terms_correct = of_terms.totals()
    loss = nll_sum / total
    spread = float(np.square(nll_sum_E - loss * tokens_E).sum())
    count = len(tokens_E)
    loss_se = math.sqrt(spread * count / (count - 1)) / total if count > 1 else math.inf
    return Evaluation(
        loss,
        loss_se,
        token_accuracy=correct / total,
        target_tokens=total,
        loss_terms=term_nll_sum / terms if terms else None,
        loss_rest=(nll_sum - term_nll_sum) / (total - terms) if total > terms else None,
        term_token_accuracy=terms_correct / terms if terms else None,
        term_tokens=terms,
    )


@contextmanager
def _reading(evaluator: Evaluator) -> Iterator[None]:
    """Evaluation mode, no gradients, the training precision; the mode comes back at the end."""
    was_training = evaluator.model.training
    evaluator.model.eval()
    try:
        with torch.no_grad(), evaluator.accelerator.autocast():
            yield
    finally:
        evaluator.model.train(was_training)
