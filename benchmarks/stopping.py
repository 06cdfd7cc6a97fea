"""Descent forgone and updates spent by the stopping presets, the rules of other projects and anchored patience.

    bin/benchmark stopping CURVES... [--png FILE] [--convergence.key VALUE ...]
    bin/benchmark stopping CURVES.jsonl.gz --search

The inputs are the recordings that `bin/replay` reads. The default is a comparison over all curves; settings of the
convergence machine add a rule `given`. `--search` tests variations of anchored patience instead (stopping_rules/search.py).
The last line is JSON: {"curves", "rules": {rule: figures}}, or with `--search`
{"curves", "variants", "better": [...], "families": {family: {patience: figures}}}.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.stopping_rules.picture import draw_frontier  # noqa: E402
from benchmarks.stopping_rules.scoring import compare, document, table  # noqa: E402
from benchmarks.stopping_rules.search import search  # noqa: E402
from resilient_t5.commands.failure import reported  # noqa: E402
from resilient_t5.commands.replay import split_settings  # noqa: E402
from resilient_t5.config.parse import parse_config  # noqa: E402
from resilient_t5.config.sections import ConvergenceConfig  # noqa: E402
from resilient_t5.errors import DataError, ExitCode  # noqa: E402
from resilient_t5.training.convergence.recordings import read_curves  # noqa: E402
from resilient_t5.training.convergence.replay import Curve  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return its exit code."""
    return reported(lambda: measure(sys.argv[1:] if argv is None else argv))


def measure(argv: Sequence[str]) -> int:
    """Print the comparison or the search, and its line of JSON last."""
    own, settings = split_settings(argv)
    arguments = build_parser().parse_args(own)
    section = parse_config(settings, "benchmark stopping", (__doc__ or "").partition("\n")[0]).convergence
    curves = [curve for path in arguments.input for curve in read_curves(Path(path), arguments.tag)]
    curves = [curve for curve in curves if curve.group == (arguments.group or curve.group)]
    curves = [curve for curve in curves if curve.group != (arguments.without or None)]
    if not curves:
        raise DataError("no curve of the groups given", where=", ".join(arguments.input))
    result = search(curves) if arguments.search else _compare(curves, section if settings else None, arguments)
    line = json.dumps(result)
    if arguments.json:
        arguments.json.write_text(line + "\n", encoding="utf-8")
    print(line)
    return ExitCode.OK


def _compare(curves: list[Curve], section: ConvergenceConfig | None, arguments: argparse.Namespace) -> dict[str, Any]:
    comparison = compare(curves, {"given": section} if section else None, arguments.clock)
    if not comparison.curves:
        raise DataError("no curve holds a finite loss", where=", ".join(arguments.input))
    print("\n".join(table(comparison)))
    if arguments.png:
        draw_frontier(comparison, arguments.png)
        print(f"picture: {arguments.png}")
    return document(comparison)


def build_parser() -> argparse.ArgumentParser:
    """The options of this benchmark; settings of the convergence machine are read by the configuration parser."""
    parser = argparse.ArgumentParser(
        prog="bin/benchmark stopping",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("input", nargs="+", help="recordings of losses")
    parser.add_argument("--search", action="store_true", help="test variations of anchored patience")
    parser.add_argument("--group", default="", help="use only curves of this group")
    parser.add_argument("--without", default="", help="leave out curves of this group")
    parser.add_argument("--tag", help="tag, column or key of the evaluation loss")
    parser.add_argument("--clock", choices=("windows", "updates"), default="windows", help="unit of an evaluation's position")
    parser.add_argument("--png", type=Path, help="draw the comparison into this .png, .svg or .pdf")
    parser.add_argument("--json", type=Path, help="also write the last line to this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
