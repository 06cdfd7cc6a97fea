"""How a command ends: an exit code for the caller, one clear message for the user, a traceback only for our own bugs."""

import errno
import os
import sys
import traceback
from collections.abc import Callable

from resilient_t5.errors import ExitCode, ResilientError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def reported(command: Callable[[], int], interrupted: str = "interrupted") -> int:
    """Run `command`; turn what it raises into a message on stderr and the exit code that belongs to it.

    Args:
        command: returns an exit code.
        interrupted: what a Ctrl+C is answered with.
    """
    try:
        return int(command())
    except ResilientError as error:
        sys.stderr.write(f"{error}\n")
        return int(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write(f"{interrupted}\n")
        return int(ExitCode.INTERRUPTED)
    except BrokenPipeError:  # whoever read the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it flushes at exit
        return int(ExitCode.IO_ERROR)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        full = error.errno in NO_SPACE
        sys.stderr.write(f"{'disk full' if full else 'i/o error'}: {error.strerror or error}{where}\n")
        return int(ExitCode.DISK_FULL if full else ExitCode.IO_ERROR)
    except Exception as error:  # noqa: BLE001  the last frame of a command: an unexpected error keeps its traceback
        if _is_out_of_memory(error):
            said = str(error).partition("\n")[0][:300]
            sys.stderr.write(f"out of memory: {said or type(error).__name__}. Ask bin/plan what fits\n")
            return int(ExitCode.OUT_OF_MEMORY)
        traceback.print_exc()
        return int(ExitCode.UNEXPECTED)


def _is_out_of_memory(error: Exception) -> bool:
    """As `training.hardware.machine` says, which is imported only where torch is loaded already and may be what refused."""
    if isinstance(error, MemoryError) or "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from resilient_t5.training.hardware.machine import is_out_of_memory

    return is_out_of_memory(error)
