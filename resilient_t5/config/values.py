"""Value types and range checks that the configuration sections share.

A *point* in training is an integer (updates) or a string: `0.5ep` (epochs) or `50Mtok` (target tokens; `ktok`, `Mtok`,
`Gtok`). A *duration* has a unit: `30min`, `12h`.
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
"""Whether a setting is valid, and the problem to report if it is not."""


def check(*checks: Check) -> None:
    """Raise one ConfigError with the problem of every check that failed."""
    problems = [problem for is_valid, problem in checks if not is_valid]
    if problems:
        raise ConfigError(*problems)


def at_least(section: str, settings: object, **minimum: float) -> list[Check]:
    """Check the named settings against their minimum; None and `auto` are valid."""
    values = {key: getattr(settings, key) for key in minimum}
    return [
        (value in (None, "auto") or float(value) >= minimum[key], f"{section}.{key}: {value} is below {minimum[key]}")
        for key, value in values.items()
    ]


def above_zero(section: str, settings: object, *keys: str) -> list[Check]:
    """Check that the named settings are finite numbers above 0; None and `auto` are valid."""
    values = {key: getattr(settings, key) for key in keys}
    return [
        (
            value in (None, "auto") or 0 < float(value) < math.inf,
            f"{section}.{key}: {value} is not a finite number above 0",
        )
        for key, value in values.items()
    ]


def between(section: str, settings: object, **bounds: tuple[float, float]) -> list[Check]:
    """Check that the named settings lie in their closed interval."""
    values = {key: getattr(settings, key) for key in bounds}
    return [
        (low <= values[key] <= high, f"{section}.{key}: {values[key]} is not between {low} and {high}")
        for key, (low, high) in bounds.items()
    ]


def below_one(section: str, settings: object, *keys: str) -> list[Check]:
    """Check that the named settings lie in [0, 1); None is valid."""
    values = {key: getattr(settings, key) for key in keys}
    return [(value is None or 0 <= value < 1, f"{section}.{key}: {value} is not in [0, 1)") for key, value in values.items()]


def point_or_number(name: str, value: Point | float | None) -> Check:
    """Check that `value` is a number of at least 0, a point with a unit, or None."""
    problem = f"{name}: {value!r} is not a point in training; write updates (6000), epochs (0.5ep) or tokens (50Mtok)"
    if isinstance(value, str):
        return POINT.fullmatch(value) is not None, problem
    return value is None or (math.isfinite(value) and value >= 0), problem


def as_tuple(value: str | list[str] | None) -> tuple[str, ...]:
    """One or several inputs as a tuple; empty for none."""
    if value is None or value == "":
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


def updates_at(point: Point, updates_per_epoch: float, tokens_per_update: float) -> int:
    """Convert a point in training to a number of updates.

    Args:
        tokens_per_update: mean target tokens per update.
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
    """Convert a duration such as `30min` to seconds."""
    match = DURATION.fullmatch(duration)
    if match is None:
        raise ConfigError(f"{duration!r} is not a duration such as 30min, 12h or 2d")
    return float(match["number"]) * DURATION_UNITS_S[match["unit"]]
