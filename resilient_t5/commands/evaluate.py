"""bin/evaluate: restoration metrics of trained models: a table, resilience curves, JSON and a plot."""

import argparse
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resilient_t5.commands.failure import reported
from resilient_t5.config.parse import parse_config
from resilient_t5.config.schema import Config
from resilient_t5.errors import ConfigError, DataError, ExitCode

DESCRIPTION = """Evaluate trained models, each given as a run directory: the term restoration rate with its 95 % confidence
interval (bootstrap over documents), the majority guess and the copy of a visible term as baselines, and the rate as the
damage increases. Without --text, each model is evaluated on the held-out documents of its run."""
EPILOG = "exit codes: 0 done; 2 usage; 65 model not found, or unusable text; 74 input/output"
COLUMNS = (
    ("term rate", "term_rate"),
    ("normalised", "term_rate_normalised"),
    ("near", "term_rate_near"),
    ("unseen", "term_rate_unseen"),
    ("majority", "majority_rate"),
    ("copy", "copy_rate"),
    ("spans", "span_match"),
    ("CER masked", "cer_masked"),
    ("CER less", "cer_reduction"),
    ("over-edit", "over_edit_share"),
    ("format err", "format_error_share"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `bin/evaluate` and return its exit code."""
    return reported(lambda: _evaluate(sys.argv[1:] if argv is None else argv))


def _evaluate(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.examples < 1:
        raise ConfigError(f"--examples {arguments.examples} is below 1")
    if arguments.tensorboard and not arguments.curve_examples:
        raise ConfigError("--tensorboard needs the resilience curve, which --curve_examples 0 disables")
    configs = {path: _config_of(Path(path)) for path in arguments.run}
    # Imported late: torch takes seconds to import; --help and a wrong path do not need it.
    from resilient_t5.restoration.scoring.resilience import Curve, table_lines
    from resilient_t5.training.entrypoints.evaluate import as_json, open_model

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # samples may contain characters that the terminal cannot encode
    documents: list[dict[str, Any]] = []
    curves_of: list[tuple[str, Sequence[Curve]]] = []
    for path, config in configs.items():
        model = open_model(Path(path), config, arguments.which, arguments.text, arguments.samples)
        report = model.report(arguments.examples)
        curves = model.curves(arguments.curve_examples) if arguments.curve_examples else []
        documents.append(as_json(model, report, curves))
        curves_of.append((path, curves))
        print(f"\n{path}, export/{arguments.which}: {report.health.rows} examples")
        if model.foreign_share:
            print(f"{model.foreign_share:.2%} of the tokens were not trained in this run; their embeddings are unchanged")
        print(*_bands(documents[-1]["by"]), *(table_lines(curves) if curves else ()), sep="\n")
        for sample in report.samples:
            print(f"source    {sample.source}\ngold      {sample.gold}\nrestored  {sample.restored}")
    print("", *_table(documents), sep="\n")
    if arguments.png and arguments.curve_examples:
        from resilient_t5.training.telemetry.plots import draw_resilience

        draw_resilience(curves_of, Path(arguments.png))
        print(f"plot: {arguments.png}")
    line = json.dumps({"models": documents}, ensure_ascii=False)
    if arguments.json:
        Path(arguments.json).write_text(line + "\n", encoding="utf-8")
    if arguments.tensorboard:
        _write_tensorboard(curves_of)
    print(json.dumps({"models": documents}))
    return ExitCode.OK


def _write_tensorboard(curves_of: Sequence[tuple[str, Any]]) -> None:
    """Add the curves of each run to the TensorBoard directory of the run."""
    from resilient_t5.training.telemetry.plots import draw_resilience
    from resilient_t5.training.telemetry.tensorboard import draw_resilience_board

    for path, curves in curves_of:
        picture = Path(path) / "resilience.png"
        draw_resilience([(path, curves)], picture)
        draw_resilience_board(Path(path) / "tensorboard" / "resilience", curves, picture)
        print(f"TensorBoard: {Path(path) / 'tensorboard'}, run resilience")


def _config_of(run: Path) -> Config:
    file = run / "config.yaml"
    if not file.is_file():
        raise DataError(f"{run} is not a run directory: config.yaml is missing", hint="Give the run.dir of bin/train")
    return parse_config(["--config", str(file)], "evaluate", DESCRIPTION)


def _table(documents: Sequence[dict[str, Any]]) -> list[str]:
    width = max(len(document["model"]) for document in documents) + 2
    lines = ["model".ljust(width) + f"{'n':>6}" + f"{'95 % interval':>18}" + "".join(f"{head:>12}" for head, _ in COLUMNS)]
    for document in documents:
        low, high = document["term_rate_low"], document["term_rate_high"]
        interval = "-" if low is None else f"[{low:.3f}, {high:.3f}]"
        cells = "".join(f"{_number(document.get(key)):>12}" for _, key in COLUMNS)
        lines.append(document["model"].ljust(width) + f"{document['n']:>6}{interval:>18}{cells}")
    few = [document["model"] for document in documents if document["n"] < 200]
    return lines + [f"fewer than 200 masked terms, so the interval is wide: {', '.join(few)}"] * bool(few)


def _bands(by: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    return [
        f"by {name:<10}" + "  ".join(f"{band} {rate['rate']:.3f} (n={rate['n']})" for band, rate in bands.items())
        for name, bands in by.items()
        if bands
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bin/evaluate", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="+", help="run directories")
    parser.add_argument("--which", choices=("best", "last"), default="best", help="which export of each run (best)")
    parser.add_argument("--text", nargs="+", default=[], help="files, folders or globs to evaluate on instead")
    parser.add_argument("--examples", type=int, default=1000, help="maximum examples for the table (1000)")
    parser.add_argument(
        "--curve_examples", type=int, default=200, help="maximum examples per level of the curve; 0 disables it (200)"
    )
    parser.add_argument("--samples", type=int, default=3, help="restored examples to print (3)")
    parser.add_argument("--json", default="", help="write the JSON object to this file; it is also the last line of the output")
    parser.add_argument("--png", default="resilience.png", help="file for the plot of the curves; empty: no plot")
    parser.add_argument(
        "--tensorboard", action="store_true", help="add each model's curves to the TensorBoard directory of its run"
    )
    return parser
