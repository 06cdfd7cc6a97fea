"""Metadata of a benchmark result (date, machine, versions, command) and its output as one line of JSON."""

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def circumstances(benchmark: str, packages: Sequence[str]) -> dict[str, Any]:
    """Return the first keys of a result. They contain no paths and no host name."""
    return {
        "benchmark": benchmark,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "command": " ".join(["python", f"benchmarks/{benchmark}.py", *(Path(word).name for word in sys.argv[1:])]),
    }


def write_json(result: dict[str, Any], path: Path | None) -> None:
    """Write one line of JSON to stdout, and an indented copy to `path`."""
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(result) + "\n")
