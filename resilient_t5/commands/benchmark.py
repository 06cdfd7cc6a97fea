"""bin/benchmark: run one of the scripts in benchmarks/ of the source checkout and leave with its exit code."""

import ast
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import resilient_t5
from resilient_t5.commands.failure import reported
from resilient_t5.errors import ConfigError, ExitCode, ResilientError

FOLDER = Path(resilient_t5.__file__).resolve().parents[1] / "benchmarks"
STARTED = 'if __name__ == "__main__":'
USAGE = "usage: bin/benchmark NAME [options of the benchmark]; bin/benchmark NAME --help shows them"
EPILOG = "Each prints one line of JSON last. Exit codes: 0 done; 2 usage; otherwise that of the benchmark"


class NoBenchmarks(ResilientError):
    """The package is installed without its source checkout, which the benchmarks live in."""

    exit_code = ExitCode.USAGE
    label = "benchmark error"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `bin/benchmark`. The process becomes that of the benchmark; it returns only when none is started."""
    return reported(lambda: _benchmark(sys.argv[1:] if argv is None else argv))


def _benchmark(argv: Sequence[str]) -> int:
    """The listing's exit code; with a benchmark named it does not come back."""
    found = benchmarks(FOLDER)
    if not argv or argv[0] in ("--help", "-h"):
        sys.stdout.write("\n".join([USAGE, *(f"  {name:<15} {claim}" for name, claim in found.items()), EPILOG]) + "\n")
        return ExitCode.OK if argv else ExitCode.USAGE
    name, *options = argv
    if name not in found:
        near = difflib.get_close_matches(name, found, 1)
        hint = f". Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{name} is no benchmark; there are {', '.join(found)}{hint}")
    sys.stdout.flush()
    script = str(FOLDER / f"{name}.py")
    # One process: signals and the exit code are the benchmark's own.
    return os.execv(sys.executable, [sys.executable, script, *options])


def benchmarks(folder: Path) -> dict[str, str]:
    """Name and first line of the docstring of every script in `folder`.

    Raises:
        NoBenchmarks: there is no such folder: the package was installed without its sources.
    """
    scripts = sorted(folder.glob("*.py"))
    if not scripts:
        raise NoBenchmarks(
            "benchmarks run from a source checkout only", where=str(folder), hint="clone the repository and pip install -e ."
        )
    sources = {script.stem: script.read_text(encoding="utf-8") for script in scripts}
    started = {name: source for name, source in sources.items() if STARTED in source}  # the others are parts of them
    return {name: (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0] for name, source in started.items()}
