"""bin/train: prepare what is missing, train or resume, say how it ended, leave with the exit code."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resilient_t5.commands.failure import reported
from resilient_t5.commands.plan import plan_lines
from resilient_t5.commands.supervise import FLAG as SUPERVISE
from resilient_t5.commands.supervise import supervise
from resilient_t5.config.parse import Arguments, config_text, differences, parse_arguments
from resilient_t5.config.reference import write_commented
from resilient_t5.config.schema import check_trainable
from resilient_t5.errors import ConfigError, ExitCode

DESCRIPTION = "Train a T5 or mT5 to restore damaged text; an interrupted run goes on where it stopped."
FLAGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--init", {"type": str, "default": None, "help": "write all settings, with comments, into this new file and stop"}),
    ("--dry_run", {"type": str, "default": None, "help": "plan: say what would happen; update: do its hardest moments once"}),
    (SUPERVISE, {"action": "store_true", "help": "start the run again when it is killed, as long as it gets further"}),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `bin/train` and return its exit code."""
    format_statistics = "interrupted before training began; nothing to save"
    return reported(lambda: _train(sys.argv[1:] if argv is None else argv), format_statistics)


def _train(argv: Sequence[str]) -> int:
    own = [argument for argument in argv if argument != SUPERVISE]
    arguments = parse_arguments(own, "train", DESCRIPTION, FLAGS)
    if arguments.flags["init"] is not None:
        return _init(arguments)
    check_trainable(arguments.config)
    if arguments.flags["dry_run"] is not None:
        _require_alone("--dry_run: one process tells what each of them would need; start it without a launcher")
        return _dry_run(arguments)
    if len(own) < len(argv):
        _require_alone(f"{SUPERVISE}: let the launcher restart its processes, as torchrun does with --max-restarts 3")
        return supervise(own, Path(arguments.config.run.dir))
    return _run(arguments)


def _require_alone(instead: str) -> None:
    """Raise ConfigError when a launcher started this process together with others."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"{instead} (WORLD_SIZE is {os.environ['WORLD_SIZE']}; this is for one process)")


def _init(arguments: Arguments) -> ExitCode:
    path = Path(arguments.flags["init"])
    write_commented(arguments.config, path)
    sys.stdout.write(f"{path} holds every setting with its meaning; start with: bin/train --config {path}\n")
    return ExitCode.OK


def _dry_run(arguments: Arguments) -> ExitCode:
    if arguments.flags["dry_run"] not in ("plan", "update"):
        raise ConfigError(f"--dry_run is plan or update, not {arguments.flags['dry_run']!r}")
    from resilient_t5.training.entrypoints.dry_run import rehearse, write_plan

    if arguments.flags["dry_run"] == "update":
        return rehearse(arguments.config, _given(arguments))
    if not write_plan(arguments.config, _given(arguments), lambda line: print(line)):
        sys.stdout.write("\n".join(plan_lines(arguments)) + "\n")
    return ExitCode.OK


def _run(arguments: Arguments) -> ExitCode:
    # Imported late: torch and transformers take seconds, and --help and a typo must not wait for them.
    from resilient_t5.training.entrypoints.train import train_in_directory

    return train_in_directory(arguments.config, config_text(arguments.config), _given(arguments))


def _given(arguments: Arguments) -> dict[str, tuple[Any, str]]:
    """The settings that differ from the defaults, each with the place it was given at."""
    return {key: (value, arguments.sources.get(key, "")) for key, value in differences(arguments.config).items()}


if __name__ == "__main__":
    raise SystemExit(main())
