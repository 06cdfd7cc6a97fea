"""bin/evaluate: how well trained models restore: one table for all of them, the resilience curve, JSON and a picture."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resilient_t5.commands.failure import reported
from resilient_t5.config.parse import parse_config
from resilient_t5.config.schema import Config
from resilient_t5.errors import ConfigError, DataError, ExitCode

DESCRIPTION = """Examine trained models, each a run directory: the share of masked domain terms that is written back exactly,
with its 95 % interval over documents, beside the majority guess and the copy of a visible term; and how it holds out as the
damage grows. Without --text, each model is examined on the documents that its own run held out."""
EPILOG = "exit codes: 0 done; 2 usage; 65 no model there, or text that cannot be used; 74 input/output"
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
        raise ConfigError("--tensorboard draws the resilience curve, and --curve_examples 0 leaves it out")
    configs = {path: _config_of(Path(path)) for path in arguments.run}
    # Imported late: --help and a wrong path must not wait for torch.
    from resilient_t5.restoration.scoring.resilience import Curve, table_lines
    from resilient_t5.training.entrypoints.evaluate import as_json, open_examination

    documents: list[dict[str, Any]] = []
    drawn: list[tuple[str, Sequence[Curve]]] = []
    for path, config in configs.items():
        examination = open_examination(Path(path), config, arguments.which, arguments.text, arguments.samples)
        report = examination.report(arguments.examples)
        curves = examination.curves(arguments.curve_examples) if arguments.curve_examples else []
        documents.append(as_json(examination, report, curves))
        drawn.append((path, curves))
        _say(f"\n{path}, export/{arguments.which}: {report.health.rows} examples")
        if examination.foreign_share:
            _say(f"{examination.foreign_share:.2%} of the tokens were never trained by this run; they keep their old rows")
        _say(*_bands(documents[-1]["by"]), *(table_lines(curves) if curves else ()))
        for sample in report.samples:
            _say(f"source    {sample.source}", f"gold      {sample.gold}", f"restored  {sample.restored}")
    _say("", *_table(documents))
    if arguments.png and arguments.curve_examples:
        from resilient_t5.training.telemetry.plots import draw_resilience

        draw_resilience(drawn, Path(arguments.png))
        _say(f"picture: {arguments.png}")
    line = json.dumps({"models": documents}, ensure_ascii=False)
    if arguments.json:
        Path(arguments.json).write_text(line + "\n", encoding="utf-8")
    if arguments.tensorboard:
        _draw_boards(drawn)
    print(json.dumps({"models": documents}))
    return ExitCode.OK


def _draw_boards(drawn: Sequence[tuple[str, Any]]) -> None:
    """The curves of each run in its own TensorBoard."""
    from resilient_t5.training.telemetry.plots import draw_resilience
    from resilient_t5.training.telemetry.tensorboard import draw_resilience_board

    for path, curves in drawn:
        picture = Path(path) / "resilience.png"
        draw_resilience([(path, curves)], picture)
        draw_resilience_board(Path(path) / "tensorboard" / "resilience", curves, picture)
        _say(f"TensorBoard: {Path(path) / 'tensorboard'}, run resilience")


def _config_of(run: Path) -> Config:
    file = run / "config.yaml"
    if not file.is_file():
        raise DataError(f"{run} is no run directory: it has no config.yaml", hint="Name the directory that bin/train made")
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
    return lines + [f"fewer than 200 masked terms, the interval is wide: {', '.join(few)}"] * bool(few)


def _bands(by: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    return [
        f"by {name:<10}" + "  ".join(f"{band} {rate['rate']:.3f} (n={rate['n']})" for band, rate in bands.items())
        for name, bands in by.items()
        if bands
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _say(*lines: str) -> None:
    encoding = sys.stdout.encoding or "ascii"
    for line in lines:
        print(line.encode(encoding, "replace").decode(encoding))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bin/evaluate", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="+", help="run directories")
    parser.add_argument("--which", choices=("best", "last"), default="best", help="which export of each run")
    parser.add_argument("--text", nargs="+", default=[], help="files, folders or globs to examine on instead")
    parser.add_argument("--examples", type=int, default=1000, help="most examples for the table (1000)")
    parser.add_argument(
        "--curve_examples", type=int, default=200, help="most examples for each level of the curve; 0 draws none"
    )
    parser.add_argument("--samples", type=int, default=3, help="restored examples to show (3)")
    parser.add_argument("--json", default="", help="file for the figures; they are the last line of the output too")
    parser.add_argument("--png", default="resilience.png", help="where the picture of the curves goes; empty draws none")
    parser.add_argument(
        "--tensorboard", action="store_true", help="draw each model's curve into the TensorBoard folder of its run, too"
    )
    return parser
