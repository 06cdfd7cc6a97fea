"""Exit codes and the exception types behind them.

Every error that a user can cause says what is wrong, where, and how to fix it; the commands print it without a
traceback and leave with its exit code. An unexpected error keeps its traceback and leaves with 1.
"""

from enum import IntEnum


class ExitCode(IntEnum):
    """What a finished process tells its caller; a wrapper can tell done, resumable and broken apart."""

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
        where: the file, key, line or byte it concerns; empty when `what` already says it.
        hint: what to do about it, one sentence.
    """

    exit_code = ExitCode.UNEXPECTED
    label = "error"

    def __init__(self, what: str, *, where: str = "", hint: str = ""):
        self.what, self.where, self.hint = what, where, hint
        super().__init__(what)

    def __str__(self) -> str:
        place = f" ({self.where})" if self.where else ""
        cure = f". {self.hint}" if self.hint else ""
        return f"{self.label}: {self.what}{place}{cure}"


class ConfigError(ResilientError):
    """One or more problems of the configuration or the command line; `problems` lists them all."""

    exit_code = ExitCode.USAGE
    label = "config error"

    def __init__(self, *problems: str):
        self.problems = problems
        super().__init__("; ".join(problems))

    def __str__(self) -> str:
        return "\n".join(f"{self.label}: {problem}" for problem in self.problems)


class RunDirectoryError(ResilientError):
    """The run directory holds something that this command must not touch."""

    exit_code = ExitCode.USAGE
    label = "run error"


class DataError(ResilientError):
    """Text, terms, a store or a model directory that cannot be used as it is."""

    exit_code = ExitCode.BAD_DATA
    label = "data error"


class NoValidCheckpoint(ResilientError):
    """Checkpoints were expected and none passes verification; nothing was deleted."""

    exit_code = ExitCode.NO_VALID_CHECKPOINT
    label = "checkpoint error"


class RunHeld(ResilientError):
    """Another live process holds the run directory."""

    exit_code = ExitCode.RUN_HELD
    label = "run error"


class Diverged(ResilientError):
    """The guard gave up: the run cannot be trained on as it is configured."""

    exit_code = ExitCode.DIVERGED
    label = "diverged"


class DeviceLost(ResilientError):
    """The device does not answer any more; the last commit stands, and a new process can go on from it."""

    exit_code = ExitCode.RESUMABLE
    label = "device lost"


class ProcessLost(ResilientError):
    """Another process of the same run is gone or does not answer; the last commit stands, and all may be started again."""

    exit_code = ExitCode.RESUMABLE
    label = "process lost"


class ProcessFailed(ResilientError):
    """Another process of the same run failed and told why; this one leaves with its exit code."""

    label = "error"

    def __init__(self, what: str, *, exit_code: ExitCode):
        super().__init__(what)
        self.exit_code = exit_code


class OutOfMemory(ResilientError):
    """The device has too little memory for the smallest micro-batch that was tried."""

    exit_code = ExitCode.OUT_OF_MEMORY
    label = "out of memory"


class DiskFull(ResilientError):
    """There is no room for what must be written; what stood on disk before is intact."""

    exit_code = ExitCode.DISK_FULL
    label = "disk full"


class StorageError(ResilientError):
    """The file system refused an operation; the first errno is named."""

    exit_code = ExitCode.IO_ERROR
    label = "i/o error"


class ResumeMismatch(ResilientError):
    """Resuming with this configuration or data would change the mathematics of the run."""

    exit_code = ExitCode.RESUME_MISMATCH
    label = "resume error"
