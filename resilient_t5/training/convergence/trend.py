"""Statistics that explain a loss curve and decide nothing.

Plain Python over at most `RECENT` windows. All scales come from the losses: multiplying the losses by a constant
multiplies every result by it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median

RECENT = 24
"""Number of latest windows that the statistics use."""
HORIZON_WINDOWS = 5
"""Windows over which the gain is projected."""
WORTH_SHARE = 0.001
"""A projected gain below this share of the level counts as flat."""
CONFIDENCE_Z = 1.28
"""Half-width of the interval in standard errors: 90 % on each side."""
SLOPE_WINDOWS_MIN, SLOPE_WINDOWS_MAX = 6, 16
POINTS_MIN = 4
CUSUM_DRIFT, CUSUM_CAP, CUSUM_ALARM = 0.5, 3.0, 4.0


class Direction(StrEnum):
    """Direction of a loss, from the interval of its projected gain."""

    RISE = "RISE"
    FLAT = "FLAT"
    UNSURE = "UNSURE"
    DECLINE = "DECLINE"


DIRECTION_CODES = {Direction.RISE: -1.0, Direction.FLAT: 0.0, Direction.UNSURE: 0.5, Direction.DECLINE: 1.0}
"""Values of the directions in metrics and TensorBoard."""


@dataclass(frozen=True)
class Trend:
    """Recent trend of a loss; gains have the unit of the loss and are positive where it falls.

    `worth` is the projected gain below which the loss counts as flat, `sigma` the noise of one evaluation.
    """

    direction: Direction
    level: float
    gain: float
    gain_low: float
    gain_high: float
    worth: float
    sigma: float


def noise_sigma(losses: Sequence[float]) -> float | None:
    """Standard deviation of one evaluation, from the differences of neighbours, so that a descent does not inflate it.

    1.4826 MAD / sqrt(2) of the median-centred differences (a robust form of von Neumann 1941). None below four losses.
    """
    if len(losses) < POINTS_MIN:
        return None
    differences = [later - earlier for earlier, later in zip(losses[:-1], losses[1:], strict=True)]
    centre = median(differences)
    return 1.4826 * median([abs(difference - centre) for difference in differences]) / math.sqrt(2)


def theil_sen(losses: Sequence[float]) -> float:
    """Median of the slopes between all pairs, per window (Sen 1968); robust to outliers in about a quarter of the points."""
    count = len(losses)
    return median([(losses[j] - losses[i]) / (j - i) for i in range(count) for j in range(i + 1, count)])


def judge_trend(losses: Sequence[float], plateau: int, sigma: float | None) -> Trend | None:
    """Trend of the latest windows; None while there are too few.

    FLAT is an equivalence test: the whole interval of the projected gain is below `WORTH_SHARE` of the level. The slope
    window grows with the plateau and its error falls with K ** -1.5, so a long plateau becomes FLAT.

    Args:
        losses: finite losses of neighbouring windows, oldest first.
        plateau: judged windows without counted gain.
        sigma: noise of one evaluation.
    """
    if sigma is None or len(losses) < POINTS_MIN:
        return None
    recent = losses[-min(max(plateau + 1, SLOPE_WINDOWS_MIN), SLOPE_WINDOWS_MAX) :]
    count = len(recent)
    level = median(recent)
    gain = -theil_sen(recent) * HORIZON_WINDOWS
    # 1.05: error of Theil-Sen relative to least squares (asymptotic efficiency 3 / pi under normal noise), rounded up
    margin = CONFIDENCE_Z * 1.05 * sigma * HORIZON_WINDOWS / math.sqrt(count * (count * count - 1) / 12)
    worth = WORTH_SHARE * abs(level)
    direction = Direction.UNSURE
    if gain + margin < 0 and count >= SLOPE_WINDOWS_MIN:
        direction = Direction.RISE
    elif gain + margin < worth and count >= SLOPE_WINDOWS_MIN:
        direction = Direction.FLAT
    elif gain - margin > worth:
        direction = Direction.DECLINE
    return Trend(direction, level, gain, gain - margin, gain + margin, worth, sigma)


def cusum_after(cusum: float, loss: float, segment: Sequence[float], sigma: float) -> float:
    """One-sided cumulative sum for a downward shift (Page 1954); above `CUSUM_ALARM` the loss has left the segment.

    Args:
        cusum: the previous sum, 0 at the start of a segment.
        loss: the new loss.
        segment: earlier losses of the plateau, at least one.
        sigma: noise of one evaluation; with 0 any difference is an outlier.
    """
    fall = median(segment) - loss
    score = fall / sigma if sigma else fall * math.inf if fall else 0.0
    score = min(max(score, -CUSUM_CAP), CUSUM_CAP)
    return max(0.0, cusum + score - CUSUM_DRIFT)
