"""bin/prepare: make the store of a corpus, or the part of one shard, or join the parts; print the report."""

import re
import sys
from collections.abc import Sequence

from resilient_t5.commands.failure import reported
from resilient_t5.config.parse import Arguments, parse_arguments
from resilient_t5.config.schema import check_preparable
from resilient_t5.errors import ConfigError, ExitCode
from resilient_t5.training.signals import Stopped, StopSignal, progress_callback

DESCRIPTION = "Prepare a corpus: tokens, term occurrences and a report, once, for any number of runs."
SHARD = re.compile(r"([1-9]\d{0,5})/([1-9]\d{0,5})")
FLAGS = (
    ("--shard", {"type": str, "default": None, "help": "i/n: prepare only part i of n (1 to n)"}),
    ("--merge", {"type": int, "default": None, "help": "n: join the n parts that --shard made into the store"}),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `bin/prepare` and return its exit code."""
    return reported(lambda: _prepare(sys.argv[1:] if argv is None else argv))


def _prepare(argv: Sequence[str]) -> int:
    arguments = parse_arguments(argv, "prepare", DESCRIPTION, FLAGS)
    check_preparable(arguments.config)
    shard = _shard(arguments)
    # Imported late: --help and a typo must not wait for the tokenizer libraries.
    from resilient_t5.data.store.corpus_report import readable, unknown_warning
    from resilient_t5.data.store.prepare import merge_shards, prepare, prepare_shard, store_directory

    config, directory = arguments.config, store_directory(arguments.config)
    with StopSignal() as stop:
        on_progress = progress_callback(stop, _tell)
        try:
            if shard is not None:
                sys.stdout.write(
                    f"part of shard {shard[0]}/{shard[1]}: {prepare_shard(config, directory, shard, on_progress)}\n"
                )
                return ExitCode.OK
            merged = arguments.flags["merge"]
            store = prepare(config, directory, on_progress) if merged is None else merge_shards(config, directory, merged)
        except Stopped:
            sys.stderr.write("stopped before the store was whole; nothing half made was left\n")
            return stop.exit_code
    sys.stdout.write(f"{readable(store.report)}\n{'store':>14}  {store.directory}\n")
    if (warning := unknown_warning(store.report)) is not None:
        _tell(f"prepare warning: {warning}")
    return ExitCode.OK


def _shard(arguments: Arguments) -> tuple[int, int] | None:
    """The shard asked for.

    Raises:
        ConfigError: --shard or --merge make no sense.
    """
    text, merged = arguments.flags["shard"], arguments.flags["merge"]
    if text is not None and merged is not None:
        raise ConfigError("--shard and --merge exclude each other: prepare every part, then merge")
    if merged is not None and merged < 1:
        raise ConfigError(f"--merge {merged} is below 1; write the number of parts")
    if text is None:
        return None
    match = SHARD.fullmatch(text)
    if match is None or int(match[1]) > int(match[2]):
        raise ConfigError(f"--shard {text!r} is not i/n with 1 <= i <= n, such as 2/8")
    return int(match[1]), int(match[2])


def _tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")
