"""bin/export: write the best or last weights of a run as a Hugging Face directory with a model card."""

import argparse
import contextlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from resilient_t5.commands.failure import reported
from resilient_t5.config.parse import CONFIG_FILE, run_config
from resilient_t5.errors import ConfigError, ExitCode, RunDirectoryError

DESCRIPTION = """Write the best or the last weights of a run as a Hugging Face directory: full vocabulary, tokenizer,
generation config, restoration.json, and a model card. The run may be interrupted or still training."""
EPILOG = (
    "exit codes: 0 done; 2 usage; 65 bad data; 66 no valid checkpoint; 69 run in use by another process; 73 disk full; 74 i/o"
)
LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `bin/export` and return its exit code."""
    return reported(lambda: _export(sys.argv[1:] if argv is None else argv))


def _export(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.license is not None and LICENSE.fullmatch(arguments.license) is None:
        raise ConfigError(f"--license {arguments.license!r} is not a licence identifier such as apache-2.0 or other")
    run = Path(arguments.run)
    if not (run / CONFIG_FILE).is_file():
        hint = "Give the run.dir of bin/train"
        raise RunDirectoryError(f"{run} is not a run directory", where=str(run / CONFIG_FILE), hint=hint)
    config = run_config(run, "export")
    own = run / "export" / arguments.which
    directory = own if arguments.to is None else Path(arguments.to).expanduser()
    if arguments.to is not None and directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise RunDirectoryError(f"{directory} is not empty", hint="Choose another --to")
    # Imported late: torch takes seconds to import; --help and a usage error do not need it.
    from resilient_t5.checkpoint.lock import RunLock
    from resilient_t5.training.entrypoints.export import export_run

    # A live run writes to its own export directory at the end; other directories need no lock.
    with RunLock(run) if arguments.to is None else contextlib.nullcontext():
        name = export_run(config, arguments.which, directory, arguments.license)
    sys.stdout.write(f"{directory}: checkpoint {name}, verified with transformers\n")
    return ExitCode.OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bin/export", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("--which", choices=("best", "last"), default="best", help="weights to export (best)")
    parser.add_argument("--to", metavar="DIR", help="output directory (RUN/export/best or RUN/export/last)")
    parser.add_argument("--license", metavar="NAME", help="licence for the model card, such as apache-2.0")
    return parser
