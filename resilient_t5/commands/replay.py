"""bin/replay: what a stopping rule would have decided on a recorded run, as text and as a picture."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from resilient_t5.commands.failure import reported
from resilient_t5.config.parse import parse_config
from resilient_t5.errors import ConfigError, DataError, ExitCode
from resilient_t5.training.convergence.recordings import read_curves
from resilient_t5.training.convergence.replay import Curve, ReplayComparison, differences, replay, replay_rules, story
from resilient_t5.training.convergence.rules import Rules

DESCRIPTION = """Replay recorded losses through the convergence machine.

An input is a run directory or its metrics.jsonl, a TensorBoard directory, a Hugging Face trainer_state.json, a CSV, or a
.jsonl(.gz) of curves {"name", "eval": [[update, loss], ...]}. A run of resilient_t5 is replayed with its own rules and
updates. In any other recording one evaluation counts as one window of 1000 updates and 12 windows as an epoch, unless the
curve has "window_updates": N. Settings of the machine are given as --convergence.key VALUE, as for bin/train; with
--beside they are reported and drawn in addition to the run's own rules instead of replacing them."""
EPILOG = (
    "exit codes: 0 done; 2 usage; 65 a recording that cannot be read, or a replay that differs from its run; 74 input/output"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `bin/replay` and return its exit code."""
    return reported(lambda: _replay(sys.argv[1:] if argv is None else argv))


def _replay(argv: Sequence[str]) -> int:
    own, settings = split_settings(argv)
    if "--compare" in own:
        raise ConfigError("--compare is now a benchmark of its own. Use bin/benchmark stopping FILE...")
    arguments = _parser().parse_args(own)
    section = parse_config(settings, "replay", DESCRIPTION).convergence
    curves = [curve for path in arguments.input for curve in read_curves(Path(path), arguments.tag)]
    curves = [curve for curve in curves if curve.group == (arguments.group or curve.group)]
    if not curves:
        raise DataError(f"no curve of group {arguments.group!r}", where=", ".join(arguments.input))
    curve = _select(curves, arguments.name)
    rules = replay_rules(curve, section, arguments.clock)
    if not arguments.beside:
        return _report(curve, rules if settings or curve.rules is None else curve.rules, None, arguments)
    if curve.rules is None or not settings:
        raise ConfigError(
            "--beside needs a run of resilient_t5 and settings: --convergence.preset NAME or --convergence.key VALUE"
        )
    return _report(curve, curve.rules, ReplayComparison(section.preset, replay(curve, rules, arguments.clock)), arguments)


def _report(curve: Curve, rules: Rules, other: ReplayComparison | None, arguments: argparse.Namespace) -> int:
    """Print and draw the replay; BAD_DATA when it differs from what the run itself recorded."""
    result = replay(curve, rules, arguments.clock)
    lines = story(result, whole=arguments.whole)
    if other:
        lines += ["", f"with {other.name} instead:", *story(other.replay, whole=arguments.whole)[1:]]
    differing = []
    if curve.recorded and curve.windows and rules == curve.rules:
        differing = differences(result)
        lines += differing or [f"agrees with the run's own verdicts at all {len(curve.recorded)} evaluations"]
    if arguments.png != "none":
        # Imported late: a replay without a picture needs no matplotlib.
        from resilient_t5.training.telemetry.plots import draw_replay

        draw_replay(result, Path(arguments.png), other)
        lines.append(f"picture: {arguments.png}")
    print("\n".join(line.encode("ascii", "replace").decode() for line in lines))
    return ExitCode.BAD_DATA if differing else ExitCode.OK


def _select(curves: list[Curve], name: str) -> Curve:
    """The only curve with the name `name`, or else with `name` as a part of its name."""
    matches = [curve for curve in curves if curve.name == name] or [curve for curve in curves if name in curve.name]
    if len(matches) == 1:
        return matches[0]
    names = ", ".join(curve.name for curve in (matches or curves)[:8])
    raise ConfigError(
        f"--name {name!r} matches {len(matches)} curves; choose one ({names}, ...), or compare rules over all of them with "
        "bin/benchmark stopping"
    )


def split_settings(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into the command's own arguments and the settings that the configuration parser reads."""
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
    parser.add_argument("--name", default="", help="which of several curves: its name or a part of it")
    parser.add_argument("--group", default="", help="only curves of this group")
    parser.add_argument("--tag", default=None, help="tag, column or key of the evaluation loss")
    parser.add_argument(
        "--png", default="replay.png", help="file of the picture, .png, .svg or .pdf (replay.png); none: no picture"
    )
    parser.add_argument(
        "--beside", action="store_true", help="report and draw the given settings in addition to the run's rules"
    )
    parser.add_argument("--whole", action="store_true", help="print every window, not only those with an event")
    parser.add_argument("--clock", choices=("windows", "updates"), default="windows", help="what an evaluation counts as")
    return parser
