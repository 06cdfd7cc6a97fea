"""bin/benchmark: run one of the scripts in benchmarks/ of the source checkout and exit with its code."""

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
USAGE = "usage: bin/benchmark NAME [options of the benchmark]; bin/benchmark NAME --help shows them"
EPILOG = "The last line of each is JSON. Exit codes: 0 done; 2 usage; otherwise that of the benchmark"


class NoBenchmarks(ResilientError):
    """The package was installed without its source checkout, which has the benchmarks."""

    exit_code = ExitCode.USAGE
    label = "benchmark error"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `bin/benchmark`. The process becomes that of the benchmark; this returns only if none is started."""
    return reported(lambda: _benchmark(sys.argv[1:] if argv is None else argv))


def _benchmark(argv: Sequence[str]) -> int:
    available = benchmarks(FOLDER)
    if not argv or argv[0] in ("--help", "-h"):
        sys.stdout.write("\n".join([USAGE, *(f"  {name:<15} {title}" for name, title in available.items()), EPILOG]) + "\n")
        return ExitCode.OK if argv else ExitCode.USAGE
    name, *options = argv
    if name not in available:
        near = difflib.get_close_matches(name, available, 1)
        hint = f". Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{name} is not a benchmark; available are {', '.join(available)}{hint}")
    sys.stdout.flush()
    # Replaces this process, so that signals and the exit code are those of the benchmark.
    return os.execv(sys.executable, [sys.executable, str(FOLDER / f"{name}.py"), *options])


def benchmarks(folder: Path) -> dict[str, str]:
    """Name and first docstring line of every script in `folder`; modules without a main block are not scripts.

    Raises:
        NoBenchmarks: the folder does not exist or is empty.
    """
    sources = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))}
    if not sources:
        hint = "clone the repository and pip install -e ."
        raise NoBenchmarks("benchmarks run from a source checkout only", where=str(folder), hint=hint)
    scripts = {name: source for name, source in sources.items() if 'if __name__ == "__main__":' in source}
    return {name: (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0] for name, source in scripts.items()}
