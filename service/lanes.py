"""What the models of one worker share, a batch at a time, in fair turns: threads, and the event loop."""

import asyncio
import contextlib
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Protocol, TypeVar

T = TypeVar("T")

NICENESS: Final = 2
"""Of threads beside the event loop's. Where they want one core, the loop gets three fifths of it."""


def step_back() -> None:
    """Let the event loop's thread go before the calling one: everybody waits for that one.

    Linux gives each thread a niceness of its own; elsewhere nothing changes.
    """
    with contextlib.suppress(OSError, AttributeError):
        mine = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), mine + NICENESS)


class LoopCustomer(Protocol):
    """Who asks for turns of the event loop."""

    def run_turn(self, seconds: float) -> None:
        """Run one piece of work on the loop that takes no longer than that, if it can be had so small."""


class LoopTurns:
    """Turns of the event loop, each shared by all who asked for it.

    Everybody on the loop waits for all of them together, so together they take no longer than one
    alone may: the more ask, the smaller their batches. All calls are made on one event loop.
    """

    def __init__(self, seconds: float = math.inf) -> None:
        """Make turns of so many seconds."""
        self._seconds = seconds
        self._asking: list[LoopCustomer] = []

    def ask(self, customer: LoopCustomer) -> None:
        """Call the customer's `run_turn` once, in the loop's next turn."""
        if not self._asking:
            # Not at once: others whose bytes came in the same turn of the loop join in.
            asyncio.get_running_loop().call_soon(self._turn)
        self._asking.append(customer)

    def _turn(self) -> None:
        asking, self._asking = self._asking, []
        for customer in asking:
            customer.run_turn(self._seconds / len(asking))


class Customer(Protocol):
    """Who asks for lanes."""

    spent_seconds: float
    """Lane time used so far; the lanes keep it."""

    def take_turn(self) -> bool:
        """Start one piece of work with `Lanes.start`; False where there is none left to do."""


class Lanes:
    """So many threads, each given to whoever has used the least of them so far.

    That is start-time fair queueing (Goyal, Vin and Cheng, 1996): a model with large batches
    gets fewer of them, and one that comes back after a pause has neither debts nor savings.
    All calls are made on one event loop.
    """

    def __init__(self, count: int) -> None:
        self._executor = ThreadPoolExecutor(count, "lane", step_back)
        self._free = count
        self._asking: list[Customer] = []
        self._spent_at_last_turn = 0.0
        self._is_granting = False

    def ask(self, customer: Customer) -> None:
        """Call the customer's `take_turn` once, as soon as a lane is free and it is their turn."""
        customer.spent_seconds = max(customer.spent_seconds, self._spent_at_last_turn)
        self._asking.append(customer)
        self._grant()

    def start(self, work: Callable[[], T], on_done: Callable[[T], None]) -> None:
        """Run work that cannot fail in a thread, then `on_done` on the loop."""
        future = asyncio.get_running_loop().run_in_executor(self._executor, work)
        future.add_done_callback(lambda done: on_done(done.result()))

    def give_back(self, customer: Customer, seconds: float) -> None:
        """Free a lane that the customer has used for so long."""
        customer.spent_seconds += seconds
        self._free += 1
        self._grant()

    def _grant(self) -> None:
        if self._is_granting:
            return
        self._is_granting = True
        try:
            while self._free and self._asking:
                customer = min(self._asking, key=lambda one: one.spent_seconds)
                self._asking.remove(customer)
                self._spent_at_last_turn = customer.spent_seconds
                self._free -= 1
                if not customer.take_turn():
                    self._free += 1
        finally:
            self._is_granting = False

    def close(self) -> None:
        """Let the threads end once they are done."""
        self._executor.shutdown(wait=False)
