"""bin/replay: what a stopping rule would have done with a recorded run, as a story, a picture, or a comparison."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from resilient_t5.commands.failure import reported
from resilient_t5.config.parse import parse_config
from resilient_t5.config.training import ConvergenceConfig
from resilient_t5.errors import ConfigError, DataError, ExitCode
from resilient_t5.training.convergence.recordings import read_curves
from resilient_t5.training.convergence.replay import Curve, ReplayComparison, differences, replay, replay_rules, story
from resilient_t5.training.convergence.rules import Rules

DESCRIPTION = """Replay recorded losses through the convergence machine.

An input is a metrics.jsonl or a run directory, a TensorBoard directory, a Hugging Face trainer_state.json, a CSV, or a
.jsonl(.gz) of curves {"name", "eval": [[update, loss], ...]}. A run of ours is replayed with its own rules and its own
updates; of any other recording one evaluation counts as one window of 1000 updates (an epoch as 12 windows), unless a
curve says "window_updates": N. Settings of the machine are given as --convergence.key VALUE, as for bin/train; with
--beside they are told and drawn beside the run's own rules instead of in their place."""
EPILOG = (
    "exit codes: 0 done; 2 usage; 65 a recording that cannot be read, or a replay that differs from its run; 74 input/output"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `bin/replay` and return its exit code."""
    return reported(lambda: _replay(sys.argv[1:] if argv is None else argv))


def _replay(argv: Sequence[str]) -> int:
    own, settings = _split(argv)
    arguments = _parser().parse_args(own)
    section = parse_config(settings, "replay", DESCRIPTION).convergence
    curves = [curve for path in arguments.input for curve in read_curves(Path(path), arguments.tag)]
    if arguments.group:
        curves = [curve for curve in curves if curve.group == arguments.group]
    if not curves:
        raise DataError(f"no curve of group {arguments.group!r}", where=", ".join(arguments.input))
    if arguments.compare:
        return _compare(curves, section if settings else None, arguments)
    curve = _chosen(curves, arguments.name)
    given = replay_rules(curve, section, arguments.clock)
    if not arguments.beside:
        return _tell(curve, given if settings or curve.rules is None else curve.rules, None, arguments)
    if curve.rules is None or not settings:
        raise ConfigError("--beside wants a run of ours and settings: --convergence.preset NAME or any --convergence.key VALUE")
    return _tell(curve, curve.rules, ReplayComparison(section.preset, replay(curve, given, arguments.clock)), arguments)


def _tell(curve: Curve, rules: Rules, beside: ReplayComparison | None, arguments: argparse.Namespace) -> int:
    result = replay(curve, rules, arguments.clock)
    lines = story(result, whole=arguments.whole)
    if beside:
        lines += ["", f"{beside.name} beside it:", *story(beside.replay, whole=arguments.whole)[1:]]
    differing = []
    if curve.recorded and curve.windows and rules == curve.rules:
        differing = differences(result)
        lines += differing or [f"agrees with the run's own verdicts at all {len(curve.recorded)} evaluations"]
    if arguments.png != "none":
        # Imported late: a story needs no imaging library.
        from resilient_t5.training.telemetry.plots import draw_replay

        draw_replay(result, Path(arguments.png), beside)
        lines.append(f"picture: {arguments.png}")
    print("\n".join(line.encode("ascii", "replace").decode() for line in lines))
    return ExitCode.BAD_DATA if differing else ExitCode.OK


def _compare(curves: list[Curve], section: ConvergenceConfig | None, arguments: argparse.Namespace) -> int:
    from resilient_t5.training.convergence.scoring import compare, document, table

    comparison = compare(curves, {"given": section} if section else None, arguments.clock)
    if not comparison.curves:
        raise DataError("no curve holds a finite loss", where=", ".join(arguments.input))
    print("\n".join(table(comparison)))
    if arguments.png != "none":
        from resilient_t5.training.telemetry.plots import draw_frontier

        draw_frontier(comparison, Path(arguments.png))
        print(f"picture: {arguments.png}")
    print(json.dumps(document(comparison)))
    return ExitCode.OK


def _chosen(curves: list[Curve], name: str) -> Curve:
    """The one curve that is meant."""
    exact = [curve for curve in curves if curve.name == name]
    meant = exact or [curve for curve in curves if name in curve.name]
    if len(meant) == 1:
        return meant[0]
    names = ", ".join(curve.name for curve in (meant or curves)[:8])
    raise ConfigError(f"{len(meant)} curves are meant by --name {name!r}; choose one ({names}, ...) or give --compare")


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our own arguments and the settings of the machine, which the common parser reads."""
    own: list[str] = []
    settings: list[str] = []
    position = 0
    while position < len(argv):
        is_setting = argv[position].startswith(("--convergence.", "--config"))
        width = 2 if is_setting and "=" not in argv[position] else 1
        (settings if is_setting else own).extend(argv[position : position + width])
        position += width
    return own, settings


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bin/replay", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", nargs="+", help="recordings")
    parser.add_argument("--compare", action="store_true", help="all curves under our rules, the peers' and a sweep")
    parser.add_argument("--name", default="", help="which curve of several: its name or a part of it")
    parser.add_argument("--group", default="", help="only curves of this group")
    parser.add_argument("--tag", default=None, help="tag, column or key of the evaluation loss")
    parser.add_argument("--png", default="replay.png", help="where the picture goes (replay.png); none draws none")
    parser.add_argument("--beside", action="store_true", help="the settings given beside the run's own rules, in one picture")
    parser.add_argument("--whole", action="store_true", help="tell every window, not only those where something happened")
    parser.add_argument("--clock", choices=("windows", "updates"), default="windows", help="what an evaluation counts as")
    return parser
