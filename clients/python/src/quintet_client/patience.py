"""How long one call may take, and when it is worth another try.

stamina runs the attempts; what it cannot know is what a service said, and how much time
the caller has left. So how long to wait is decided here.
"""

import random
import time

from quintet_client.errors import Overloaded, Unavailable

_FIRST_WAIT_SECONDS = 0.1
_LONGEST_WAIT_SECONDS = 5.0


class Patience:
    """The time and the tries that are left for one call.

    Only refusals and lost connections are tried again: those may pass, and none of our
    models remembers a request, so asking twice does no harm.

    Attributes:
        attempts: How often to try in all.
    """

    def __init__(self, timeout: float, retries: int) -> None:
        """Start the clock: `timeout` seconds for all, at most `retries` tries after the first."""
        self._deadline = time.monotonic() + timeout
        self.attempts = retries + 1
        self._failures = 0

    def seconds_left(self) -> float:
        """Seconds until the deadline, and never so few that a library takes them for none."""
        return max(self._deadline - time.monotonic(), 0.001)

    def wait_after(self, error: Exception) -> bool | float:
        """Seconds to wait before trying again after `error`, or False for no more tries.

        The wait doubles with each failure, half of it by chance, so that callers who were
        refused together do not come back together. It is never shorter than the service
        asks; where that would be too late for the caller, the refusal is the answer.
        """
        if not isinstance(error, Overloaded | Unavailable):
            return False
        longest = min(_FIRST_WAIT_SECONDS * 2**self._failures, _LONGEST_WAIT_SECONDS)
        self._failures += 1
        seconds = (error.retry_after or 0.0) + random.uniform(longest / 2, longest)
        return seconds if seconds < self.seconds_left() else False
