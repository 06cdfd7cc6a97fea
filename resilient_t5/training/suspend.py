"""Whether the machine slept."""

import time


def slept_s() -> float:
    """Seconds that this machine has spent suspended since it was booted; 0 where the system does not tell."""
    if not hasattr(time, "CLOCK_BOOTTIME"):
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)
