"""bin/train: prepare the corpus if necessary, train or resume, return the exit code."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resilient_t5.commands.failure import reported
from resilient_t5.commands.plan import plan_lines
from resilient_t5.commands.supervise import FLAG as SUPERVISE
from resilient_t5.commands.supervise import supervise
from resilient_t5.config.parse import Arguments, config_text, parse_arguments
from resilient_t5.config.reference import write_commented
from resilient_t5.config.schema import check_trainable, non_default_settings
from resilient_t5.errors import ConfigError, ExitCode

DESCRIPTION = "Train a T5 or mT5 model to restore damaged text; an interrupted run resumes where it stopped."
FLAGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--init", {"type": str, "default": None, "help": "write all settings with comments to this new file and exit"}),
    (
        "--dry_run",
        {
            "type": str,
            "default": None,
            "help": "plan: print what the run would do; update: try the largest update and a save",
        },
    ),
    (SUPERVISE, {"action": "store_true", "help": "restart the run if it is killed, as long as it makes progress"}),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `bin/train` and return its exit code."""
    interrupted = "interrupted before training started; nothing to save"
    return reported(lambda: _train(sys.argv[1:] if argv is None else argv), interrupted)


def _train(argv: Sequence[str]) -> int:
    own = [argument for argument in argv if argument != SUPERVISE]
    arguments = parse_arguments(own, "train", DESCRIPTION, FLAGS)
    if arguments.flags["init"] is not None:
        return _init(arguments)
    check_trainable(arguments.config)
    if arguments.flags["dry_run"] is not None:
        _require_single_process("--dry_run: start it without a launcher; one process reports what each of them would need")
        return _dry_run(arguments)
    if len(own) < len(argv):
        _require_single_process(f"{SUPERVISE}: use the restarts of the launcher, such as torchrun --max-restarts 3")
        return supervise(own, Path(arguments.config.run.dir))
    return _run(arguments)


def _require_single_process(problem: str) -> None:
    """Raise ConfigError if a launcher started several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"{problem} (WORLD_SIZE is {os.environ['WORLD_SIZE']}, this option needs one process)")


def _init(arguments: Arguments) -> ExitCode:
    path = Path(arguments.flags["init"])
    write_commented(arguments.config, path)
    sys.stdout.write(f"all settings written to {path}; start with: bin/train --config {path}\n")
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
    # Imported late: torch and transformers take seconds to import; --help and a usage error do not need them.
    from resilient_t5.training.entrypoints.train import train_in_directory

    return train_in_directory(arguments.config, config_text(arguments.config), _given(arguments))


def _given(arguments: Arguments) -> dict[str, tuple[Any, str]]:
    """Non-default settings as {"section.key": (value, source)}."""
    return {key: (value, arguments.sources.get(key, "")) for key, value in non_default_settings(arguments.config).items()}


if __name__ == "__main__":
    raise SystemExit(main())
