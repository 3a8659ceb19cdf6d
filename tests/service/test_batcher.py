"""The real batcher, with small functions in the network's place."""

import asyncio
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from service.batcher import LARGEST_WASTE, PATIENCE_SECONDS, Batcher, Job, Priority, Row
from service.errors import BadInput, DeadlineExceeded, InternalError, Overloaded, QuintetError
from service.lanes import (
    LEAD_SECONDS,
    MOST_BEHIND_SECONDS,
    NICENESS,
    SAVED_SECONDS,
    Lanes,
    Ledger,
    LoopTurns,
)
from service.models.spec import Inputs, Sample, each

POISON = -1


def samples(*numbers: int) -> list[Sample]:
    return [Sample((np.array(number),)) for number in numbers]


def numbers_in(rows: Sequence[Row]) -> list[int]:
    return [int(row[0]) for row in rows]


class Doubler:
    """Gives every number twice as large, keeps the batches, and fails where poison is in one."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def __call__(self, batch: Sequence[Sample]) -> list[Row]:
        numbers = [int(sample.tensors[0]) for sample in batch]
        self.batches.append(numbers)
        if POISON in numbers:
            raise ValueError("poison")
        return [(np.array(2 * number),) for number in numbers]


class Gate(Doubler):
    """A doubler that waits inside until it is told to go on; for lanes only."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Semaphore(0)
        self.may_go = threading.Semaphore(0)

    def __call__(self, batch: Sequence[Sample]) -> list[Row]:
        self.entered.release()
        assert self.may_go.acquire(timeout=10)
        return super().__call__(batch)

    async def is_entered(self) -> None:
        assert await asyncio.to_thread(self.entered.acquire, timeout=10)

    def open(self) -> None:
        self.may_go.release(1000)


@pytest.fixture
def lanes() -> Iterator[Lanes]:
    lanes = Lanes(1)
    yield lanes
    lanes.close()


@pytest.fixture(params=["inline", "in lanes"])
def batcher_of(request: pytest.FixtureRequest) -> Iterator[Callable[..., Batcher]]:
    """`batcher_of(run, max_batch=4)`, on the event loop and in threads."""
    made: list[Lanes] = []

    def create(run: Callable[[Sequence[Sample]], list[Row]], *, threads: int = 1, **options: Any) -> Batcher:
        if request.param == "in lanes":
            made.append(Lanes(threads))
            options["lanes"] = made[-1]
        return Batcher(run, **{"queue_size": 1000, "max_batch": 8, **options})

    yield create
    for lanes in made:
        lanes.close()


async def ask(
    batcher: Batcher, *numbers: int, deadline: float | None = None, priority: Priority = Priority.NORMAL
) -> list[int]:
    """One request, from the queue's door to its rows."""
    batcher.admit(len(numbers))
    return numbers_in((await batcher.run([], samples(*numbers), deadline, priority)).rows)


async def all_at_once(batcher: Batcher, *requests: Sequence[int]) -> list[Any]:
    return await asyncio.gather(*(ask(batcher, *numbers) for numbers in requests), return_exceptions=True)


async def a_turn_of_the_loop() -> None:
    await asyncio.sleep(0)


async def test_a_request_gets_its_rows_in_its_own_order(batcher_of: Callable[..., Batcher]) -> None:
    assert await ask(batcher_of(Doubler()), 3, 1, 2) == [6, 2, 4]


async def test_requests_of_one_moment_run_together_and_each_gets_its_own(
    batcher_of: Callable[..., Batcher],
) -> None:
    double = Doubler()
    answers = await all_at_once(batcher_of(double), [1], [2, 3], [4])
    assert answers == [[2], [4, 6], [8]]
    assert double.batches == [[1, 2, 3, 4]]


async def test_a_request_larger_than_a_batch_is_split_and_put_together_again(
    batcher_of: Callable[..., Batcher],
) -> None:
    double = Doubler()
    assert await ask(batcher_of(double, max_batch=4), *range(10)) == list(range(0, 20, 2))
    assert double.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


async def test_the_rest_of_a_split_request_is_filled_up_with_the_next_one(
    batcher_of: Callable[..., Batcher],
) -> None:
    double = Doubler()
    assert await all_at_once(batcher_of(double, max_batch=4), range(6), [6, 7]) == [
        [0, 2, 4, 6, 8, 10],
        [12, 14],
    ]
    assert double.batches == [[0, 1, 2, 3], [4, 5, 6, 7]]


async def test_a_full_queue_refuses_at_once_and_only_what_is_too_much(
    batcher_of: Callable[..., Batcher],
) -> None:
    double = Doubler()
    batcher = batcher_of(double, queue_size=3)
    batcher.admit(2)
    with pytest.raises(Overloaded):
        batcher.admit(2)
    assert batcher.depth == 2
    batcher.admit(1)
    with pytest.raises(Overloaded):
        batcher.admit(1)
    assert double.batches == []


async def test_places_come_back_when_the_work_is_done(batcher_of: Callable[..., Batcher]) -> None:
    batcher = batcher_of(Doubler(), queue_size=3)
    for _ in range(3):
        assert await ask(batcher, 1, 2, 3) == [2, 4, 6]
        assert batcher.depth == 0


async def test_places_come_back_when_the_work_fails(batcher_of: Callable[..., Batcher]) -> None:
    batcher = batcher_of(Doubler(), queue_size=3)
    for _ in range(3):
        with pytest.raises(InternalError):
            await ask(batcher, 1, POISON, 3)
        assert batcher.depth == 0


async def test_places_come_back_when_preparing_fails_and_nothing_runs(
    batcher_of: Callable[..., Batcher],
) -> None:
    batcher = batcher_of(Doubler(), queue_size=3)
    batcher.admit(3)
    batcher.release(3)
    assert await ask(batcher, 1, 2, 3) == [2, 4, 6]


async def test_places_come_back_when_callers_leave(batcher_of: Callable[..., Batcher]) -> None:
    batcher = batcher_of(Doubler(), queue_size=3, window_seconds=10)
    asking = asyncio.create_task(ask(batcher, 1, 2, 3))
    await a_turn_of_the_loop()
    assert batcher.depth == 3
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert batcher.depth == 0


async def test_a_cancelled_request_is_never_run_and_its_neighbours_are(
    batcher_of: Callable[..., Batcher],
) -> None:
    double = Doubler()
    batcher = batcher_of(double)
    first, second, third = (asyncio.create_task(ask(batcher, number)) for number in (1, 2, 3))
    await a_turn_of_the_loop()
    second.cancel()
    assert await first == [2]
    assert await third == [6]
    assert double.batches == [[1, 3]]
    assert batcher.depth == 0


async def test_a_deadline_that_is_past_means_the_work_is_never_started(
    batcher_of: Callable[..., Batcher],
) -> None:
    double = Doubler()
    batcher = batcher_of(double)
    now = asyncio.get_running_loop().time()
    answers = await asyncio.gather(
        ask(batcher, 1), ask(batcher, 2, deadline=now), ask(batcher, 3), return_exceptions=True
    )
    assert [answers[0], answers[2]] == [[2], [6]]
    assert isinstance(answers[1], DeadlineExceeded)
    assert double.batches == [[1, 3]]
    assert batcher.depth == 0


async def test_a_deadline_that_passes_in_the_queue_is_told_at_once(lanes: Lanes) -> None:
    gate = Gate()
    batcher = Batcher(gate, queue_size=10, max_batch=1, lanes=lanes)
    running = asyncio.create_task(ask(batcher, 1))
    await gate.is_entered()
    loop = asyncio.get_running_loop()
    # The gate is still shut: only the deadline itself can have answered.
    with pytest.raises(DeadlineExceeded):
        await ask(batcher, 2, 3, deadline=loop.time() + 0.01)
    assert batcher.depth == 0
    gate.open()
    assert await running == [2]
    assert await ask(batcher, 4) == [8]
    assert gate.batches == [[1], [4]]


async def test_a_deadline_that_passes_halfway_spares_the_other_half(lanes: Lanes) -> None:
    gate = Gate()
    batcher = Batcher(gate, queue_size=10, max_batch=1, lanes=lanes)
    asking = asyncio.create_task(ask(batcher, 1, 2, 3, deadline=asyncio.get_running_loop().time() + 0.2))
    await gate.is_entered()
    with pytest.raises(DeadlineExceeded):
        await asking
    gate.open()
    assert await ask(batcher, 4) == [8]
    assert gate.batches == [[1], [4]]


async def test_a_deadline_far_away_changes_nothing(batcher_of: Callable[..., Batcher]) -> None:
    deadline = asyncio.get_running_loop().time() + 60
    assert await ask(batcher_of(Doubler()), 1, deadline=deadline) == [2]


async def test_one_poisonous_sample_fails_alone(batcher_of: Callable[..., Batcher]) -> None:
    answers = await all_at_once(batcher_of(Doubler()), [1], [POISON], [3], [4, 5])
    assert answers[:1] + answers[2:] == [[2], [6], [8, 10]]
    assert isinstance(answers[1], InternalError)
    assert answers[1].index is None


async def test_a_poisonous_sample_among_several_is_named(batcher_of: Callable[..., Batcher]) -> None:
    answers = await all_at_once(batcher_of(Doubler()), [1, 2], [3, 4, POISON, 5])
    assert answers[0] == [2, 4]
    assert isinstance(answers[1], InternalError)
    assert answers[1].index == 2


async def test_poison_does_not_stop_what_comes_after(batcher_of: Callable[..., Batcher]) -> None:
    batcher = batcher_of(Doubler(), max_batch=2)
    answers = await all_at_once(batcher, [POISON], [1], [2], [POISON], [3])
    assert [answer for answer in answers if isinstance(answer, list)] == [[2], [4], [6]]
    assert await ask(batcher, 7) == [14]


@pytest.mark.parametrize("change", [-1, 1], ids=["too few", "too many"])
async def test_a_network_with_a_wrong_number_of_rows_is_an_error_and_no_mix_up(
    batcher_of: Callable[..., Batcher], change: int
) -> None:
    def run(batch: Sequence[Sample]) -> list[Row]:
        return [(np.array(0),)] * (len(batch) + change)

    batcher = batcher_of(run)
    answers = await asyncio.wait_for(all_at_once(batcher, [1], [2]), 10)
    assert [type(answer) for answer in answers] == [InternalError, InternalError]
    assert batcher.depth == 0


async def test_nobody_waits_when_nothing_runs(batcher_of: Callable[..., Batcher]) -> None:
    double = Doubler()
    batcher = batcher_of(double)
    for number in range(3):
        await ask(batcher, number)
    assert double.batches == [[0], [1], [2]]


async def test_a_window_waits_for_company(batcher_of: Callable[..., Batcher]) -> None:
    double = Doubler()
    batcher = batcher_of(double, window_seconds=0.2)
    first = asyncio.create_task(ask(batcher, 1))
    await asyncio.sleep(0.01)
    assert await ask(batcher, 2) == [4]
    assert await first == [2]
    assert double.batches == [[1, 2]]


async def test_a_batch_that_fills_up_does_not_wait_for_the_end_of_its_window(
    batcher_of: Callable[..., Batcher],
) -> None:
    double = Doubler()
    batcher = batcher_of(double, window_seconds=60, max_batch=3)
    requests = [asyncio.create_task(ask(batcher, number)) for number in (1, 2, 3)]
    assert await asyncio.wait_for(asyncio.gather(*requests), 10) == [[2], [4], [6]]
    assert double.batches == [[1, 2, 3]]


async def test_the_next_batch_forms_while_one_runs(lanes: Lanes) -> None:
    gate = Gate()
    batcher = Batcher(gate, queue_size=10, max_batch=8, lanes=lanes)
    requests = [asyncio.create_task(ask(batcher, 1))]
    await gate.is_entered()
    for number in (2, 3, 4):
        requests.append(asyncio.create_task(ask(batcher, number)))
        await a_turn_of_the_loop()
    assert batcher.depth == 3
    gate.open()
    assert await asyncio.gather(*requests) == [[2], [4], [6], [8]]
    assert gate.batches == [[1], [2, 3, 4]]


async def test_as_many_batches_run_at_a_time_as_there_are_lanes() -> None:
    gate, lanes = Gate(), Lanes(2)
    batcher = Batcher(gate, queue_size=10, max_batch=1, lanes=lanes)
    requests = [asyncio.create_task(ask(batcher, number)) for number in (1, 2, 3)]
    await gate.is_entered()
    await gate.is_entered()
    assert batcher.depth == 1
    assert not gate.entered.acquire(timeout=0.05)
    gate.open()
    assert await asyncio.gather(*requests) == [[2], [4], [6]]
    lanes.close()


async def test_never_more_batches_run_at_a_time_than_there_are_lanes() -> None:
    running, most, lock = 0, 0, threading.Lock()
    lanes = Lanes(2)

    def run(batch: Sequence[Sample]) -> list[Row]:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.001)
        with lock:
            running -= 1
        return [(np.array(0),) for _ in batch]

    batcher = Batcher(run, queue_size=100, max_batch=1, lanes=lanes)
    await asyncio.gather(*(ask(batcher, number) for number in range(50)))
    assert most == 2
    lanes.close()


async def test_two_batchers_on_one_loop_take_turns() -> None:
    turns: list[str] = []

    def run_as(name: str) -> Callable[[Sequence[Sample]], list[Row]]:
        def run(batch: Sequence[Sample]) -> list[Row]:
            turns.append(name)
            return [(np.array(0),) for _ in batch]

        return run

    one, other = (Batcher(run_as(name), queue_size=100, max_batch=1) for name in ("one", "other"))
    await asyncio.gather(ask(one, *range(20)), ask(other, *range(20)))
    assert turns == ["one", "other"] * 20


async def test_batchers_that_share_lanes_get_the_same_share_of_them(lanes: Lanes) -> None:
    """One that takes five times as long for a batch gets a fifth of the turns."""
    spent = {"slow": 0.0, "quick": 0.0}
    done = asyncio.Event()

    def run_as(name: str, seconds: float) -> Callable[[Sequence[Sample]], list[Row]]:
        def run(batch: Sequence[Sample]) -> list[Row]:
            time.sleep(seconds)
            if not done.is_set():
                spent[name] += seconds
            return [(np.array(0),) for _ in batch]

        return run

    slow = Batcher(run_as("slow", 0.01), queue_size=1000, max_batch=1, lanes=lanes)
    quick = Batcher(run_as("quick", 0.002), queue_size=1000, max_batch=1, lanes=lanes)
    one = asyncio.create_task(ask(slow, *range(100)))
    other = asyncio.create_task(ask(quick, *range(100)))
    await other
    done.set()
    assert spent["quick"] == pytest.approx(0.2)
    assert spent["slow"] == pytest.approx(0.2, rel=0.5)
    one.cancel()
    await asyncio.gather(one, return_exceptions=True)


async def test_batchers_that_share_the_loop_take_no_longer_together_than_one_alone_may() -> None:
    """Who has used least goes first; for whom there is too little left the next turn comes."""
    turns, ran = LoopTurns(seconds=0.1), list[tuple[str, int]]()

    def run_as(name: str, seconds: float) -> Callable[[Sequence[Sample]], list[Row]]:
        def run(batch: Sequence[Sample]) -> list[Row]:
            time.sleep(seconds * len(batch))
            ran.append((name, len(batch)))
            return [(np.array(0),) for _ in batch]

        return run

    quick, slow, slower = (
        Batcher(
            run_as(name, seconds), queue_size=100, max_batch=8, loop_turns=turns, seconds_per_input=seconds
        )
        for name, seconds in (("quick", 0.001), ("slow", 0.012), ("slower", 0.024))
    )
    await asyncio.gather(ask(slower, *range(8)), ask(slow, *range(8)), ask(quick, *range(16)))
    assert ran == [
        # As they came, for nobody has used anything: 96 of 100 ms, then all of them.
        ("slower", 4),
        ("slow", 8),
        # From then on 8 ms for the one that has used least, and what is left for the next.
        ("quick", 8),
        ("slower", 3),
        ("quick", 8),
        ("slower", 1),
    ]


async def test_who_is_far_ahead_on_the_loop_waits_for_those_in_lanes(lanes: Lanes) -> None:
    gate, turns = Gate(), LoopTurns(0.008, lanes)
    runs = 0

    def run(batch: Sequence[Sample]) -> list[Row]:
        nonlocal runs
        runs += 1
        return [(np.array(0),) for _ in batch]

    # By this clock a run takes 60 % of what it may be ahead.
    on_loop = Batcher(
        run, queue_size=100, max_batch=1, loop_turns=turns, clock=lambda: 0.6 * LEAD_SECONDS * runs
    )
    in_lane = Batcher(gate, queue_size=100, max_batch=1, lanes=lanes)
    slow = asyncio.create_task(ask(in_lane, 1))
    await gate.is_entered()
    quick = asyncio.create_task(ask(on_loop, *range(10)))
    await asyncio.sleep(0.3)
    assert runs == 2, "one to be as far ahead as it may, one to be further"
    gate.open()
    await asyncio.gather(slow, quick)
    assert runs == 10, "with nobody in lanes it goes on by itself"


async def test_who_was_alone_for_long_is_not_kept_waiting_by_those_who_come_late() -> None:
    """Of two who were there before one has used much more: a newcomer starts not far behind that one."""
    ledger = Ledger()
    much, little, newcomer, last = (Batcher(Doubler(), queue_size=1, max_batch=1) for _ in range(4))
    for batcher, spent in ((much, 60.0), (little, 1.0)):
        ledger.enter(batcher)
        batcher.spent_seconds = spent
    ledger.enter(newcomer)
    assert newcomer.spent_seconds == 60 - MOST_BEHIND_SECONDS
    for batcher in (much, newcomer, little):
        ledger.leave(batcher)
    ledger.enter(last)
    assert last.spent_seconds == 60


async def test_who_is_away_for_a_moment_after_each_turn_does_not_lose_its_place() -> None:
    """Callers who wait for each answer leave their model without work again and again."""
    ledger = Ledger()
    steady, often_away = (Batcher(Doubler(), queue_size=1, max_batch=1) for _ in range(2))
    ledger.enter(steady)
    for _ in range(100):
        steady.spent_seconds += SAVED_SECONDS / 2
        ledger.enter(often_away, SAVED_SECONDS)
        assert often_away.spent_seconds < steady.spent_seconds
        often_away.spent_seconds += SAVED_SECONDS / 8
        ledger.leave(often_away)
    steady.spent_seconds += 10
    ledger.enter(often_away, SAVED_SECONDS)
    assert often_away.spent_seconds == steady.spent_seconds - SAVED_SECONDS, "a real pause is not saved up"


async def test_one_turn_that_fails_costs_the_others_nothing() -> None:
    def full_disk(size: int, compute: float, waits: Sequence[float]) -> None:
        raise OSError("no space left on device")

    turns = LoopTurns(0.008)
    unlucky = Batcher(Doubler(), queue_size=10, max_batch=2, loop_turns=turns, on_batch=full_disk)
    other = Batcher(Doubler(), queue_size=10, max_batch=8, loop_turns=turns)
    for _ in range(2):
        asked = asyncio.gather(ask(unlucky, 1, 2, 3), ask(other, 4))
        assert await asyncio.wait_for(asked, 5) == [[2, 4, 6], [8]]


async def test_who_comes_to_the_lanes_late_holds_nobody_up_on_the_loop(lanes: Lanes) -> None:
    turns = LoopTurns(0.008, lanes)
    gate, doubler = Gate(), Doubler()

    def run(batch: Sequence[Sample]) -> list[Row]:
        time.sleep(0.01)
        return doubler(batch)

    on_loop = Batcher(run, queue_size=100, max_batch=1, loop_turns=turns)
    await ask(on_loop, *range(10))
    slow = asyncio.create_task(ask(Batcher(gate, queue_size=10, max_batch=1, lanes=lanes), 1))
    await gate.is_entered()
    await asyncio.wait_for(ask(on_loop, 1), 5)
    gate.open()
    await slow


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives each thread a niceness of its own")
async def test_lanes_let_the_loop_go_first(lanes: Lanes) -> None:
    niceness: list[int] = []

    def run(batch: Sequence[Sample]) -> list[Row]:
        niceness.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return [(np.array(0),) for _ in batch]

    await ask(Batcher(run, queue_size=10, max_batch=1, lanes=lanes), 1)
    mine = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert niceness == [min(19, mine + NICENESS)]


async def test_who_comes_back_after_a_pause_has_no_savings(lanes: Lanes) -> None:
    turns: list[str] = []

    def run_as(name: str) -> Callable[[Sequence[Sample]], list[Row]]:
        def run(batch: Sequence[Sample]) -> list[Row]:
            time.sleep(0.002)
            turns.append(name)
            return [(np.array(0),) for _ in batch]

        return run

    one, other = (
        Batcher(run_as(name), queue_size=100, max_batch=1, lanes=lanes) for name in ("one", "other")
    )
    await ask(one, *range(20))
    turns.clear()
    await asyncio.gather(ask(one, *range(10)), ask(other, *range(10)))
    assert 3 <= turns[:10].count("one") <= 7


def made_of(several: Sequence[Inputs]) -> list[Sample | QuintetError]:
    """Samples of numbers; of what is none, what is wrong with it."""

    def sample_of(inputs: Inputs) -> Sample:
        if inputs["number"] is None:
            try:
                raise ValueError
            except ValueError:
                raise BadInput("The picture is damaged.") from None
        return samples(inputs["number"] + 0)[0]

    return each(sample_of, several)


def unprepared(batcher: Batcher, numbers: Sequence[Any], done: list[Job]) -> Job:
    """A request whose samples are not there yet, in the queue."""
    batcher.admit(len(numbers))
    job = batcher.job_type([{"number": number} for number in numbers], None, None, done.append)
    batcher.submit(job, Priority.NORMAL)
    return job


async def settled(done: list[Job], count: int) -> None:
    """Wait until so many jobs are done."""
    for _ in range(1000):
        if len(done) == count:
            return
        await asyncio.sleep(0.001)
    raise AssertionError(f"{len(done)} of {count} jobs are done")


async def test_samples_that_are_not_there_are_made_when_their_batch_runs(
    batcher_of: Callable[..., Batcher],
) -> None:
    doubler, done, made = Doubler(), list[Job](), list[list[int]]()

    def make(several: Sequence[Inputs]) -> list[Sample | QuintetError]:
        made.append([inputs["number"] for inputs in several])
        return made_of(several)

    batcher = batcher_of(doubler, make_samples=make, max_batch=2)
    asked = asyncio.create_task(ask(batcher, 7))
    await a_turn_of_the_loop()
    unprepared(batcher, [1, 2, 3], done)
    unprepared(batcher, [4], done)
    assert not made
    await settled(done, 2)
    assert await asked == [14]
    assert sorted(numbers_in(job.rows) for job in done) == [[2, 4, 6], [8]]
    assert sorted(number for some in made for number in some) == [1, 2, 3, 4], "each once"
    assert max(len(some) for some in made) == 2, "those of a batch together"
    assert batcher.depth == 0


async def test_samples_that_cannot_be_made_are_the_trouble_of_their_request_alone(
    batcher_of: Callable[..., Batcher],
) -> None:
    doubler, done = Doubler(), list[Job]()
    batcher = batcher_of(doubler, make_samples=made_of, max_batch=8)
    bad = unprepared(batcher, [5, None, None], done)
    good = unprepared(batcher, [1, 2], done)
    single = unprepared(batcher, [None], done)
    await settled(done, 3)
    assert isinstance(bad.error, BadInput)
    assert bad.error.index == 1, "the first of them"
    assert isinstance(single.error, BadInput)
    assert single.error.index is None
    assert bad.error.__traceback__ is bad.error.__context__ is None, "they would keep the request alive"
    assert numbers_in(good.rows) == [2, 4]
    assert batcher.depth == 0
    assert await ask(batcher, 5) == [10]


async def test_a_mistake_of_ours_in_making_samples_costs_one_request_alone(
    batcher_of: Callable[..., Batcher],
) -> None:
    done = list[Job]()
    batcher = batcher_of(Doubler(), make_samples=made_of, max_batch=8)
    bad = unprepared(batcher, [None], done)
    # A text has no `+ 0`.
    worse = unprepared(batcher, [1, "one"], done)
    good = unprepared(batcher, [1, 2], done)
    await settled(done, 3)
    assert isinstance(worse.error, InternalError)
    assert worse.error.index == 1
    assert isinstance(bad.error, BadInput)
    assert numbers_in(good.rows) == [2, 4]
    assert batcher.depth == 0
    assert await ask(batcher, 5) == [10]


async def test_nothing_is_made_for_those_who_have_gone() -> None:
    done, made = list[Job](), list[int]()

    def make(several: Sequence[Inputs]) -> list[Sample | QuintetError]:
        made.extend(inputs["number"] for inputs in several)
        return made_of(several)

    batcher = Batcher(Doubler(), make_samples=make, queue_size=10, max_batch=8)
    unprepared(batcher, [1], done).give_up()
    assert await ask(batcher, 5) == [10]
    assert not made
    assert batcher.depth == 0


async def test_higher_priorities_go_first_and_equals_keep_their_order(lanes: Lanes) -> None:
    gate = Gate()
    batcher = Batcher(gate, queue_size=100, max_batch=1, lanes=lanes)
    requests = [asyncio.create_task(ask(batcher, 0))]
    await gate.is_entered()
    for number, priority in [(1, Priority.LOW), (2, Priority.NORMAL), (3, Priority.HIGH), (4, Priority.HIGH)]:
        requests.append(asyncio.create_task(ask(batcher, number, priority=priority)))
        await a_turn_of_the_loop()
    gate.open()
    await asyncio.gather(*requests)
    assert gate.batches == [[0], [3], [4], [2], [1]]


async def test_nobody_waits_for_ever_behind_higher_priorities(
    lanes: Lanes, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert PATIENCE_SECONDS >= 0.1
    monkeypatch.setattr("service.batcher.PATIENCE_SECONDS", 0.02)
    double = Doubler()

    def run(batch: Sequence[Sample]) -> list[Row]:
        time.sleep(0.002)
        return double(batch)

    batcher = Batcher(run, queue_size=1000, max_batch=1, lanes=lanes)

    async def hurry() -> None:
        while True:
            await ask(batcher, 1, priority=Priority.HIGH)

    hurrying = [asyncio.create_task(hurry()) for _ in range(5)]
    await asyncio.sleep(0.01)
    assert await asyncio.wait_for(ask(batcher, 2, priority=Priority.LOW), 30) == [4]
    for task in hurrying:
        task.cancel()
    await asyncio.gather(*hurrying, return_exceptions=True)


async def test_a_full_queue_says_when_it_will_have_moved(lanes: Lanes) -> None:
    def run(batch: Sequence[Sample]) -> list[Row]:
        time.sleep(0.01 * len(batch))
        return [(np.array(0),) for _ in batch]

    batcher = Batcher(run, queue_size=500, max_batch=1, lanes=lanes, seconds_per_input=10.0)
    for _ in range(60):
        await ask(batcher, 1)
    started = time.perf_counter()
    for _ in range(20):
        await ask(batcher, 1)
    seconds = (time.perf_counter() - started) / 20 * 500
    batcher.admit(500)
    with pytest.raises(Overloaded) as caught:
        batcher.admit(1)
    # 500 samples at the speed of the last; the first guess was far off.
    assert caught.value.retry_after_seconds == pytest.approx(min(seconds, 60), rel=0.7)


# ---- samples of several lengths ----


class Padder:
    """Gives every text's length, and keeps how much of its batches was padding."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def __call__(self, batch: Sequence[Sample]) -> list[Row]:
        self.batches.append([len(sample.tensors[0]) for sample in batch])
        return [(np.array(len(sample.tensors[0])),) for sample in batch]

    @property
    def waste(self) -> float:
        padded = sum(max(batch) * len(batch) for batch in self.batches)
        return 1 - sum(map(sum, self.batches)) / padded


def texts(*lengths: int) -> list[Sample]:
    return [Sample((np.zeros(length, np.int64),)) for length in lengths]


def text_batcher(run: Padder, **options: Any) -> Batcher:
    return Batcher(
        run, **{"queue_size": 2000, "max_batch": 16, "length_of": lambda one: len(one.tensors[0]), **options}
    )


async def read(batcher: Batcher, *lengths: int, **options: Any) -> list[int]:
    batcher.admit(len(lengths))
    return numbers_in((await batcher.run([], texts(*lengths), None, **options)).rows)


@pytest.mark.parametrize("seed", range(4))
async def test_mixed_lengths_are_hardly_padded_and_everyone_gets_their_own(seed: int) -> None:
    chance, pad = random.Random(seed), Padder()
    batcher = text_batcher(pad)
    lengths = [[round(chance.lognormvariate(3.2, 0.8)) + 2 for _ in range(chance.choice([1, 1, 3, 20]))]
               for _ in range(100)]  # fmt: skip
    assert await asyncio.gather(*(read(batcher, *some) for some in lengths)) == lengths
    assert batcher.depth == 0
    assert pad.waste <= LARGEST_WASTE
    assert all(max(batch) * len(batch) * (1 - LARGEST_WASTE) <= sum(batch) for batch in pad.batches)
    # And yet they are batches.
    assert sum(map(len, pad.batches)) / len(pad.batches) > 4


async def test_a_batch_of_texts_keeps_within_its_tokens() -> None:
    pad = Padder()
    batcher = text_batcher(pad, max_tokens=100)
    await read(batcher, 30, 30, 30, 30, 200)
    assert sorted(pad.batches) == [[30], [30, 30, 30], [200]]


async def test_the_text_that_came_first_is_never_passed_over() -> None:
    pad = Padder()
    batcher = text_batcher(pad, max_batch=2)
    await asyncio.gather(read(batcher, 500), *(read(batcher, 10) for _ in range(10)))
    assert pad.batches[0] == [500]


async def test_texts_whose_caller_is_gone_are_never_run() -> None:
    pad = Padder()
    batcher = text_batcher(pad)
    first, second = (asyncio.create_task(read(batcher, length)) for length in (10, 11))
    await a_turn_of_the_loop()
    first.cancel()
    assert await second == [11]
    assert pad.batches == [[11]]
    assert batcher.depth == 0


async def test_other_work_on_the_loop_goes_on_between_two_inline_batches() -> None:
    double = Doubler()
    batcher = Batcher(double, queue_size=100, max_batch=1)
    asking = asyncio.create_task(ask(batcher, *range(50)))
    seen = set()
    while not asking.done():
        seen.add(len(double.batches))
        await a_turn_of_the_loop()
    assert len(seen) >= 50


async def test_every_batch_is_reported_with_its_size_and_its_waits(
    batcher_of: Callable[..., Batcher],
) -> None:
    reports: list[tuple[int, float, list[float]]] = []
    batcher = batcher_of(
        Doubler(),
        max_batch=4,
        on_batch=lambda size, compute, waits: reports.append((size, compute, list(waits))),
    )
    await all_at_once(batcher, [1, 2, 3], [4, 5, 6])
    assert [size for size, _, _ in reports] == [4, 2]
    # The second request's samples run in both batches; it has waited once.
    assert [len(waits) for _, _, waits in reports] == [2, 0]
    assert all(compute >= 0 and min(waits, default=0) >= 0 for _, compute, waits in reports)


async def test_a_request_knows_how_long_its_own_samples_took_to_make_in_all_its_batches() -> None:
    def make(several: Sequence[Inputs]) -> list[Sample | QuintetError]:
        time.sleep(0.01 * len(several))
        return made_of(several)

    done = list[Job]()
    batcher = Batcher(Doubler(), make_samples=make, queue_size=10, max_batch=3)
    batcher.admit(1)
    made_before = asyncio.create_task(batcher.run([], samples(9), None))
    await a_turn_of_the_loop()
    split = unprepared(batcher, [1, 2, 3, 4, 5], done)
    await settled(done, 1)
    assert (await made_before).prepare_seconds == 0
    assert 0.05 <= split.prepare_seconds < 0.5


@pytest.mark.parametrize("seed", range(8))
async def test_whatever_happens_everyone_gets_their_own_and_the_queue_is_empty_after(
    batcher_of: Callable[..., Batcher], seed: int
) -> None:
    chance = random.Random(seed)
    double = Doubler()

    def run(batch: Sequence[Sample]) -> list[Row]:
        if chance.random() < 0.1:
            time.sleep(0.001)
        return double(batch)

    batcher = batcher_of(
        run,
        queue_size=chance.choice([5, 20, 100]),
        max_batch=chance.choice([1, 3, 8]),
        threads=chance.choice([1, 2, 4]),
        window_seconds=chance.choice([0, 0, 0.002]),
    )
    loop = asyncio.get_running_loop()
    named: list[tuple[int | None, int | None]] = []
    done: dict[str, int] = dict.fromkeys(("answered", "poisoned", "late", "refused", "left"), 0)

    async def one(start: int) -> None:
        count = chance.choice([1, 1, 1, 2, 5])
        numbers = list(range(start, start + count))
        if chance.random() < 0.05:
            numbers[chance.randrange(count)] = POISON
        is_hurried, is_leaving = chance.random() < 0.1, chance.random() < 0.1
        deadline = loop.time() + chance.random() * 0.004 if is_hurried else None
        await asyncio.sleep(chance.random() * 0.02)
        asking = asyncio.create_task(ask(batcher, *numbers, deadline=deadline))
        if is_leaving:
            loop.call_later(chance.random() * 0.002, asking.cancel)
        try:
            assert await asking == [2 * number for number in numbers]
            assert POISON not in numbers
            done["answered"] += 1
        except InternalError as error:
            assert POISON in numbers
            named.append((error.index, numbers.index(POISON) if count > 1 else None))
            done["poisoned"] += 1
        except DeadlineExceeded:
            assert is_hurried
            done["late"] += 1
        except Overloaded:
            done["refused"] += 1
        except asyncio.CancelledError:
            assert is_leaving
            done["left"] += 1
        assert batcher.depth >= 0

    await asyncio.wait_for(asyncio.gather(*(one(100 * number) for number in range(200))), 30)
    assert sum(done.values()) == 200
    assert done["answered"]
    assert all(found == meant for found, meant in named)
    assert batcher.depth == 0
    ran = [number for batch in double.batches for number in batch if number != POISON]
    assert await ask(batcher, 1) == [2]
    # Only the neighbours of poison run a second time, each of them once.
    poisoned = {number for batch in double.batches if POISON in batch for number in batch}
    assert all(ran.count(number) == 1 for number in set(ran) - poisoned)
