"""Turn exceptions of a command into an exit code and a message; only unexpected errors print a traceback."""

import os
import sys
import traceback
from collections.abc import Callable

from resilient_t5.errors import NO_SPACE, ExitCode, ResilientError


def reported(command: Callable[[], int], interrupted: str = "interrupted") -> int:
    """Run `command`, which returns an exit code; print an exception to stderr and return its exit code.

    Args:
        interrupted: message after Ctrl+C.
    """
    try:
        return int(command())
    except ResilientError as error:
        sys.stderr.write(f"{error}\n")
        return int(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write(f"{interrupted}\n")
        return int(ExitCode.INTERRUPTED)
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise the flush at exit fails
        return int(ExitCode.IO_ERROR)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        full = error.errno in NO_SPACE
        sys.stderr.write(f"{'disk full' if full else 'i/o error'}: {error.strerror or error}{where}\n")
        return int(ExitCode.DISK_FULL if full else ExitCode.IO_ERROR)
    except Exception as error:  # noqa: BLE001  outermost frame: an unexpected error prints its traceback
        if _is_out_of_memory(error):
            reason = str(error).partition("\n")[0][:300] or type(error).__name__
            sys.stderr.write(f"out of memory: {reason}. bin/plan lists what fits\n")
            return int(ExitCode.OUT_OF_MEMORY)
        traceback.print_exc()
        return int(ExitCode.UNEXPECTED)


def _is_out_of_memory(error: Exception) -> bool:
    # Imported only if torch is loaded already: other commands do not need it.
    if isinstance(error, MemoryError) or "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from resilient_t5.training.hardware.machine import is_out_of_memory

    return is_out_of_memory(error)
