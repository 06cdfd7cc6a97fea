"""JSON with an exact round trip.

Python's json writes NaN as invalid JSON, turns the key 1 into "1" and keeps the last of two equal keys. Here a non-finite
float is written as {"$float": "nan"}, keys must be strings, and equal keys, bare NaN and excessive depth are errors.
"""

import json
import math
from typing import Any

FLOAT_KEY = "$float"
NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
DEPTH = 64


def dump(value: Any) -> bytes:
    """`value` as UTF-8 JSON with sorted keys; the same value always gives the same bytes. Tuples become lists.

    Raises:
        TypeError: a key is not a string, or a value is none of None, bool, int, float, str, list, tuple, dict.
        ValueError: nested deeper than DEPTH.
    """
    text = json.dumps(_plain(value, DEPTH), sort_keys=True, indent=1, allow_nan=False)
    return text.encode("ascii") + b"\n"


def load(data: bytes) -> Any:
    """Parse the bytes that `dump` returned.

    Raises:
        ValueError: not UTF-8, not JSON, equal keys in one object, a bare NaN, or nested too deeply.
    """
    try:
        text = data.decode("utf-8")
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _plain(value: Any, depth: int) -> Any:
    if depth == 0:
        raise ValueError(f"nested deeper than {DEPTH}")
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        number = float(value)
        return number if math.isfinite(number) else {FLOAT_KEY: repr(number)}
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth - 1) for item in value]
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"key {key!r} is a {type(key).__name__}, not a string")
        if FLOAT_KEY in value:
            raise TypeError(f"key {FLOAT_KEY!r} is reserved")
        return {key: _plain(item, depth - 1) for key, item in value.items()}
    raise TypeError(f"{value!r} is a {type(value).__name__}, which JSON cannot hold")


def _object(pairs: list[tuple[str, Any]]) -> Any:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("an object has the same key twice")
    if FLOAT_KEY in value:
        number = NOT_FINITE.get(str(value[FLOAT_KEY]))
        if len(value) != 1 or number is None:
            raise ValueError(f"{FLOAT_KEY} is not nan, inf or -inf")
        return number
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
