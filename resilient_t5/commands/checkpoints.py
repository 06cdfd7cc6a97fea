"""bin/checkpoints: list and verify the checkpoints of a run; read-only."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from resilient_t5.commands.failure import reported
from resilient_t5.errors import ExitCode, NoValidCheckpoint

DESCRIPTION = "List the checkpoints of a run, newest first; --verify also checks the sha256 of every file."


def main(argv: Sequence[str] | None = None) -> int:
    """Run `bin/checkpoints` and return its exit code: 0, or 66 if a checkpoint is damaged or there is none."""
    parser = argparse.ArgumentParser(prog="bin/checkpoints", description=DESCRIPTION)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--verify", action="store_true", help="check the sha256 of every file")
    arguments = parser.parse_args(argv)
    return reported(lambda: _list(arguments.run, arguments.verify))


def _list(run: Path, verify: bool) -> int:
    # Imported late: torch takes seconds to import, and --help does not need it.
    from resilient_t5.checkpoint.manifest import CorruptCheckpoint, checkpoint_names
    from resilient_t5.checkpoint.reader import read_directory, read_stored
    from resilient_t5.files import FileSystem

    directory, fs, damaged = run / "checkpoints", FileSystem(), 0
    names = checkpoint_names(fs, directory)
    if not names:
        raise NoValidCheckpoint(f"{run} contains no checkpoint", where=str(directory), hint="Give the run directory")
    for name in names:
        try:
            manifest, _ = read_stored(fs, directory / name, None)
            if verify:
                read_directory(fs, directory / name, None)
            metric = "" if manifest.metric is None else f" | loss {manifest.metric:.4f}"
            marks = f"{'  best' if manifest.is_best else ''}{'' if manifest.healthy else '  not healthy'}"
            state = "verified" if verify else "sizes match"
            size = f"{manifest.bytes / 2**20:.1f} MiB"
            sys.stdout.write(f"{name}  {manifest.reason:<8} {manifest.created}  {size}  {state}{metric}{marks}\n")
        except CorruptCheckpoint as damage:
            damaged += 1
            sys.stdout.write(f"{name}  DAMAGED  {damage}\n")
    return int(ExitCode.NO_VALID_CHECKPOINT if damaged else ExitCode.OK)
