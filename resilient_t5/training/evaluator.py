"""Evaluation: loss and term restoration on fixed examples with fixed corruption.

A pure reader (law 4 of the design): no global random state is drawn from, the model's mode comes back as it was, and
nothing of the run moves. What is cut short by a stop request is dropped whole and done again later. With several processes
each takes its share of the batches and all get the figures of one: every example is computed once and keeps its place.
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
from resilient_t5.model.loss import ExampleNll, token_nll
from resilient_t5.restoration.scoring.measure import Restorer, longest_answer, score_generated, write_answers
from resilient_t5.restoration.scoring.score_report import RestorationReport
from resilient_t5.training.hardware.process_group import SINGLE_PROCESS, ProcessGroup, weights_checksum
from resilient_t5.training.hardware.sharding import ShardedModel


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
    layers: ShardedModel
    loss_batches: Sequence[EvaluationBatch]
    restore_batches: Sequence[EvaluationBatch]
    restorer: Restorer
    ranks: ProcessGroup = SINGLE_PROCESS

    @property
    def model(self) -> T5Model:
        """The model that is scored."""
        return self.layers.model


def evaluate(evaluator: Evaluator, interrupted: Callable[[], bool]) -> Evaluation | None:
    """The loss of the model as it stands; None when `interrupted` between two batches."""
    batches, ranks, halted = evaluator.loss_batches, evaluator.ranks, False
    ends = np.cumsum([len(batch.example_ids) for batch in batches])
    # nll, tokens and correct tokens of each example, then those of its terms. Whole numbers below 2**53 are exact in
    # float64, and so is a sum with zeros.
    sums_6E = torch.zeros(6, int(ends[-1]), dtype=torch.float64)
    with _reading(evaluator):
        for number in ranks.partition([batch.micro_batch.padded_tokens for batch in batches])[ranks.index]:
            if halted := interrupted():
                break
            micro_batch, device = batches[number].micro_batch, evaluator.accelerator.device
            found = token_nll(
                evaluator.model,
                micro_batch.source_BS.to(device),
                micro_batch.source_mask_BS.to(device),
                micro_batch.labels_BT.to(device),
                part_BT=batches[number].of_terms_BT.to(device),
            )
            assert found.part is not None  # the part was asked for
            own_6B = sums_6E[:, ends[number] - len(found.tokens_B) : ends[number]]
            for row, values_B in enumerate((*_values(found), *_values(found.part))):
                own_6B[row] = values_B
    if not _complete(evaluator, "evaluation", halted):
        return None
    ranks.all_reduce([sums_6E])
    return summarise(ExampleSums(*sums_6E[:3].numpy()), ExampleSums(*sums_6E[3:].numpy()))


def _values(found: ExampleNll) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return found.nll_sum_B, found.tokens_B, found.correct_B


def restore_terms(evaluator: Evaluator, interrupted: Callable[[], bool]) -> RestorationReport | None:
    """Restore the fixed examples by greedy generation and score them; None when `interrupted` between two tokens."""
    batches, ranks, restorer = evaluator.restore_batches, evaluator.ranks, evaluator.restorer
    shapes = [(len(batch.example_ids), longest_answer(batch.micro_batch, restorer)) for batch in batches]
    ends = np.cumsum([rows * width for rows, width in shapes])
    widths = torch.zeros(len(batches), dtype=torch.int64)
    written = torch.zeros(int(ends[-1]), dtype=torch.int64)
    places = [part.view(shape) for part, shape in zip(written.split([rows * w for rows, w in shapes]), shapes, strict=True)]
    halted = False
    with _reading(evaluator):
        for number in ranks.partition([batch.micro_batch.padded_tokens for batch in batches])[ranks.index]:
            generated_BT = write_answers(evaluator.model, batches[number].micro_batch, restorer, interrupted)
            if halted := generated_BT is None:
                break
            widths[number] = generated_BT.shape[1]
            places[number][:, : generated_BT.shape[1]] = torch.from_numpy(generated_BT)
    if not _complete(evaluator, "restoration", halted):
        return None
    ranks.all_reduce([widths, written])
    answers = [place[:, : int(width)].numpy() for place, width in zip(places, widths, strict=True)]
    return score_generated(
        [(batch.micro_batch.example_ids, batch.corrupted, found) for batch, found in zip(batches, answers, strict=True)],
        restorer,
    )


def _complete(evaluator: Evaluator, place: str, halted: bool) -> bool:
    """Whether no process was interrupted in its share.

    Raises:
        Diverged: the weights of two processes differ.
    """
    ranks = evaluator.ranks
    if ranks.count == 1:
        return not halted
    notes = ranks.all_gather_object(place, {"halted": halted, "weights": weights_checksum(evaluator.model)})
    if len({told["weights"] for told in notes}) > 1:
        raise Diverged(
            "the weights of the processes are no longer equal, so what was trained since the last evaluation is worthless",
            hint="Use cards of one kind with one driver, or hardware.deterministic, and go on from an older one by run.resume",
        )
    return not any(told["halted"] for told in notes)


@dataclass(frozen=True)
class ExampleSums:
    """Sums over the target tokens of each of E examples."""

    nll_E: np.ndarray
    tokens_E: np.ndarray
    correct_E: np.ndarray

    def totals(self) -> tuple[float, int, int]:
        """nll, tokens and correct tokens of all examples."""
        return float(self.nll_E.sum()), int(self.tokens_E.sum()), int(self.correct_E.sum())


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
    """Whole layers, evaluation mode, no gradients, the training precision; the mode comes back at the end."""
    was_training = evaluator.model.training
    evaluator.model.eval()
    try:
        with evaluator.layers.unsharded(), torch.no_grad(), evaluator.accelerator.autocast():
            yield
    finally:
        evaluator.model.train(was_training)
