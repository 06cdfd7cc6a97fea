"""The figures of one measurement of restoration, as a row of numbers, and samples as text."""

import math
from dataclasses import dataclass

from resilient_t5.restoration.scoring.metrics import (
    FormatHealth,
    Rate,
    SpanOutcome,
    TermOutcome,
    masked_character_error_rate,
    span_match,
    term_restoration,
    term_restoration_by,
    term_restoration_macro,
)


@dataclass(frozen=True)
class Sample:
    """One restored example as text; gaps and answers in square brackets, `[?]` where there is none."""

    example_id: int
    source: str
    gold: str
    restored: str


@dataclass(frozen=True)
class TextFigures:
    """Figures of the whole texts; nan where there is nothing to measure."""

    cer: float
    """Character error rate of the restored texts, edits per clean character."""
    cer_reduction: float
    """1 - CER of the restored over CER of the damaged texts; below 0 restoring does harm."""
    over_edit_share: float
    """Edits outside the damage over the characters there; nan for a model that fills gaps and cannot over-edit."""


@dataclass(frozen=True, eq=False)
class RestorationReport:
    """How well a fixed set of examples was restored."""

    outcomes: list[TermOutcome]
    spans: list[SpanOutcome]
    health: FormatHealth
    texts: TextFigures
    majority: Rate
    """Term restoration rate of the majority guess."""
    copy: Rate
    """Term restoration rate of copying a term that is still shown, by the better of its two rules."""
    samples: tuple[Sample, ...]

    @property
    def term_rate(self) -> float | None:
        """The term restoration rate; None when no term was masked."""
        return _number(term_restoration(self.outcomes).rate)

    def as_row(self) -> dict[str, float | int | None]:
        """The figures as JSON numbers; None where there was nothing to measure, and no key for an empty band."""
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
            "cer": self.texts.cer,
            "cer_reduction": self.texts.cer_reduction,
            "over_edit_share": self.texts.over_edit_share,
            "format_error_share": self.health.error_share,
            "early_end_share": self.health.early_end_share,
        }
        counts = {
            "n": exact.n,
            "n_terms": len({outcome.term_id for outcome in self.outcomes}),
            "n_unseen": sum(not outcome.seen for outcome in self.outcomes),
            "n_spans": len(self.spans),
            "n_examples": self.health.rows,
            "n_documents": len({outcome.document for outcome in self.outcomes}),
        }
        return {**{name: _number(value) for name, value in numbers.items()}, **counts}


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
