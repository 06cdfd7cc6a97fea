"""What is heard while a corpus is prepared: how far it is, and a stop request."""

import time
from collections.abc import Callable

from resilient_t5.training.signals import Stopped, StopSignal

PROGRESS_EVERY_S = 5.0


def progress_teller(stop: StopSignal, tell: Callable[[str], None]) -> Callable[[int, int], None]:
    """A callback for `data.prepare` that says now and then how far it is, in bytes, and ends the work at a stop request.

    Raises (the callback):
        Stopped: the process was asked to stop.
    """
    told_s = time.monotonic()

    def on_progress(done_bytes: int, total_bytes: int) -> None:
        nonlocal told_s
        if stop.requested:
            raise Stopped
        if time.monotonic() - told_s >= PROGRESS_EVERY_S:
            told_s = time.monotonic()
            if done_bytes == total_bytes == 0:
                tell("prepare waits for another process that makes the same store")
            elif done_bytes == 0:
                tell("prepare trains the tokenizer on a sample of the text")
            elif total_bytes == 0:
                tell(f"prepare {done_bytes / 1e6:.1f} MB of the built-in corpus")
            else:
                tell(f"prepare {100 * done_bytes / total_bytes:5.1f}% of {total_bytes / 1e6:.1f} MB")

    return on_progress
