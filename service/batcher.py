"""Requests to batches: bounded, first come first served, and no one's trouble is another's.

A batch forms while the one before it runs; nobody waits when nothing runs, unless a
window is set. Short batches run on the event loop, once per turn, over all that came
in meanwhile: a thread would cost more than it gives. Longer ones run in lanes (threads).
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial

import structlog

from service.errors import DeadlineExceeded, InternalError, Overloaded, QuintetError
from service.models.spec import Array, Sample

Row = tuple[Array, ...]
RunNetwork = Callable[[Sequence[Sample]], list[Row]]

log = structlog.get_logger("quintet")


class Job:
    """The samples of one request on their way through the batches.

    Once it is done, `rows` has one row for each sample, in order; `queue_seconds` is how long
    the first of them waited, `compute_seconds` the time of all its batches, `batch_size` that
    of the largest.
    """

    __slots__ = (
        "batch_size", "compute_seconds", "deadline", "entered", "future",
        "left", "next", "queue_seconds", "rows", "samples",
    )  # fmt: skip

    def __init__(
        self, samples: Sequence[Sample], deadline: float | None, future: "asyncio.Future[None]"
    ) -> None:
        self.samples = samples
        self.deadline = deadline
        self.future = future
        self.entered = time.perf_counter()
        self.next = 0
        self.rows: list[Row] = [()] * len(samples)
        self.left = len(samples)
        self.batch_size = 0
        self.queue_seconds = 0.0
        self.compute_seconds = 0.0

    def give(self, index: int, row: Row) -> None:
        """Take the row of one sample; the last one answers the request."""
        self.rows[index] = row
        self.left -= 1
        if not self.left and not self.future.done():
            self.future.set_result(None)

    def fail(self, error: QuintetError) -> None:
        """Answer the request with an error, once."""
        if not self.future.done():
            self.future.set_exception(error)


Slot = tuple[Job, int]


class Batcher:
    """The queue of one model version and the turns that empty it.

    `admit` is asked before any work is done for a request, so a full queue costs its
    callers nothing but the refusal; what was admitted is either run or released.
    """

    def __init__(
        self,
        run: RunNetwork,
        *,
        queue_size: int,
        max_batch: int,
        window_seconds: float = 0.0,
        lanes: int = 1,
        executor: Executor | None = None,
        on_batch: Callable[[int, float, Sequence[float]], None] | None = None,
    ) -> None:
        """Batch the calls of `run`.

        Args:
            run: Samples in, one row each out; must not keep state between calls.
            queue_size: Samples that may wait.
            max_batch: Samples that run together at the most.
            window_seconds: How long the first of a batch waits for company.
            lanes: Batches that may run at the same time in `executor`.
            executor: Threads for the lanes; None runs every batch on the event loop.
            on_batch: Told the size, the compute seconds and the jobs' queue seconds of each batch.
        """
        self._run = run
        self._queue_size = queue_size
        self._max_batch = max_batch
        self._window = window_seconds
        self._executor = executor
        self._free_lanes = lanes if executor else 1
        self._on_batch = on_batch or (lambda size, compute, waits: None)
        self._jobs: deque[Job] = deque()
        self._turn_is_booked = False
        self._window_timer: asyncio.TimerHandle | None = None
        self.depth = 0

    @property
    def is_inline(self) -> bool:
        """Whether batches run on the event loop."""
        return self._executor is None

    def admit(self, count: int) -> None:
        """Take `count` places in the queue.

        Raises:
            Overloaded: there are not that many left.
        """
        if self.depth + count > self._queue_size:
            raise Overloaded("The queue is full; send the request again after a pause.")
        self.depth += count

    def release(self, count: int) -> None:
        """Give back places that `admit` gave, for samples that will not be run."""
        self.depth -= count

    async def run(self, samples: Sequence[Sample], deadline: float | None) -> Job:
        """Run admitted samples; the job, done.

        Args:
            samples: At least one, all admitted before.
            deadline: When to give up, on the event loop's clock.

        Raises:
            DeadlineExceeded: the deadline passed; what had not started by then never will.
            InternalError: the network failed on one of these samples.
        """
        loop = asyncio.get_running_loop()
        job = Job(samples, deadline, loop.create_future())
        timer = None if deadline is None else loop.call_at(deadline, self._expire, job)
        self._jobs.append(job)
        self._book_turn()
        try:
            await job.future
            return job
        finally:
            if timer is not None:
                timer.cancel()
            # Anything left over was cancelled by its caller, or is past its deadline.
            self._drop(job)

    def _expire(self, job: Job) -> None:
        job.fail(_too_late())
        self._drop(job)

    def _drop(self, job: Job) -> None:
        """Give back the places of samples that have not started."""
        self.release(len(job.samples) - job.next)
        job.next = len(job.samples)

    def _book_turn(self) -> None:
        if not self._free_lanes:
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
            self._window_timer = loop.call_later(self._window, self._turn)
        else:
            # Not at once: others whose bytes came in the same turn of the loop join in.
            loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._turn_is_booked = False
        self._window_timer = None
        batch = self._take_batch()
        if not batch:
            return
        if self._executor is None:
            self._finish(batch, *_timed(self._run, batch))
        else:
            self._free_lanes -= 1
            loop = asyncio.get_running_loop()
            future = loop.run_in_executor(self._executor, _timed, self._run, batch)
            future.add_done_callback(lambda done: self._lane_is_free(batch, *done.result()))
        if self._jobs:
            self._book_turn()

    def _lane_is_free(self, batch: list[Slot], result: list[Row] | Exception, seconds: float) -> None:
        self._free_lanes += 1
        if self._jobs:
            self._book_turn()
        self._finish(batch, result, seconds)

    def _take_batch(self) -> list[Slot]:
        """The next samples in line, leaving out those whose caller is gone or out of time."""
        now = asyncio.get_running_loop().time()
        batch: list[Slot] = []
        while self._jobs and len(batch) < self._max_batch:
            job = self._jobs[0]
            if job.future.done() or (job.deadline is not None and job.deadline <= now):
                job.fail(_too_late())
                self._drop(job)
            end = min(len(job.samples), job.next + self._max_batch - len(batch))
            batch.extend((job, index) for index in range(job.next, end))
            self.release(end - job.next)
            job.next = end
            if end == len(job.samples):
                self._jobs.popleft()
        return batch

    def _finish(self, batch: list[Slot], result: list[Row] | Exception, seconds: float) -> None:
        if isinstance(result, Exception):
            self._find_culprit(batch, result)
            return
        started, size = time.perf_counter() - seconds, len(batch)
        waits = []
        last: Job | None = None
        for (job, index), row in zip(batch, result, strict=True):
            if job is not last:
                last = job
                job.compute_seconds += seconds
                if size > job.batch_size:
                    job.batch_size = size
                if not index:
                    job.queue_seconds = started - job.entered
                    waits.append(job.queue_seconds)
            job.give(index, row)
        self._on_batch(size, seconds, waits)

    def _find_culprit(self, batch: list[Slot], error: Exception) -> None:
        """Run a failed batch again, sample by sample, so that only the sample at fault fails."""
        if self._executor is None or len(batch) == 1:
            for slot in batch:
                self._finish_alone(slot, error if len(batch) == 1 else _timed(self._run, [slot])[0])
            return
        loop = asyncio.get_running_loop()
        for slot in batch:
            future = loop.run_in_executor(self._executor, _timed, self._run, [slot])
            future.add_done_callback(partial(self._alone_is_done, slot))

    def _alone_is_done(self, slot: Slot, done: "asyncio.Future[tuple[list[Row] | Exception, float]]") -> None:
        self._finish_alone(slot, done.result()[0])

    def _finish_alone(self, slot: Slot, result: list[Row] | Exception) -> None:
        job, index = slot
        if isinstance(result, Exception):
            failure = InternalError(index=index if len(job.samples) > 1 else None)
            log.error("the network failed on one sample", id=failure.id, error=repr(result))
            job.fail(failure)
        else:
            job.give(index, result[0])


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded("The deadline passed before the answer; allow more time, or send less at once.")


def _timed(run: RunNetwork, batch: Sequence[Slot]) -> tuple[list[Row] | Exception, float]:
    """Run one batch: its rows or what went wrong, and the seconds it took."""
    started = time.perf_counter()
    result: list[Row] | Exception
    try:
        rows = run([job.samples[index] for job, index in batch])
        if len(rows) != len(batch):
            raise ValueError(f"{len(batch)} samples in, {len(rows)} rows out")
        result = rows
    except Exception as error:
        result = error
    return result, time.perf_counter() - started
