"""How long one question may take, and when it is worth another try.

stamina runs the attempts; what it cannot know is what a service said, and how much time
the caller has left. So how long to wait is decided here.
"""

import random
import time

from quintet_client.errors import DeadlineExceeded, Overloaded, Unavailable

_FIRST_WAIT_SECONDS = 0.1
_LONGEST_WAIT_SECONDS = 2.0
_FOR_EVER = 1_000_000


class Patience:
    """The time and the tries that are left for one question.

    Only refusals and lost connections are tried again: those may pass, and none of our
    models remembers a request, so asking twice does no harm.

    Attributes:
        attempts: How often to try in all.
    """

    def __init__(self, timeout: float, retries: int) -> None:
        """Start the clock: `timeout` seconds for all, at most `retries` tries after the first."""
        self._deadline = time.monotonic() + timeout
        self._longest_try = timeout
        self._retried: tuple[type[Exception], ...] = (Overloaded, Unavailable)
        self._failures = 0
        self._is_over = False
        self.attempts = retries + 1

    @classmethod
    def of_a_stream(cls, timeout: float, outage: float) -> "Patience":
        """For one of many inputs: tries of `timeout` seconds each, until one of `outage` seconds is over.

        A service that is killed while it thinks may leave its callers in silence; a stream
        asks again after that too, where a single question would be told.
        """
        patience = cls(max(timeout, outage), _FOR_EVER)
        patience._longest_try = timeout
        patience._retried = (Overloaded, Unavailable, DeadlineExceeded)
        return patience

    def seconds_left(self) -> float:
        """Seconds that the next try may take, and never so few that a library takes them for none."""
        return max(min(self._longest_try, self._deadline - time.monotonic()), 0.001)

    def end(self) -> None:
        """Try no more: nobody waits for the answer any longer."""
        self._is_over = True

    def wait_after(self, error: Exception) -> bool | float:
        """Seconds to wait before trying again after `error`, or False for no more tries.

        The wait doubles with each failure, half of it by chance, so that callers who were
        refused together do not come back together. It is never shorter than the service
        asks; where that would be too late for the caller, the refusal is the answer.
        """
        if self._is_over or not isinstance(error, self._retried):
            return False
        longest = min(_FIRST_WAIT_SECONDS * 2 ** min(self._failures, 10), _LONGEST_WAIT_SECONDS)
        self._failures += 1
        asked = getattr(error, "retry_after", None) or 0.0
        seconds: float = asked + random.uniform(longest / 2, longest)
        return seconds if seconds < self._deadline - time.monotonic() else False
