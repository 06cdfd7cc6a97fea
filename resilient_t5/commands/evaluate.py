"""bin/evaluate: evaluate trained models: a table of restoration metrics, the resilience curve, JSON and a plot."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resilient_t5.commands.failure import reported
from resilient_t5.config.parse import CONFIG_FILE, run_config
from resilient_t5.errors import ConfigError, DataError, ExitCode

DESCRIPTION = """Evaluate trained models, each a run directory: the share of masked domain terms that are restored exactly, with
its 95 % interval over documents, compared with the majority guess and the copy of a visible term; and the same at increasing
damage. Without --text, each model is evaluated on the documents that its own run held out."""
EPILOG = "exit codes: 0 done; 2 usage; 65 no model in the directory, or text that cannot be used; 74 input/output"
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
        raise ConfigError("--tensorboard draws the resilience curve, which --curve_examples 0 omits")
    for path in arguments.run:
        if not Path(path, CONFIG_FILE).is_file():
            hint = "Give a directory that bin/train created"
            raise DataError(f"{path} is not a run directory: it has no {CONFIG_FILE}", hint=hint)
    configs = {path: run_config(Path(path), "evaluate") for path in arguments.run}
    # Imported here so that --help and a wrong path do not wait for torch.
    from resilient_t5.restoration.scoring.resilience import Curve, table_lines
    from resilient_t5.training.entrypoints.evaluate import as_json, open_model

    results: list[dict[str, Any]] = []
    curves_by_run: list[tuple[str, Sequence[Curve]]] = []
    for path, config in configs.items():
        model = open_model(config, arguments.which, arguments.text, arguments.samples)
        report = model.report(arguments.examples)
        curves = model.curves(arguments.curve_examples) if arguments.curve_examples else []
        results.append(as_json(model, report, curves))
        curves_by_run.append((path, curves))
        _print(f"\n{path}, export/{arguments.which}: {len(report.outputs)} examples")
        if model.foreign_share:
            _print(f"{model.foreign_share:.2%} of the tokens were not trained by this run and keep their embeddings")
        _print(*_bands(results[-1]["by"]), *(table_lines(curves) if curves else ()))
        for sample in report.samples:
            _print(f"source    {sample.source}", f"gold      {sample.gold}", f"restored  {sample.restored}")
    _print("", *_table(results))
    if arguments.png and arguments.curve_examples:
        from resilient_t5.training.telemetry.plots import draw_resilience

        draw_resilience(curves_by_run, Path(arguments.png))
        _print(f"plot: {arguments.png}")
    line = json.dumps({"models": results}, ensure_ascii=False)
    if arguments.json:
        Path(arguments.json).write_text(line + "\n", encoding="utf-8")
    if arguments.tensorboard:
        _write_tensorboard(curves_by_run)
    print(json.dumps({"models": results}))
    return ExitCode.OK


def _write_tensorboard(curves_by_run: Sequence[tuple[str, Any]]) -> None:
    """Write the curves of each run to its own TensorBoard directory."""
    from resilient_t5.training.telemetry.plots import draw_resilience
    from resilient_t5.training.telemetry.tensorboard import draw_resilience_board

    for path, curves in curves_by_run:
        picture = Path(path) / "resilience.png"
        draw_resilience([(path, curves)], picture)
        draw_resilience_board(Path(path) / "tensorboard" / "resilience", curves, picture)
        _print(f"TensorBoard: {Path(path) / 'tensorboard'}, run resilience")


def _table(results: Sequence[dict[str, Any]]) -> list[str]:
    width = max(len(result["model"]) for result in results) + 2
    lines = ["model".ljust(width) + f"{'n':>6}" + f"{'95 % interval':>18}" + "".join(f"{head:>12}" for head, _ in COLUMNS)]
    for result in results:
        low, high = result["term_rate_low"], result["term_rate_high"]
        interval = "-" if low is None else f"[{low:.3f}, {high:.3f}]"
        cells = "".join(f"{_number(result.get(key)):>12}" for _, key in COLUMNS)
        lines.append(result["model"].ljust(width) + f"{result['n']:>6}{interval:>18}{cells}")
    few = [result["model"] for result in results if result["n"] < 200]
    return lines + [f"fewer than 200 masked terms, the interval is wide: {', '.join(few)}"] * bool(few)


def _bands(by: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    return [
        f"by {name:<10}" + "  ".join(f"{band} {rate['rate']:.3f} (n={rate['n']})" for band, rate in bands.items())
        for name, bands in by.items()
        if bands
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _print(*lines: str) -> None:
    encoding = sys.stdout.encoding or "ascii"
    for line in lines:
        print(line.encode(encoding, "replace").decode(encoding))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bin/evaluate", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="+", help="run directories")
    parser.add_argument("--which", choices=("best", "last"), default="best", help="which export of each run")
    parser.add_argument("--text", nargs="+", default=[], help="files, directories or globs to evaluate on instead")
    parser.add_argument("--examples", type=int, default=1000, help="maximum examples for the table (1000)")
    parser.add_argument(
        "--curve_examples", type=int, default=200, help="maximum examples for each level of the curve; 0 omits the curve"
    )
    parser.add_argument("--samples", type=int, default=3, help="restored examples to show (3)")
    parser.add_argument("--json", default="", help="file for the results, which are also the last line of the output")
    parser.add_argument("--png", default="resilience.png", help="file for the plot of the curves; empty for none")
    parser.add_argument(
        "--tensorboard", action="store_true", help="also write each curve to the TensorBoard directory of its run"
    )
    return parser
