"""Requests to batches: bounded, first come first served, and nobody's trouble is another's.

A batch forms while the one before it runs; nobody waits when nothing runs, unless a
window is set. Short batches run on the event loop, once per turn, over all that came
in meanwhile: a thread would cost more than it gives. Longer ones run in lanes: threads
that all models share, as they share the loop's turns. Samples of several lengths are
batched with those of about their own.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from functools import partial
from types import MappingProxyType
from typing import Final, NamedTuple

import structlog

from service.errors import DeadlineExceeded, InternalError, Overloaded, QuintetError
from service.lanes import Lanes, LoopTurns
from service.models.spec import Array, Inputs, Sample

Row = tuple[Array, ...]
RunNetwork = Callable[[Sequence[Sample]], list[Row]]
MakeSamples = Callable[[Sequence[Inputs]], Sequence[Sample | QuintetError]]

LARGEST_WASTE: Final = 0.1
"""At most this share of a batch is padding."""

PATIENCE_SECONDS: Final = 1.0
"""Whoever has waited longest goes before all priorities once it is this long."""

PACE_WEIGHT: Final = 0.1
"""What the last batch weighs in the measured speed of the queue."""

LONGEST_RETRY_AFTER_SECONDS: Final = 60

log = structlog.get_logger("quintet")


NONE_WAITING: Final[list[int]] = []
NO_LENGTHS: Final[list[int]] = []
"""Shared by all jobs whose samples have no lengths; nobody adds to them."""

NOT_MADE: Final = Sample(())
"""In the place of a sample until its batch runs."""


class Priority(IntEnum):
    """Who goes first; of equals, who came first."""

    HIGH = 0
    NORMAL = 1
    LOW = 2


class Job:
    """The samples of one request on their way through the batches.

    They are there from the start, or each is made of its input when its batch runs.

    Once it is done, `rows` has one row for each sample, in order; `queue_seconds` is how long
    the first of them waited, `prepare_seconds` the time that its batches took to make samples, if it came
    without, `compute_seconds` that of the network, `batch_size` that of the largest; or `error` says why
    there are no rows. Until then `next` is how many have
    started; where samples have lengths they need not start in order, and `waiting` says which have not.
    """

    __slots__ = (
        "_on_done", "batch_size", "caller", "compute_seconds", "count", "deadline", "entered", "error",
        "inputs", "is_done", "is_made", "left", "lengths", "next", "prepare_seconds", "queue_seconds", "rows",
        "samples", "timer", "waiting",
    )  # fmt: skip

    def __init__(
        self,
        inputs: Sequence[Inputs],
        samples: list[Sample] | None,
        deadline: float | None,
        on_done: "Callable[[Job], None]",
    ) -> None:
        """Prepare to run samples.

        Args:
            inputs: What the samples are made of, where they are not there; at least one.
            samples: All of them, where they are.
            deadline: When to give up, by `time.monotonic`; None for never.
            on_done: Called once, on the event loop, when there are rows or an error. It raises nothing.
        """
        self.inputs = inputs
        self.is_made = samples is not None
        self.samples = [NOT_MADE] * len(inputs) if samples is None else samples
        self.count = count = len(self.samples)
        self.deadline = deadline
        self._on_done = on_done
        self.is_done = False
        self.error: QuintetError | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.caller: asyncio.Future[None] | None = None
        """What a task waits for, if one does: it is cancelled a turn of the loop before the task knows."""
        self.entered = time.perf_counter()
        self.next = 0
        self.waiting = NONE_WAITING
        self.lengths = NO_LENGTHS
        self.rows: list[Row] = [()] * count
        self.left = count
        self.batch_size = 0
        self.queue_seconds = 0.0
        self.prepare_seconds = 0.0
        self.compute_seconds = 0.0

    def give(self, index: int, row: Row) -> None:
        """Take the row of one sample; the last one answers the request."""
        self.rows[index] = row
        self.left -= 1
        if not self.left and not self.is_done:
            self._end()

    def fail(self, error: QuintetError) -> None:
        """Answer the request with an error, once."""
        if not self.is_done:
            self.error = error
            self._end()

    def give_up(self) -> None:
        """Note that nobody waits for it any more."""
        self.is_done = True
        if self.timer is not None:
            self.timer.cancel()

    def _end(self) -> None:
        self.give_up()
        self._on_done(self)


Slot = tuple[Job, int]


class Ran(NamedTuple):
    """What came of a batch.

    Attributes:
        batch: What ran: all but those of whose inputs no samples could be made.
        failures: What was wrong with those.
        result: A row for each sample that ran, or what went wrong.
        started: When, by `time.perf_counter`.
        prepare_seconds: That it took to make the samples which were not made before; 0.0 if there were none.
        seconds: That the network took.
        charged_seconds: What all of it used of what models share.
    """

    batch: Sequence[Slot]
    failures: Mapping[Slot, QuintetError]
    result: list[Row] | Exception
    started: float
    prepare_seconds: float
    seconds: float
    charged_seconds: float


NO_FAILURES: Final[Mapping[Slot, QuintetError]] = MappingProxyType({})


class Batcher:
    """The queue of one model version and the turns that empty it.

    `admit` is asked before any work is done for a request, so a full queue costs its
    callers nothing but the refusal; what was admitted is either run or released.
    """

    job_type: type[Job] = Job

    def __init__(
        self,
        run: RunNetwork,
        *,
        make_samples: MakeSamples | None = None,
        queue_size: int,
        max_batch: int,
        window_seconds: float = 0.0,
        lanes: Lanes | None = None,
        loop_turns: LoopTurns | None = None,
        length_of: Callable[[Sample], int] | None = None,
        max_tokens: int = 1 << 62,
        seconds_per_input: float = 0.0,
        clock: Callable[[], float] = time.perf_counter,
        on_batch: Callable[[int, float, Sequence[float]], None] | None = None,
    ) -> None:
        """Batch the calls of `run`.

        Args:
            run: Samples in, one row each out; must not keep state between calls.
            make_samples: Inputs in, a sample each out, or what is wrong with it; called in the thread
                that runs the batch. None where all jobs come with their samples, as they must where
                those have lengths.
            queue_size: Samples that may wait.
            max_batch: Samples that run together at the most.
            window_seconds: How long the first of a batch waits for company.
            lanes: Threads to run batches in, by turns with others; None runs every batch on the event loop.
            loop_turns: Whom to share the event loop with, where there are no lanes; None for nobody.
            length_of: A sample's length, where samples have several and shorter ones are padded:
                then those of about one length run together.
            max_tokens: The longest length times the samples of one batch, at the most (one sample
                alone may be longer).
            seconds_per_input: What one sample takes.
            clock: By which batches are charged to what was shared, read before and after in their thread.
            on_batch: Told the size, the compute seconds and the jobs' queue seconds of each batch.
        """
        self._run = run
        self._make_samples = make_samples
        self._queue_size = queue_size
        self._max_batch = max_batch
        self._window = window_seconds
        self._lanes = lanes
        self._loop_turns = loop_turns or LoopTurns()
        self._length_of = length_of
        self._max_tokens = max_tokens
        self._clock = clock
        self._on_batch = on_batch or (lambda size, compute, waits: None)
        self._lines: tuple[deque[Job], ...] = tuple(deque() for _ in Priority)
        self._turn_is_booked = False
        self._is_asking = False
        self._window_timer: asyncio.TimerHandle | None = None
        self._running = 0
        self._busy_since = 0.0
        self._per_second = 1 / seconds_per_input if seconds_per_input else math.inf
        self._pace = seconds_per_input
        self._prepare_pace = 0.0
        self.depth = 0
        self.spent_seconds = 0.0

    @property
    def is_inline(self) -> bool:
        """Whether batches run on the event loop."""
        return self._lanes is None

    @property
    def makes_samples(self) -> bool:
        """Whether jobs may come without their samples."""
        return self._make_samples is not None

    def admit(self, count: int) -> None:
        """Take `count` places in the queue.

        Raises:
            Overloaded: there are not that many left; it says when there should be, at the speed
                at which the queue has been moving.
        """
        if self.depth + count > self._queue_size:
            seconds = math.ceil(self.depth * self._pace)
            raise Overloaded(
                "The queue is full; send the request again after a pause.",
                retry_after_seconds=min(max(1, seconds), LONGEST_RETRY_AFTER_SECONDS),
            )
        self.depth += count

    def release(self, count: int) -> None:
        """Give back places that `admit` gave, for samples that will not be run."""
        self.depth -= count

    async def run(
        self,
        inputs: Sequence[Inputs],
        samples: list[Sample] | None,
        deadline: float | None,
        priority: Priority = Priority.NORMAL,
    ) -> Job:
        """Run admitted samples; the job, done.

        Args:
            inputs: At least one, all admitted before.
            samples: Made of them; None where this batcher shall make them.
            deadline: When to give up, by `time.monotonic`.
            priority: Whom it goes before.

        Raises:
            BadInput: of an input no sample can be made; its `index` says which, of several.
            DeadlineExceeded: the deadline passed; what had not started by then never will.
            InternalError: the network failed on one of these samples.
        """
        done = asyncio.get_running_loop().create_future()

        def tell(job: Job) -> None:
            if not done.done():
                done.set_result(None)

        job = self.job_type(inputs, samples, deadline, tell)
        job.caller = done
        self.submit(job, priority)
        try:
            await done
        finally:
            job.give_up()
            # Anything left over was cancelled by its caller.
            self._drop(job)
        if job.error is not None:
            raise job.error
        return job

    def submit(self, job: Job, priority: Priority) -> None:
        """Have a job's samples run, all admitted before; it calls back when it is done.

        Args:
            job: Of this batcher's `job_type`, with its samples unless this batcher `makes_samples`.
            priority: Whom it goes before.
        """
        if self._length_of is not None:
            job.lengths = list(map(self._length_of, job.samples))
            job.waiting = list(range(job.count))
        if job.deadline is not None:
            job.timer = asyncio.get_running_loop().call_at(job.deadline, self._expire, job)
        if not (self._turn_is_booked or self._is_asking or self._running):
            self._busy_since = job.entered
        self._lines[priority].append(job)
        self._book_turn()

    def _expire(self, job: Job) -> None:
        job.fail(_too_late())
        self._drop(job)

    def _drop(self, job: Job) -> None:
        """Give back the places of samples that have not started."""
        self.release(job.count - job.next)
        job.next = job.count
        job.waiting = NONE_WAITING

    def _book_turn(self) -> None:
        if self._is_asking:
            return
        is_full = self.depth >= self._max_batch
        if self._turn_is_booked:
            if self._window_timer is None or not is_full:
                return
            # A batch that has filled up waits no longer.
            self._window_timer.cancel()
            self._window_timer = None
        self._turn_is_booked = True
        loop = asyncio.get_running_loop()
        if self._window and not is_full:
            self._window_timer = loop.call_later(self._window, self._ask)
        elif self._lanes is None:
            self._ask()
        else:
            # Not at once: others whose bytes came in the same turn of the loop join in.
            loop.call_soon(self._ask)

    def _ask(self) -> None:
        """Ask for the turn that was booked."""
        self._window_timer = None
        if self._lanes is None:
            self._loop_turns.ask(self)
            return
        self._turn_is_booked = False
        self._is_asking = True
        self._lanes.ask(self)

    def run_turn(self, seconds: float) -> None:
        """Run the next batch on the event loop: as many as take so long, but one at least."""
        self._turn_is_booked = False
        batch = self._take_batch(max(1, int(min(self._max_batch, seconds * self._per_second))))
        if not batch:
            return
        try:
            ran = self._ran(batch)
            self.spent_seconds += ran.charged_seconds
            self._finish(ran)
        finally:
            if self._is_waited_for():
                self._book_turn()

    def take_turn(self) -> bool:
        """Run the next batch in a lane that was given to us; False where nobody waits any more."""
        assert self._lanes is not None, "only batchers with lanes ask for them"
        self._is_asking = False
        batch = self._take_batch(self._max_batch)
        if not batch:
            return False
        self._running += 1
        # Charged when it starts, roughly (texts have many lengths); put right when it ends.
        expected = len(batch) * (1 / self._per_second + self._prepare_pace)
        self.spent_seconds += expected
        self._lanes.start(partial(self._ran, batch), partial(self._lane_is_free, expected))
        if self._is_waited_for():
            self._is_asking = True
            self._lanes.ask(self)
        return True

    def _lane_is_free(self, expected: float, ran: Ran) -> None:
        assert self._lanes is not None, "only batchers with lanes ask for them"
        self._running -= 1
        # The next batch starts before this one is answered.
        self._lanes.give_back(self, ran.charged_seconds - expected)
        self._finish(ran)

    def _is_waited_for(self) -> bool:
        high, normal, low = self._lines
        return bool(normal or high or low)

    def _take_batch(self, most: int) -> list[Slot]:
        """The next samples in line, `most` at the most, but for those whose caller is gone or out of time."""
        if self._length_of is not None:
            return self._take_batch_of_one_length(most)
        now = time.monotonic()
        batch: list[Slot] = []
        for line in self._lines_in_turn():
            while line and len(batch) < most:
                job = line[0]
                if self._is_over(job, now):
                    job.fail(_too_late())
                    self._drop(job)
                end = min(job.count, job.next + most - len(batch))
                batch += [(job, index) for index in range(job.next, end)]
                self.release(end - job.next)
                job.next = end
                if end == job.count:
                    line.popleft()
        return batch

    def _is_over(self, job: Job, now: float) -> bool:
        # By a clock that moves: uvloop's own stands still within a turn, and counts milliseconds.
        is_given_up = job.is_done or (job.caller is not None and job.caller.done())
        return is_given_up or (job.deadline is not None and job.deadline <= now)

    def _lines_in_turn(self) -> Sequence[deque[Job]]:
        """The lines by priority; but nobody waits for ever, whoever comes before them."""
        high, normal, low = self._lines
        if not (high or low):
            return (normal,)
        waiting = [line for line in self._lines if line]
        if len(waiting) > 1:
            oldest = min(waiting, key=lambda line: line[0].entered)
            if time.perf_counter() - oldest[0].entered > PATIENCE_SECONDS:
                waiting.sort(key=lambda line: line is not oldest)
        return waiting

    def _take_batch_of_one_length(self, most: int) -> list[Slot]:
        """The sample whose turn it is, and those whose lengths are nearest to its own.

        As many as fit: `most` at the most, no more than `max_tokens` with their padding, and of
        those at most `LARGEST_WASTE` padding.
        """
        now = time.monotonic()
        candidates: list[tuple[int, int, Slot]] = []
        for line in self._lines_in_turn():
            for job in line:
                if self._is_over(job, now):
                    job.fail(_too_late())
                    self._drop(job)
                candidates.extend(
                    (job.lengths[index], place, (job, index))
                    for place, index in enumerate(job.waiting, len(candidates))
                )
            if len(candidates) >= self._max_batch:
                break
        chosen = self._around_the_first(candidates, most) if candidates else []
        # In the order in which they came, so that a job's samples stand together.
        batch = [slot for _, _, slot in sorted(chosen, key=lambda one: one[1])]
        for job, index in batch:
            job.waiting.remove(index)
            job.next += 1
        self.release(len(batch))
        for line in self._lines:
            left = [job for job in line if job.waiting]
            line.clear()
            line.extend(left)
        return batch

    def _around_the_first(
        self, candidates: list[tuple[int, int, Slot]], most: int
    ) -> list[tuple[int, int, Slot]]:
        """The first of (length, place, slot), with its nearest in length on both sides: `most` together."""
        first = candidates[0]
        ranked = sorted(candidates, key=lambda one: one[:2])
        low = high = ranked.index(first)
        tokens = longest = first[0]
        while high - low + 1 < min(len(ranked), most):
            size = high - low + 2
            shorter = ranked[low - 1][0] if low else None
            longer = ranked[high + 1][0] if high + 1 < len(ranked) else None
            # What one more costs in padding: a shorter one its own, a longer one everybody else's.
            takes_shorter = longer is None or (
                shorter is not None and longest - shorter <= (longer - longest) * (size - 1)
            )
            length = shorter if takes_shorter else longer
            assert length is not None, "there is one more on at least one side"
            padded = max(longest, length) * size
            if padded > self._max_tokens or padded - tokens - length > LARGEST_WASTE * padded:
                break
            longest, tokens = max(longest, length), tokens + length
            low, high = (low - 1, high) if takes_shorter else (low, high + 1)
        return ranked[low : high + 1]

    def _ran(self, batch: Sequence[Slot]) -> Ran:
        """Run one batch, in any thread, its samples made before.

        They are made together rather than as they come: for the second picture in a row the decoder is
        still in the core's cache.
        """
        charged_from, started = self._clock(), time.perf_counter()
        made, failures = started, NO_FAILURES
        result: list[Row] | Exception
        try:
            lacking = [slot for slot in batch if slot[0].samples[slot[1]] is NOT_MADE]
            if lacking:
                failures = self._make(lacking)
                made = time.perf_counter()
                if failures:
                    batch = [slot for slot in batch if slot not in failures]
            result = self._run([job.samples[index] for job, index in batch]) if batch else []
            if len(result) != len(batch):
                raise ValueError(f"{len(batch)} samples in, {len(result)} rows out")
        except Exception as error:
            result = error
        seconds = time.perf_counter() - made
        return Ran(batch, failures, result, started, made - started, seconds, self._clock() - charged_from)

    def _make(self, slots: Sequence[Slot]) -> Mapping[Slot, QuintetError]:
        """Give jobs the samples that they lack; what is wrong with the inputs that cannot be samples."""
        assert self._make_samples is not None, "only batchers that make samples are given inputs"
        failures: dict[Slot, QuintetError] = {}
        samples = self._make_samples([job.inputs[index] for job, index in slots])
        for (job, index), sample in zip(slots, samples, strict=True):
            if isinstance(sample, QuintetError):
                sample.index = index if job.count > 1 else None
                failures[job, index] = sample
            else:
                job.samples[index] = sample
        return failures

    def _finish(self, ran: Ran) -> None:
        for (job, _), error in ran.failures.items():
            job.fail(error)
            self._drop(job)
        batch, result, seconds = ran.batch, ran.result, ran.seconds
        if isinstance(result, Exception):
            self._find_culprit(batch, result)
            return
        if not batch:
            return
        now, size, started = time.perf_counter(), len(batch), ran.started
        waits = []
        last: Job | None = None
        for job, index in batch:
            if job is not last:
                last = job
                job.compute_seconds += seconds
                if not job.is_made:
                    job.prepare_seconds += ran.prepare_seconds
                if size > job.batch_size:
                    job.batch_size = size
                if not index:
                    job.queue_seconds = started - job.entered
                    waits.append(job.queue_seconds)
        # How fast the queue moves, whoever else uses the same cores.
        self._pace += ((now - self._busy_since) / size - self._pace) * PACE_WEIGHT
        self._busy_since = now
        self._prepare_pace += (ran.prepare_seconds / size - self._prepare_pace) * PACE_WEIGHT
        try:
            # Before anybody is answered, who may ask for the numbers next.
            self._on_batch(size, seconds, waits)
        finally:
            for (job, index), row in zip(batch, result, strict=True):
                job.give(index, row)

    def _find_culprit(self, batch: Sequence[Slot], error: Exception) -> None:
        """Run a failed batch again, sample by sample, so that only the sample at fault fails."""
        if len(batch) == 1:
            self._fail(batch[0], error)
            return
        if self._lanes is None:
            for slot in batch:
                self._alone_is_done(slot, self._ran([slot]))
            return
        for slot in batch:
            self._lanes.start(partial(self._ran, [slot]), partial(self._alone_is_done, slot))

    def _alone_is_done(self, slot: Slot, ran: Ran) -> None:
        self.spent_seconds += ran.charged_seconds
        job, index = slot
        if ran.failures:
            job.fail(ran.failures[slot])
            self._drop(job)
        elif isinstance(ran.result, Exception):
            self._fail(slot, ran.result)
        else:
            job.give(index, ran.result[0])

    def _fail(self, slot: Slot, error: Exception) -> None:
        job, index = slot
        failure = InternalError(index=index if job.count > 1 else None)
        log.error("a batch failed on one input", id=failure.id, error=repr(error))
        job.fail(failure)
        self._drop(job)


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded("The deadline passed before the answer; allow more time, or send less at once.")
