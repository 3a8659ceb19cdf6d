"""One version of one model, ready to answer: its room, its network, its queue and its numbers."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from service.batcher import Batcher, Job
from service.lanes import Lanes, LoopTurns
from service.metrics import Board, Tally
from service.models.spec import Answer, Room, Sample
from service.providers import Profile
from service.repository import ModelFiles
from service.runtime import Network, NetworkMismatch
from service.settings import Settings

LEAST_INLINE: Final = 8
"""Fewer inputs are hardly a batch: callers who come together would be answered one by one."""


class LoadedModel:
    """One version of one model, ready to answer.

    Nothing in it refers back to it: whoever took it for a request may finish with it after another
    took its place, and when the last of them has, it is gone at once, network and all.
    """

    def __init__(
        self,
        files: ModelFiles,
        room: Room,
        settings: Settings,
        profile: Profile,
        board: Board,
        lanes: Lanes,
        loop_turns: LoopTurns,
    ) -> None:
        """Open, check and warm the network.

        Raises:
            NetworkMismatch: the files are not the room's network.
            ProviderRefused: it does not run where the operator wants it to.
            RepositoryError: the room needs a file that is not there, or is not what it can use.
        """
        self.room = room = files.furnish(room)
        self.version = str(files.version)
        self.policy = policy = settings.policy(room.name)
        self.network = Network(room, files.network, profile, files.variant, files.card)
        sample = room.to_tensor(room.example)
        self.network.warm_up(sample, policy.max_batch)
        rows = self.network.run([sample])[0]
        if not all(np.isfinite(row).all() for row in rows if np.asarray(row).dtype.kind == "f"):
            raise NetworkMismatch(f"{room}: the network answers the example with values that are no numbers")
        room.to_answer(rows, sample)
        self.meters = Meters(board, room.name, self.version)
        seconds = self.network.seconds_per_input
        # A batch on the event loop must stay short, or everybody else waits for it; one in a
        # lane must end some day, or the other models wait for it.
        inline = runs_inline(self.network, settings.inline_ms)
        longest_batch_ms = settings.inline_ms if inline else policy.batch_ms
        fits = max(1, int(longest_batch_ms / 1000 / seconds))
        length_axis = _length_axis(room)
        # Not in lanes that keep a GPU at work.
        makes_samples = length_axis is None and (inline or not profile.is_gpu)
        self.batcher = _batcher_type(settings)(
            self.network.run,
            make_samples=room.samples if makes_samples else None,
            queue_size=policy.queue_size,
            max_batch=policy.max_batch if length_axis is not None else min(policy.max_batch, fits),
            window_seconds=policy.batch_window_ms / 1000,
            lanes=None if inline else lanes,
            loop_turns=loop_turns,
            length_of=None if length_axis is None else lambda sample: _length(sample, length_axis),
            max_tokens=min(policy.max_tokens, fits * _length(sample, length_axis or 0)),
            seconds_per_input=seconds,
            clock=self.network.clock,
            on_batch=self.meters.batch_ran,
        )
        self.workers = board.gauge(
            "quintet_model_info",
            room.name,
            self.version,
            files.variant,
            self.network.provider,
            files.card["files"][files.variant]["sha256"],
        )

    def prepared(self, seconds: float, spent_seconds: float) -> None:
        """Count that a request's inputs were turned into tensors before their batch.

        Args:
            seconds: That its caller waited for it.
            spent_seconds: That it took of a core. Turns are shared by time, and what a model takes
                elsewhere counts.
        """
        self.meters.preprocess_seconds.observe(seconds)
        self.batcher.spent_seconds += spent_seconds

    def answers(self, job: Job) -> list[Answer]:
        """One answer for each of a job's samples, once it has their rows."""
        started = time.perf_counter()
        answers = list(map(self.room.to_answer, job.rows, job.samples))
        seconds = time.perf_counter() - started
        if not job.is_made:
            self.meters.preprocess_seconds.observe(job.prepare_seconds)
        self.meters.postprocess_seconds.observe(seconds)
        self.batcher.spent_seconds += seconds
        return answers


def _batcher_type(settings: Settings) -> type[Batcher]:
    """The plain one, unless requests are traced."""
    if settings.trace_url is None:
        return Batcher
    from service.tracing import TracedBatcher

    return TracedBatcher


def runs_inline(network: Network, inline_ms: float) -> bool:
    """Whether batches run on the event loop: where at least `LEAST_INLINE` inputs fit into its time."""
    return network.seconds_for(LEAST_INLINE) * 1000 <= inline_ms


def _length_axis(room: Room) -> int | None:
    """The axis of the network's first input that may be of any length; None where none is."""
    shape = room.network_inputs[0].shape
    return shape.index(-1) if -1 in shape else None


def _length(sample: Sample, axis: int) -> int:
    shape = sample.tensors[0].shape
    return shape[axis] if shape else 1


class Meters:
    """The numbers of one model version, on the board."""

    def __init__(self, board: Board, model: str, version: str) -> None:
        self._board = board
        self._labels = (model, version)
        self._inferences = board.counter("quintet_inferences", *self._labels)
        self._batch_size = board.histogram("quintet_batch_size", *self._labels)
        self._compute_seconds = board.histogram("quintet_compute_seconds", *self._labels)
        self._queue_seconds = board.histogram("quintet_queue_seconds", *self._labels)
        self.preprocess_seconds = board.histogram("quintet_preprocess_seconds", *self._labels)
        self.postprocess_seconds = board.histogram("quintet_postprocess_seconds", *self._labels)
        self._requests_computed = board.tally("requests_computed", *self._labels)
        self._last_inference = board.gauge("last_inference", *self._labels)
        self._batches: dict[int, Tally] = {1: board.tally("batches", *self._labels, "1")}

    def batch_ran(self, size: int, compute_seconds: float, queue_seconds: Sequence[float]) -> None:
        """Count a batch; `queue_seconds` are those of the requests that began in it."""
        self._inferences.add(size)
        self._batch_size.observe(size)
        self._compute_seconds.observe(compute_seconds)
        for seconds in queue_seconds:
            self._queue_seconds.observe(seconds)
        requests = len(queue_seconds)
        self._requests_computed.add(compute_seconds * requests, requests)
        self._last_inference.set(time.time())
        batches = self._batches.get(size)
        if batches is None:
            batches = self._batches[size] = self._board.tally("batches", *self._labels, str(size))
        batches.add(compute_seconds)


@dataclass(frozen=True)
class Lapse:
    """How often something happened, and the seconds it took in all."""

    count: int
    seconds: float


@dataclass(frozen=True)
class Statistics:
    """What a model version has done since the server started, in all workers together.

    Attributes:
        inferences: Inputs answered.
        executions: Batches run.
        last_inference: When a batch last ran, in seconds since 1970; 0 for never.
        success: Requests answered.
        fail: Requests refused or failed.
        queue: Requests' waiting for a batch.
        compute_input: Turning requests' inputs into tensors.
        compute_infer: Requests' batches running the network.
        compute_output: Turning rows into answers.
        batches: Batches by their size.
    """

    inferences: int
    executions: int
    last_inference: float
    success: Lapse
    fail: Lapse
    queue: Lapse
    compute_input: Lapse
    compute_infer: Lapse
    compute_output: Lapse
    batches: dict[int, Lapse]


def statistics(
    sums: Mapping[str, Mapping[tuple[str, ...], Sequence[float]]], model: str, version: str
) -> Statistics:
    """The statistics of one model version, out of the board's sums."""
    labels = (model, version)

    def number(family: str) -> float:
        return sums[family].get(labels, (0.0,))[0]

    def tally(family: str) -> Lapse:
        count, seconds = sums[family].get(labels, (0.0, 0.0))
        return Lapse(int(count), seconds)

    def histogram(family: str) -> Lapse:
        return _histograms([sums[family].get(labels, (0.0, 0.0))])

    requests: dict[bool, list[Sequence[float]]] = {True: [], False: []}
    for (of_model, of_version, _, outcome), cells in sums["quintet_request_seconds"].items():
        if (of_model, of_version) == labels:
            requests[outcome == "ok"].append(cells)
    batches = {
        int(size): Lapse(int(count), seconds)
        for (of_model, of_version, size), (count, seconds) in sums["batches"].items()
        if (of_model, of_version) == labels
    }
    return Statistics(
        inferences=int(number("quintet_inferences")),
        executions=sum(lapse.count for lapse in batches.values()),
        last_inference=number("last_inference"),
        success=_histograms(requests[True]),
        fail=_histograms(requests[False]),
        queue=histogram("quintet_queue_seconds"),
        compute_input=histogram("quintet_preprocess_seconds"),
        compute_infer=tally("requests_computed"),
        compute_output=histogram("quintet_postprocess_seconds"),
        batches=dict(sorted(batches.items())),
    )


def _histograms(series: Sequence[Sequence[float]]) -> Lapse:
    """Histograms' cells (buckets, then the sum) together."""
    return Lapse(sum(int(sum(cells[:-1])) for cells in series), sum(cells[-1] for cells in series))
