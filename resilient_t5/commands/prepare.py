"""bin/prepare: prepare the store of a corpus and print its report."""

import sys
from collections.abc import Sequence

from resilient_t5.commands.failure import reported
from resilient_t5.config.parse import parse_config
from resilient_t5.config.schema import check_preparable
from resilient_t5.errors import ExitCode
from resilient_t5.training.signals import Stopped, StopSignal, progress_callback

DESCRIPTION = "Prepare a corpus for training: tokens, term occurrences and a report. Any number of runs can use the result."


def main(argv: Sequence[str] | None = None) -> int:
    """Run `bin/prepare` and return its exit code."""
    return reported(lambda: _prepare(sys.argv[1:] if argv is None else argv))


def _prepare(argv: Sequence[str]) -> int:
    config = parse_config(argv, "prepare", DESCRIPTION)
    check_preparable(config)
    # Imported late: --help and a usage error do not need the tokenizer libraries.
    from resilient_t5.data.store.corpus_report import readable, unknown_warning
    from resilient_t5.data.store.prepare import prepare, store_directory

    with StopSignal() as stop:
        on_progress = progress_callback(stop, lambda line: print(line, file=sys.stderr))
        try:
            store = prepare(config, store_directory(config), on_progress)
        except Stopped:
            print("stopped before the store was complete; partial files were removed", file=sys.stderr)
            return stop.exit_code
    sys.stdout.write(f"{readable(store.report)}\n{'store':>14}  {store.directory}\n")
    if (warning := unknown_warning(store.report)) is not None:
        print(f"prepare warning: {warning}", file=sys.stderr)
    return ExitCode.OK
