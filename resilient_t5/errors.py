"""Exit codes and the exceptions that cause them.

Every error that a user can cause states what is wrong, where, and how to fix it. The commands print it without a traceback and
exit with its code. An unexpected error is printed with its traceback, exit code 1.
"""

import errno
from enum import IntEnum

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
"""Errno values of a full disk or an exhausted quota."""


class ExitCode(IntEnum):
    """Exit codes of the commands; a wrapper can distinguish finished, resumable and failed."""

    OK = 0
    UNEXPECTED = 1
    USAGE = 2
    BAD_DATA = 65
    NO_VALID_CHECKPOINT = 66
    RUN_HELD = 69
    DIVERGED = 70
    OUT_OF_MEMORY = 71
    DISK_FULL = 73
    IO_ERROR = 74
    RESUMABLE = 75
    RESUME_MISMATCH = 78
    HANGUP = 129
    INTERRUPTED = 130
    TERMINATED = 143


class ResilientError(Exception):
    """A failure that a user can understand and fix.

    Args:
        what: what is wrong, one sentence without a final full stop.
        where: the file, key, line or byte; empty if `what` names it.
        hint: how to fix it, one sentence.
    """

    exit_code = ExitCode.UNEXPECTED
    label = "error"

    def __init__(self, what: str, *, where: str = "", hint: str = ""):
        self.what, self.where, self.hint = what, where, hint
        super().__init__(what)

    def __str__(self) -> str:
        place = f" ({self.where})" if self.where else ""
        hint = f". {self.hint}" if self.hint else ""
        return f"{self.label}: {self.what}{place}{hint}"


class ConfigError(ResilientError):
    """One or more problems of the configuration or the command line; `problems` lists all of them."""

    exit_code = ExitCode.USAGE
    label = "config error"

    def __init__(self, *problems: str):
        self.problems = problems
        super().__init__("; ".join(problems))

    def __str__(self) -> str:
        return "\n".join(f"{self.label}: {problem}" for problem in self.problems)


class RunDirectoryError(ResilientError):
    """The run directory contains files that this command must not change."""

    exit_code = ExitCode.USAGE
    label = "run error"


class DataError(ResilientError):
    """Text, terms, a store or a model directory that cannot be used."""

    exit_code = ExitCode.BAD_DATA
    label = "data error"


class NoValidCheckpoint(ResilientError):
    """Checkpoints were expected and none is valid; nothing was deleted."""

    exit_code = ExitCode.NO_VALID_CHECKPOINT
    label = "checkpoint error"


class RunHeld(ResilientError):
    """Another live process holds the run directory."""

    exit_code = ExitCode.RUN_HELD
    label = "run error"


class Diverged(ResilientError):
    """The guard aborted the run: training cannot continue with this configuration."""

    exit_code = ExitCode.DIVERGED
    label = "diverged"


class DeviceLost(ResilientError):
    """The device failed; the last commit is valid, and a new process can resume from it."""

    exit_code = ExitCode.RESUMABLE
    label = "device lost"


class ProcessLost(ResilientError):
    """Another process of the same run exited or does not respond; the last commit is valid, and all can be restarted."""

    exit_code = ExitCode.RESUMABLE
    label = "process lost"


class ProcessFailed(ResilientError):
    """Another process of the same run failed and reported its error; this one exits with the same code."""

    label = "error"

    def __init__(self, what: str, *, exit_code: ExitCode):
        super().__init__(what)
        self.exit_code = exit_code


class OutOfMemory(ResilientError):
    """The device has too little memory for the smallest micro-batch that was tried."""

    exit_code = ExitCode.OUT_OF_MEMORY
    label = "out of memory"


class DiskFull(ResilientError):
    """The disk is full; existing files are intact."""

    exit_code = ExitCode.DISK_FULL
    label = "disk full"


class StorageError(ResilientError):
    """A file system operation failed; names the first errno."""

    exit_code = ExitCode.IO_ERROR
    label = "i/o error"


class ResumeMismatch(ResilientError):
    """Resuming with this configuration or data would change the results of the run."""

    exit_code = ExitCode.RESUME_MISMATCH
    label = "resume error"


def plural(count: int, noun: str, several: str = "") -> str:
    """Return `1 window` or `2 windows`, for messages; `several` is an irregular plural."""
    return f"{count} {noun if count == 1 else several or f'{noun}s'}"
