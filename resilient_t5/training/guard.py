"""The guard: a loss or gradient that is not finite never moves the weights, and is never hidden.

`train_update` refuses such an update before the optimizer moves; the guard counts and decides. A few single refusals
are survived, since the next update sees other examples; a series of them means that the run is broken.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

CONSECUTIVE_LIMIT = 3
WINDOW_UPDATES = 1000
WINDOW_LIMIT = 10


@dataclass
class Guard:
    """Counts refused updates; JSON state.

    `tolerated` more refusals are allowed: with fp16, overflows are how the loss scale is found.
    """

    consecutive: int = 0
    total: int = 0
    recent_attempts: deque[int] = field(default_factory=deque)
    tolerated: int = 0

    def observe(self, attempted: int) -> str | None:
        """Account for a refusal after `attempted` attempts; a diagnosis when the run must end, else None."""
        follows_last = bool(self.recent_attempts) and self.recent_attempts[-1] == attempted - 1
        self.consecutive = self.consecutive + 1 if follows_last else 1
        self.total += 1
        self.recent_attempts.append(attempted)
        while self.recent_attempts and self.recent_attempts[0] <= attempted - WINDOW_UPDATES:
            self.recent_attempts.popleft()
        if self.consecutive > CONSECUTIVE_LIMIT + self.tolerated:
            return f"{self.consecutive} updates in a row had no finite loss or gradient"
        if len(self.recent_attempts) > WINDOW_LIMIT + self.tolerated:
            return f"{len(self.recent_attempts)} of the last {WINDOW_UPDATES} updates had no finite loss or gradient"
        return None

    def to_json(self) -> dict[str, Any]:
        """Plain values for state.json."""
        return {"consecutive": self.consecutive, "total": self.total, "recent_attempts": list(self.recent_attempts)}

    def restore(self, values: dict[str, Any]) -> None:
        """Take back what `to_json` gave."""
        self.consecutive, self.total = values["consecutive"], values["total"]
        self.recent_attempts = deque(values["recent_attempts"])
