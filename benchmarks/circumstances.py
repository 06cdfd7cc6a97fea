"""What every result says of itself: date, kind of machine, versions, the command with the names of its files; its last line."""

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
    """The first keys of a result; no path of the machine and no host name is among them."""
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
    """One line on stdout, last; the same in `path` for people to read."""
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(result) + "\n")
