"""Values that settings share: points in training, durations, and the gathering of range problems.

A *point* in training is an integer (updates) or a string: `0.5ep` (epochs) or `50Mtok` (target tokens; `ktok`, `Mtok`,
`Gtok`). A *duration* carries its unit: `30min`, `12h`.
"""

import math
import re

from resilient_t5.errors import ConfigError

Point = int | str
POINT = re.compile(r"(?P<number>\d+(\.\d+)?)(?P<unit>ep|[kMG]?tok)")
DURATION = re.compile(r"(?P<number>\d+(\.\d+)?)(?P<unit>s|min|h|d)")
TOKEN_UNITS = {"tok": 1, "ktok": 10**3, "Mtok": 10**6, "Gtok": 10**9}
DURATION_UNITS_S = {"s": 1, "min": 60, "h": 3600, "d": 86400}

Check = tuple[bool, str]


def check(*checks: Check) -> None:
    """Raise one ConfigError that names every check that does not hold."""
    problems = [problem for holds, problem in checks if not holds]
    if problems:
        raise ConfigError(*problems)


def share(name: str, value: float) -> Check:
    """A check that `value` is a share, from 0 to 1."""
    return 0.0 <= value <= 1.0, f"{name}: {value} is not between 0 and 1"


def point_or_number(name: str, value: Point | float | None) -> Check:
    """A check that `value` is a number not below 0, or a point with a unit, or not given."""
    problem = f"{name}: {value!r} is no point in training; write updates (6000), epochs (0.5ep) or tokens (50Mtok)"
    if isinstance(value, str):
        return POINT.fullmatch(value) is not None, problem
    return value is None or (math.isfinite(value) and value >= 0), problem


def as_tuple(value: str | list[str] | None) -> tuple[str, ...]:
    """One or several inputs as a tuple; empty for none."""
    if value is None or value == "":
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


def updates_at(point: Point, updates_per_epoch: float, tokens_per_update: float) -> int:
    """The update at which `point` lies.

    Args:
        point: updates, or a string in epochs or target tokens.
        updates_per_epoch: updates that one pass over the corpus takes.
        tokens_per_update: mean target tokens of an update.
    """
    if isinstance(point, int):
        return point
    match = POINT.fullmatch(point)
    if match is None:
        raise ConfigError(point_or_number("point", point)[1])
    number, unit = float(match["number"]), match["unit"]
    if unit == "ep":
        return round(number * updates_per_epoch)
    return round(number * TOKEN_UNITS[unit] / tokens_per_update)


def seconds(duration: str) -> float:
    """Seconds of a duration such as `30min`."""
    match = DURATION.fullmatch(duration)
    if match is None:
        raise ConfigError(f"{duration!r} is not a duration such as 30min, 12h or 2d")
    return float(match["number"]) * DURATION_UNITS_S[match["unit"]]
