"""What the models of one worker share, a batch at a time, in fair turns: threads, and the event loop."""

import asyncio
import contextlib
import math
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Protocol, TypeVar

import structlog

log = structlog.get_logger("quintet")

T = TypeVar("T")

NICENESS: Final = 10
"""Of threads beside the event loop's. Where they want one core, the loop gets nine tenths of it."""

LEAD_SECONDS: Final = 0.004
"""So much more a model on the loop may have used than one in a lane, whose time shows when its batch ends."""

SAVED_SECONDS: Final = 0.005
"""So much less than the others a model on the loop may have used when it comes back. Its callers wait for
each answer before they ask again, which leaves it without work for a moment after every batch."""

MOST_BEHIND_SECONDS: Final = 0.25
"""Who comes late is not further behind than that: the others wait no longer until it has caught up."""


def step_back() -> None:
    """Let the event loop's thread go before the calling one: everybody waits for that one.

    Linux gives each thread a niceness of its own; elsewhere nothing changes.
    """
    with contextlib.suppress(OSError, AttributeError):
        mine = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), mine + NICENESS)


class Customer(Protocol):
    """Who shares what there is."""

    spent_seconds: float
    """Used so far; the ledger raises it for whoever comes back after a pause."""


class LaneCustomer(Customer, Protocol):
    """Who asks for lanes."""

    def take_turn(self) -> bool:
        """Start one piece of work with `Lanes.start`; False where there is none left to do."""


class LoopCustomer(Customer, Protocol):
    """Who asks for turns of the event loop."""

    def run_turn(self, seconds: float) -> None:
        """Run one piece of work on the loop that takes no longer than that, if it can be had so small."""


class Ledger:
    """Who has used how much, of those who want more.

    That is start-time fair queueing (Goyal, Vin and Cheng, 1996): whoever has used the least
    goes first, and whoever comes back after a pause has neither debts nor savings, or small ones
    (as Linux's scheduler has left tasks that slept; Molnar, *CFS Scheduler*, 2007).
    """

    def __init__(self) -> None:
        self._active: list[Customer] = []
        self._most_seen = 0.0

    def enter(self, customer: Customer, saved_seconds: float = 0.0) -> None:
        """Note that the customer wants something, once for each thing.

        Args:
            customer: Who wants it.
            saved_seconds: So much less than all others it may have used.
        """
        spent = [one.spent_seconds for one in self._active]
        least = min(spent, default=self._most_seen)
        if spent and customer not in self._active:
            # Some may have used more than a newcomer's turns would make up for soon.
            least = max(least, max(spent) - MOST_BEHIND_SECONDS)
        customer.spent_seconds = max(customer.spent_seconds, least - saved_seconds)
        self._active.append(customer)

    def leave(self, customer: Customer) -> None:
        """Note that it has had, or no longer wants, one thing."""
        self._active.remove(customer)
        self._most_seen = max(self._most_seen, customer.spent_seconds)


class Lanes:
    """So many threads, each given to whoever has used the least so far.

    A model with large batches gets fewer of them. All calls are made on one event loop.
    """

    def __init__(self, count: int) -> None:
        self.ledger = Ledger()
        self.on_change: Callable[[], None] = lambda: None
        self._executor = ThreadPoolExecutor(count, "lane", step_back)
        self._free = count
        self._asking: list[LaneCustomer] = []
        self._running: list[LaneCustomer] = []
        self._is_granting = False

    def ask(self, customer: LaneCustomer) -> None:
        """Call the customer's `take_turn` once, as soon as a lane is free and it is their turn."""
        self.ledger.enter(customer)
        self._asking.append(customer)
        self._grant()

    def start(self, work: Callable[[], T], on_done: Callable[[T], None]) -> None:
        """Run work that cannot fail in a thread, then `on_done` on the loop."""
        future = asyncio.get_running_loop().run_in_executor(self._executor, work)
        future.add_done_callback(lambda done: on_done(done.result()))

    def give_back(self, customer: LaneCustomer, seconds: float) -> None:
        """Free a lane that the customer has used, for so much longer than it was charged."""
        customer.spent_seconds += seconds
        self._free += 1
        self._running.remove(customer)
        self.ledger.leave(customer)
        self._grant()
        self.on_change()

    def least_spent(self) -> float:
        """What the customer has used that has had the least, of those in lanes or waiting for one."""
        return min((one.spent_seconds for one in (*self._running, *self._asking)), default=math.inf)

    def _grant(self) -> None:
        if self._is_granting:
            return
        self._is_granting = True
        try:
            while self._free and self._asking:
                customer = min(self._asking, key=lambda one: one.spent_seconds)
                self._asking.remove(customer)
                self._free -= 1
                self._running.append(customer)
                if not customer.take_turn():
                    self._free += 1
                    self._running.remove(customer)
                    self.ledger.leave(customer)
                    self.on_change()
        finally:
            self._is_granting = False

    def close(self) -> None:
        """Let the threads end once they are done."""
        self._executor.shutdown(wait=False)


class LoopTurns:
    """Turns of the event loop, each shared by who asked for it, those who have used the least first.

    Everybody on the loop waits for all of them together, so together they take about as long as one
    alone may; for whom there is too little left the next turn comes. Who is far ahead of those in
    lanes waits for them: the loop's thread goes before theirs, and would leave them nothing.
    All calls are made on one event loop.
    """

    def __init__(self, seconds: float = math.inf, lanes: Lanes | None = None) -> None:
        """Make turns of so many seconds.

        Args:
            seconds: That all take together.
            lanes: On the same cores, to be fair to; None where they have cores of their own.
        """
        self._seconds = seconds
        self._lanes = lanes
        self._ledger = Ledger()
        if lanes is not None:
            self._ledger = lanes.ledger
            lanes.on_change = self._go_on
        self._asking: list[LoopCustomer] = []
        self._held: list[LoopCustomer] = []

    def ask(self, customer: LoopCustomer) -> None:
        """Call the customer's `run_turn` once, in the loop's next turn or in one soon after."""
        self._ledger.enter(customer, SAVED_SECONDS)
        self._book(customer)

    def _book(self, customer: LoopCustomer) -> None:
        if not self._asking:
            # Not at once: others whose bytes came in the same turn of the loop join in, and those whose
            # bytes come while it looks at its sockets once more.
            loop = asyncio.get_running_loop()
            loop.call_soon(loop.call_soon, self._turn)
        self._asking.append(customer)

    def _go_on(self) -> None:
        held, self._held = self._held, []
        for customer in held:
            self._book(customer)

    def _turn(self) -> None:
        asking, self._asking = self._asking, []
        most = math.inf if self._lanes is None else self._lanes.least_spent() + LEAD_SECONDS
        left = self._seconds
        for customer in sorted(asking, key=lambda one: one.spent_seconds):
            if customer.spent_seconds > most:
                self._held.append(customer)
            elif left < self._seconds / 2:
                # A small rest would make a small batch, and those are dear.
                self._book(customer)
            else:
                started = time.perf_counter()
                try:
                    customer.run_turn(left)
                except Exception:
                    # A full disk under the metrics, say; the others' turns are not to blame.
                    log.exception("a turn of the event loop failed")
                self._ledger.leave(customer)
                left -= time.perf_counter() - started
