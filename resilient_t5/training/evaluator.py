"""Evaluation: loss and term restoration on fixed examples with fixed corruption.

Evaluation changes nothing: it uses no global random state and restores the model's mode. An interrupted evaluation is
dropped and repeated later. With several ranks each computes its share of the batches, and all get the same results as one.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator

from resilient_t5.data.batches import EvaluationBatch
from resilient_t5.errors import Diverged
from resilient_t5.model.embeddings import T5Model
from resilient_t5.model.loss import token_nll
from resilient_t5.restoration.scoring.measure import RestorationReport, Restorer, longest_answer, score_generated, write_answers
from resilient_t5.training.hardware.process_group import SINGLE_PROCESS, ProcessGroup, weights_checksum
from resilient_t5.training.hardware.sharding import ShardedModel


@dataclass(frozen=True)
class Evaluation:
    """Results of one evaluation; losses in nats per target token, without padding."""

    loss: float
    loss_se: float
    """Standard error of `loss` over examples."""
    token_accuracy: float
    """Share of target tokens that are the argmax under teacher forcing."""
    target_tokens: int
    loss_terms: float | None
    """Loss over the tokens of masked terms; None if there are none."""
    loss_rest: float | None
    """Loss over all other tokens: sentinels, random spans, end tokens."""
    term_token_accuracy: float | None
    """`token_accuracy` over the tokens of masked terms."""
    term_tokens: int


@dataclass(frozen=True)
class Evaluator:
    """The fixed examples, and the parts that score them."""

    accelerator: Accelerator
    sharded: ShardedModel
    loss_batches: Sequence[EvaluationBatch]
    restore_batches: Sequence[EvaluationBatch]
    restorer: Restorer
    restore_every: int
    """Evaluations from one restoration to the next; 0 restores in the first evaluation only."""
    group: ProcessGroup = SINGLE_PROCESS

    @property
    def model(self) -> T5Model:
        """The evaluated model."""
        return self.sharded.model

    def restoration_due(self, evaluations: int) -> bool:
        """Return whether the evaluation after `evaluations` earlier ones also restores terms; the first one does."""
        if not self.restore_batches:
            return False
        return evaluations == 0 or (self.restore_every > 0 and evaluations % self.restore_every == 0)


def evaluate(evaluator: Evaluator, interrupted: Callable[[], bool]) -> Evaluation | None:
    """Compute the loss of the current weights; None if `interrupted` between two batches."""
    batches, group, halted = evaluator.loss_batches, evaluator.group, False
    ends = np.cumsum([len(batch.micro_batch.example_ids) for batch in batches])
    # nll, tokens and correct tokens per example, then the same for its terms. Counts are exact in float64, and the
    # all-reduce only adds zeros.
    sums_6E = torch.zeros(6, int(ends[-1]), dtype=torch.float64)
    with _reading(evaluator):
        for number in group.partition([batch.micro_batch.padded_tokens for batch in batches])[group.index]:
            if halted := interrupted():
                break
            micro_batch, device = batches[number].micro_batch, evaluator.accelerator.device
            scores = token_nll(
                evaluator.model,
                micro_batch.source_BS.to(device),
                micro_batch.source_mask_BS.to(device),
                micro_batch.labels_BT.to(device),
                part_BT=batches[number].of_terms_BT.to(device),
            )
            assert scores.part is not None  # part_BT was given
            first, end = ends[number] - len(scores.tokens_B), ends[number]
            for row, part in ((0, scores), (3, scores.part)):
                for offset, values_B in enumerate((part.nll_sum_B, part.tokens_B, part.correct_B)):
                    sums_6E[row + offset, first:end] = values_B
    if not _complete(evaluator, "evaluation", halted):
        return None
    group.all_reduce([sums_6E])
    return summarise(ExampleSums(*sums_6E[:3].numpy()), ExampleSums(*sums_6E[3:].numpy()))


def restore_terms(evaluator: Evaluator, interrupted: Callable[[], bool]) -> RestorationReport | None:
    """Restore the fixed examples by greedy generation and score them; None if `interrupted` between two tokens."""
    batches, group, restorer = evaluator.restore_batches, evaluator.group, evaluator.restorer
    shapes = [(len(batch.micro_batch.example_ids), longest_answer(batch.micro_batch, restorer)) for batch in batches]
    ends = np.cumsum([rows * width for rows, width in shapes])
    widths = torch.zeros(len(batches), dtype=torch.int64)
    written = torch.zeros(int(ends[-1]), dtype=torch.int64)
    places = [part.view(shape) for part, shape in zip(written.split([rows * w for rows, w in shapes]), shapes, strict=True)]
    halted = False
    with _reading(evaluator):
        for number in group.partition([batch.micro_batch.padded_tokens for batch in batches])[group.index]:
            generated_BT = write_answers(evaluator.model, batches[number].micro_batch, restorer, interrupted)
            if halted := generated_BT is None:
                break
            widths[number] = generated_BT.shape[1]
            places[number][:, : generated_BT.shape[1]] = torch.from_numpy(generated_BT)
    if not _complete(evaluator, "restoration", halted):
        return None
    group.all_reduce([widths, written])
    answers = [place[:, : int(width)].numpy() for place, width in zip(places, widths, strict=True)]
    return score_generated(
        [(batch.micro_batch.example_ids, batch.corrupted, ids) for batch, ids in zip(batches, answers, strict=True)],
        restorer,
    )


def _complete(evaluator: Evaluator, place: str, halted: bool) -> bool:
    """Return whether no rank was interrupted.

    Raises:
        Diverged: the weights of two ranks differ.
    """
    group = evaluator.group
    if group.count == 1:
        return not halted
    notes = group.all_gather_object(place, {"halted": halted, "weights": weights_checksum(evaluator.model)})
    if len({note["weights"] for note in notes}) > 1:
        raise Diverged(
            "the weights of the processes differ, so the training since the last evaluation is invalid",
            hint="Use GPUs of one model with one driver, or hardware.deterministic, and resume from an older checkpoint",
        )
    return not any(note["halted"] for note in notes)


@dataclass(frozen=True)
class ExampleSums:
    """Sums over the target tokens of each of E examples."""

    nll_E: np.ndarray
    tokens_E: np.ndarray
    correct_E: np.ndarray

    def totals(self) -> tuple[float, int, int]:
        """Return nll, tokens and correct tokens of all examples."""
        return float(self.nll_E.sum()), int(self.tokens_E.sum()), int(self.correct_E.sum())


def summarise(all_tokens: ExampleSums, of_terms: ExampleSums) -> Evaluation:
    """Compute token-weighted losses of E examples; the standard error is that of a ratio of sums, by linearisation."""
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
    """Gather sharded layers, disable gradients, use evaluation mode and the training precision; restore the mode at the end."""
    was_training = evaluator.model.training
    evaluator.model.eval()
    try:
        with evaluator.sharded.unsharded(), torch.no_grad(), evaluator.accelerator.autocast():
            yield
    finally:
        evaluator.model.train(was_training)
