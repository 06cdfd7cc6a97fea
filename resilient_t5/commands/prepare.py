"""bin/prepare: prepare the store of a corpus or one shard of it, or merge the shards; print the report."""

import re
import sys
from collections.abc import Sequence

from resilient_t5.commands.failure import reported
from resilient_t5.config.parse import Arguments, parse_arguments
from resilient_t5.config.schema import check_preparable
from resilient_t5.errors import ConfigError, ExitCode
from resilient_t5.training.signals import Stopped, StopSignal, progress_callback

DESCRIPTION = "Prepare a corpus for training: tokens, term occurrences and a report. Any number of runs can use the result."
SHARD = re.compile(r"([1-9]\d{0,5})/([1-9]\d{0,5})")
FLAGS = (
    ("--shard", {"type": str, "default": None, "help": "i/n: prepare shard i (1 to n) of n only"}),
    ("--merge", {"type": int, "default": None, "help": "n: merge the n shards into the store"}),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `bin/prepare` and return its exit code."""
    return reported(lambda: _prepare(sys.argv[1:] if argv is None else argv))


def _prepare(argv: Sequence[str]) -> int:
    arguments = parse_arguments(argv, "prepare", DESCRIPTION, FLAGS)
    check_preparable(arguments.config)
    shard = _shard(arguments)
    # Imported late: --help and a usage error do not need the tokenizer libraries.
    from resilient_t5.data.store.corpus_report import readable, unknown_warning
    from resilient_t5.data.store.prepare import merge_shards, prepare, prepare_shard, store_directory

    config, directory = arguments.config, store_directory(arguments.config)
    with StopSignal() as stop:
        on_progress = progress_callback(stop, lambda line: print(line, file=sys.stderr))
        try:
            if shard is not None:
                path = prepare_shard(config, directory, shard, on_progress)
                sys.stdout.write(f"shard {shard[0]}/{shard[1]}: {path}\n")
                return ExitCode.OK
            merged = arguments.flags["merge"]
            store = prepare(config, directory, on_progress) if merged is None else merge_shards(config, directory, merged)
        except Stopped:
            print("stopped before the store was complete; partial files were removed", file=sys.stderr)
            return stop.exit_code
    sys.stdout.write(f"{readable(store.report)}\n{'store':>14}  {store.directory}\n")
    if (warning := unknown_warning(store.report)) is not None:
        print(f"prepare warning: {warning}", file=sys.stderr)
    return ExitCode.OK


def _shard(arguments: Arguments) -> tuple[int, int] | None:
    """The value of --shard.

    Raises:
        ConfigError: --shard or --merge is invalid.
    """
    text, merged = arguments.flags["shard"], arguments.flags["merge"]
    if text is not None and merged is not None:
        raise ConfigError("--shard and --merge exclude each other: prepare every shard, then merge")
    if merged is not None and merged < 1:
        raise ConfigError(f"--merge {merged} is below 1; give the number of shards")
    if text is None:
        return None
    match = SHARD.fullmatch(text)
    if match is None or int(match[1]) > int(match[2]):
        raise ConfigError(f"--shard {text!r} is not i/n with 1 <= i <= n, such as 2/8")
    return int(match[1]), int(match[2])
