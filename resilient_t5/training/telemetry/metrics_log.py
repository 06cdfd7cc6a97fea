"""Read and cut back metrics.jsonl: one JSON object per line with `kind`, `update` and `time`.

Values that depend on the clock or the machine end in _s, _per_s, _mib or _share, so two runs can be compared without them.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from resilient_t5.files import write_whole

AUDIT_KINDS = ("start", "end", "save", "guard", "signal")
"""Rows that are kept when a run returns to an older update."""


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a metrics.jsonl; skip a line that a kill cut short."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict) and "kind" in row and isinstance(row.get("update"), int):
                yield row


def drop_rows_beyond(path: Path, update: int, evaluated_update: int) -> None:
    """Rewrite the file without training rows after `update` and other rows after `evaluated_update`; keep AUDIT_KINDS."""
    if not path.exists():
        return
    kept = [
        row
        for row in read_rows(path)
        if row["kind"] in AUDIT_KINDS or row["update"] <= (update if row["kind"] == "train" else evaluated_update)
    ]
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))


def plain(value: Any) -> Any:
    """Return `value` with every non-finite float as a string, because JSON has no NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value
