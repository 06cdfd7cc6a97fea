"""Results of one restoration measurement, as numbers and as sample texts."""

from collections.abc import Sequence
from dataclasses import dataclass

from resilient_t5.restoration.scoring.metrics import (
    Rate,
    SpanOutcome,
    TermOutcome,
    finite_or_none,
    masked_character_error_rate,
    ratio,
    span_match,
    term_restoration,
    term_restoration_by,
    term_restoration_macro,
)
from resilient_t5.restoration.sentinels import ParsedOutput


@dataclass(frozen=True)
class Sample:
    """One restored example as text; gaps and answers in square brackets, `[?]` without an answer."""

    example_id: int
    source: str
    gold: str
    restored: str


@dataclass(frozen=True, eq=False)
class RestorationReport:
    """Restoration results for a fixed set of examples; shares and rates are nan without trials."""

    outcomes: list[TermOutcome]
    spans: list[SpanOutcome]
    outputs: Sequence[ParsedOutput]
    """Parsed output of each example."""
    cer: float
    """Character error rate of the restored texts, edits per clean character."""
    cer_reduction: float
    """1 - CER of the restored over CER of the damaged texts; negative if restoring adds errors."""
    over_edit_share: float
    """Edits outside the damage over the characters there; nan for a model that fills gaps and cannot over-edit."""
    majority: Rate
    """Term restoration rate of the majority guess."""
    copy: Rate
    """Term restoration rate of copying a visible term, by the better of its two rules."""
    samples: tuple[Sample, ...]

    @property
    def term_rate(self) -> float | None:
        """The term restoration rate; None if no term was masked."""
        return finite_or_none(term_restoration(self.outcomes).rate)

    def as_row(self) -> dict[str, float | int | None]:
        """Return the results as JSON numbers; None without trials, and no key for an empty band."""
        exact = term_restoration(self.outcomes)
        by_training = term_restoration_by(self.outcomes, "training")
        by_sentinel = term_restoration_by(self.outcomes, "sentinel")
        numbers: dict[str, float] = {
            "term_rate": exact.rate,
            "term_rate_low": exact.low,
            "term_rate_high": exact.high,
            "term_rate_normalised": term_restoration(self.outcomes, "normalised").rate,
            "term_rate_near": term_restoration(self.outcomes, "near").rate,
            "term_rate_macro": term_restoration_macro(self.outcomes).rate,
            **{f"term_rate_{band}": rate.rate for band, rate in by_training.items()},
            **{f"term_rate_sentinel_{band}": rate.rate for band, rate in by_sentinel.items()},
            "majority_rate": self.majority.rate,
            "copy_rate": self.copy.rate,
            "span_match": span_match(self.spans).rate,
            "span_match_term": span_match(self.spans, "term").rate,
            "span_match_random": span_match(self.spans, "random").rate,
            "cer_masked": masked_character_error_rate(self.spans),
            "cer": self.cer,
            "cer_reduction": self.cer_reduction,
            "over_edit_share": self.over_edit_share,
            "format_error_share": ratio(sum(output.faulty for output in self.outputs), len(self.outputs)),
            "early_end_share": ratio(sum(output.early_end for output in self.outputs), len(self.outputs)),
        }
        counts = {
            "n": exact.n,
            "n_terms": len({outcome.term_id for outcome in self.outcomes}),
            "n_unseen": sum(not outcome.seen for outcome in self.outcomes),
            "n_spans": len(self.spans),
            "n_examples": len(self.outputs),
            "n_documents": len({outcome.document for outcome in self.outcomes}),
        }
        return {**{name: finite_or_none(value) for name, value in numbers.items()}, **counts}
