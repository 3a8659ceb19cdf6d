"""What Prometheus reads: counters, gauges and histograms that are right with several workers.

Every worker keeps its numbers as float64 cells in a file that it maps into memory,
so counting costs one addition, and whichever worker is asked for `/metrics` sees all
workers' cells as they are this moment. A second file says what each cell means.
Labels come from closed sets only (model, version, protocol, outcome), so the files
stay small for ever. What a worker counted outlives it: each new worker adds the numbers of
those that died to one file of the past, so that workers which die over and over fill no disk.

A worker lives as long as it holds the lock on its file of names. Its number (pid) would not do:
where a health check starts a process every few seconds, numbers come round again within days.

Of two kinds of series only the Open Inference Protocol's statistics have a use: tallies
(a count and its seconds) and moments (the latest of all workers counts). Prometheus does
not see them.
"""

import contextlib
import fcntl
import json
import mmap
import os
import secrets
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeVar

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector, CollectorRegistry

from service import gpu

__all__ = [
    "BOARD_BYTES",
    "CONTENT_TYPE_LATEST",
    "Board",
    "Counter",
    "Gauge",
    "Histogram",
    "MetricsFull",
    "Tally",
    "is_alive",
    "reserve",
]

CELLS: Final = 65_536
BOARD_BYTES: Final = CELLS * 8
"""What one worker's numbers take on the disk."""

SECONDS: Final = (
    0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
BATCH_SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)

PAST: Final = "past.json"

Kind = Literal["counter", "gauge", "histogram", "tally", "moment"]
T = TypeVar("T", "Counter", "Gauge", "Histogram", "Tally")
FAMILIES: Final[dict[str, tuple[Kind, str, tuple[str, ...], tuple[float, ...]]]] = {
    "quintet_requests": (
        "counter",
        "Requests answered, by outcome (ok, or the HTTP status of the error).",
        ("model", "version", "protocol", "outcome"),
        (),
    ),
    "quintet_request_seconds": (
        "histogram",
        "From the first byte of a request to its answer.",
        ("model", "version", "protocol", "outcome"),
        SECONDS,
    ),
    "quintet_inferences": ("counter", "Inputs that a network has answered.", ("model", "version"), ()),
    "quintet_preprocess_seconds": (
        "histogram",
        "Turning a request's inputs into tensors.",
        ("model", "version"),
        SECONDS,
    ),
    "quintet_queue_seconds": ("histogram", "Waiting for a batch.", ("model", "version"), SECONDS),
    "quintet_compute_seconds": (
        "histogram",
        "Running the network on one batch.",
        ("model", "version"),
        SECONDS,
    ),
    "quintet_postprocess_seconds": (
        "histogram",
        "Turning a request's rows into answers.",
        ("model", "version"),
        SECONDS,
    ),
    "quintet_batch_size": ("histogram", "Inputs that ran together.", ("model", "version"), BATCH_SIZES),
    "quintet_queue_depth": ("gauge", "Inputs that wait for a batch now.", ("model",), ()),
    "quintet_in_flight": ("gauge", "Requests under way now.", (), ()),
    "quintet_rejected": ("counter", "Requests refused before any work was done.", ("reason",), ()),
    "quintet_queue_places": (
        "gauge",
        "Inputs that may wait for a batch, in all workers together.",
        ("model",),
        (),
    ),
    "quintet_workers": ("gauge", "Workers, by what they do: starting, ready, draining.", ("state",), ()),
    "quintet_worker_starts": (
        "counter",
        "Workers that were started; more than there are, where some died and others took their place.",
        (),
        (),
    ),
    "quintet_cpu_seconds": ("counter", "Processor time that the workers have used.", (), ()),
    "quintet_memory_bytes": ("gauge", "Memory that the workers have resident.", (), ()),
    "quintet_broken_versions": (
        "gauge",
        "Model versions in the repository that cannot be loaded, as each worker counts them.",
        ("model",),
        (),
    ),
    "quintet_model_info": (
        "gauge",
        "Model versions that are loaded: the number of workers that serve them.",
        ("model", "version", "precision", "provider", "sha256"),
        (),
    ),
    "requests_computed": (
        "tally",
        "Requests whose batch ran, each with its batch's time.",
        ("model", "version"),
        (),
    ),
    "batches": ("tally", "Batches of one size.", ("model", "version", "size"), ()),
    "last_inference": ("moment", "When a batch last ran, in seconds since 1970.", ("model", "version"), ()),
}

PUBLIC: Final = frozenset(name for name in FAMILIES if name.startswith("quintet_"))
"""What Prometheus sees."""


class MetricsFull(Exception):
    """More series than cells: a label took values from an open set, which is a mistake of ours."""


class Counter:
    """A number that only grows."""

    __slots__ = ("_cells", "_slot")

    def __init__(self, cells: "memoryview[float]", slot: int) -> None:
        self._cells = cells
        self._slot = slot

    def add(self, amount: float = 1) -> None:
        """Count `amount` more."""
        self._cells[self._slot] += amount


class Gauge(Counter):
    """A number that goes up and down."""

    __slots__ = ()

    def set(self, value: float) -> None:
        """Say what it is now."""
        self._cells[self._slot] = value


class Histogram:
    """How often a value fell into which bucket, and the sum of all values."""

    __slots__ = ("_bounds", "_cells", "_slot", "_sum")

    def __init__(self, cells: "memoryview[float]", slot: int, bounds: tuple[float, ...]) -> None:
        self._cells = cells
        self._slot = slot
        self._bounds = bounds
        self._sum = slot + len(bounds) + 1

    def observe(self, value: float) -> None:
        """Count one value."""
        self._cells[self._slot + bisect_left(self._bounds, value)] += 1
        self._cells[self._sum] += value


class Tally:
    """How often something happened, and the seconds it took in all."""

    __slots__ = ("_cells", "_slot")

    def __init__(self, cells: "memoryview[float]", slot: int) -> None:
        self._cells = cells
        self._slot = slot

    def add(self, seconds: float, count: int = 1) -> None:
        """Count `count` more, of `seconds` together."""
        self._cells[self._slot] += count
        self._cells[self._slot + 1] += seconds


class Series(NamedTuple):
    """One series of one worker, living or dead, as its files have it."""

    is_alive: bool
    name: str
    labels: tuple[str, ...]
    values: list[float]


class Board(Collector):
    """All series of one worker, and the sum over every worker's."""

    def __init__(self, folder: Path) -> None:
        """Keep this worker's cells in `folder`, which its sister workers share.

        Raises:
            OSError: there is no room for them.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._series: dict[tuple[str, tuple[str, ...]], Counter | Histogram | Tally] = {}
        self._used = 0
        stem = f"{os.getpid()}-{secrets.token_hex(4)}"
        with self._locked(fcntl.LOCK_EX):
            self._fold_the_dead()
            with (folder / f"{stem}.cells").open("w+b") as file:
                # Room is taken now: a mapped file that finds the disk full later ends its process.
                reserve(file.fileno(), BOARD_BYTES)
                self._map = mmap.mmap(file.fileno(), BOARD_BYTES)
            self._names = (folder / f"{stem}.names").open("w", encoding="utf-8")
            fcntl.flock(self._names, fcntl.LOCK_EX)
        # A page is made at its first writing, which would be a caller's time.
        self._map[:] = bytes(BOARD_BYTES)
        self._cells = memoryview(self._map).cast("d")
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def counter(self, name: str, *labels: str) -> Counter:
        """The counter `name` for these label values, in the order that `FAMILIES` names them."""
        return self._get(name, labels, Counter)

    def gauge(self, name: str, *labels: str) -> Gauge:
        """The gauge `name` for these label values."""
        return self._get(name, labels, Gauge)

    def histogram(self, name: str, *labels: str) -> Histogram:
        """The histogram `name` for these label values."""
        return self._get(name, labels, Histogram)

    def tally(self, name: str, *labels: str) -> Tally:
        """The tally `name` for these label values."""
        return self._get(name, labels, Tally)

    def _get(self, name: str, labels: tuple[str, ...], kind: type[T]) -> T:
        found = self._series.get((name, labels))
        if found is None:
            found = self._series[name, labels] = self._create(name, labels)
        assert isinstance(found, kind), f"{name} is not a {kind.__name__}"
        return found

    def _create(self, name: str, labels: tuple[str, ...]) -> Counter | Histogram | Tally:
        kind, _, label_names, bounds = FAMILIES[name]
        assert len(labels) == len(label_names), f"{name} is labelled by {label_names}"
        size = _cells_of(name)
        if self._used + size > CELLS:
            raise MetricsFull(name)
        slot, self._used = self._used, self._used + size
        self._names.write(json.dumps([name, labels, slot]) + "\n")
        self._names.flush()
        if kind == "histogram":
            return Histogram(self._cells, slot, bounds)
        if kind == "tally":
            return Tally(self._cells, slot)
        return (Counter if kind == "counter" else Gauge)(self._cells, slot)

    def exposition(self) -> bytes:
        """All workers' numbers in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """What Prometheus sees."""
        sums = self.sums()
        for name in FAMILIES:
            if name in PUBLIC:
                yield _family(name, sums[name])
        yield from gpu.families()

    def sums(self) -> dict[str, dict[tuple[str, ...], list[float]]]:
        """All workers' cells together, by family and label values.

        Gauges count only workers that still live; of moments the latest counts.
        """
        sums: dict[str, dict[tuple[str, ...], list[float]]] = {name: {} for name in FAMILIES}
        with self._locked(fcntl.LOCK_SH):
            for series in self._all_workers():
                _add(sums, series)
        return sums

    def _all_workers(self) -> Iterator[Series]:
        """Every worker's series, those of the past first; the folder must be locked."""
        past = self._read_past()
        for name, labels, values in past["series"]:
            yield Series(False, name, tuple(labels), values)
        for names_file in sorted(self._folder.glob("*.names")):
            if names_file.stem in past["folded"]:
                continue
            with names_file.open(encoding="utf-8") as file:
                is_alive = not _can_be_locked(file.fileno())
                # A worker that was killed may have left half a line, and no cells for it.
                lines = [line for line in file if line.endswith("\n")]
            series = [json.loads(line) for line in lines]
            used = max((slot + _cells_of(name) for name, _, slot in series), default=0)
            with names_file.with_suffix(".cells").open("rb") as file_of_cells:
                cells: memoryview[float] = memoryview(file_of_cells.read(used * 8)).cast("d")
            for name, labels, slot in series:
                yield Series(is_alive, name, tuple(labels), list(cells[slot : slot + _cells_of(name)]))

    def _read_past(self) -> dict[str, list[Any]]:
        """What workers counted whose files are gone, and the names of those whose files are about to go."""
        path = self._folder / PAST
        if not path.exists():
            return {"folded": [], "series": []}
        past: dict[str, list[Any]] = json.loads(path.read_text(encoding="utf-8"))
        return past

    def _fold_the_dead(self) -> None:
        """Add the numbers of workers that died to those of the past, and let their files go."""
        dead = []
        for names_file in self._folder.glob("*.names"):
            with names_file.open(encoding="utf-8") as file:
                if _can_be_locked(file.fileno()):
                    dead.append(names_file)
        if not dead:
            return
        sums: dict[str, dict[tuple[str, ...], list[float]]] = {name: {} for name in FAMILIES}
        for series in self._all_workers():
            if not series.is_alive:
                _add(sums, series)
        past = {
            "folded": [names_file.stem for names_file in dead],
            "series": [(name, *one) for name, of_name in sums.items() for one in of_name.items()],
        }
        draft = self._folder / f"{PAST}.draft"
        # On a full disk they stay as they are, and are right as they are.
        with contextlib.suppress(OSError):
            draft.write_text(json.dumps(past), encoding="utf-8")
            # From here on they count as past, even if we are killed before their files are gone.
            draft.replace(self._folder / PAST)
            for names_file in dead:
                names_file.with_suffix(".cells").unlink(missing_ok=True)
                names_file.unlink()

    @contextlib.contextmanager
    def _locked(self, kind: int) -> Iterator[None]:
        """Alone in the folder, or (`LOCK_SH`) with others who only read."""
        with (self._folder / "lock").open("a") as file:
            fcntl.flock(file, kind)
            yield

    def close(self) -> None:
        """Let go of the files; the numbers stay for the sister workers to show."""
        self._names.close()


def _add(sums: dict[str, dict[tuple[str, ...], list[float]]], series: Series) -> None:
    """Add a series to those of its name and labels; a dead worker's gauges say nothing any more."""
    kind = FAMILIES[series.name][0]
    if kind == "gauge" and not series.is_alive:
        return
    total = sums[series.name].setdefault(series.labels, [0.0] * len(series.values))
    for position, value in enumerate(series.values):
        total[position] = max(total[position], value) if kind == "moment" else total[position] + value


def _can_be_locked(file: int) -> bool:
    """Whether nobody holds the lock on this file: its worker is dead."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def reserve(file: int, size: int) -> None:
    """Give a file so many bytes of zeros, on the disk and not only in its length."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.truncate(file, size)


def _cells_of(name: str) -> int:
    """How many cells a series of this family takes."""
    kind, _, _, bounds = FAMILIES[name]
    return len(bounds) + 2 if kind == "histogram" else 2 if kind == "tally" else 1


def _family(name: str, series: dict[tuple[str, ...], list[float]]) -> Metric:
    kind, words, label_names, bounds = FAMILIES[name]
    if kind == "counter":
        counter = CounterMetricFamily(name, words, labels=label_names)
        for labels, (value,) in series.items():
            counter.add_metric(labels, value)
        return counter
    if kind == "gauge":
        gauge = GaugeMetricFamily(name, words, labels=label_names)
        for labels, (value,) in series.items():
            gauge.add_metric(labels, value)
        return gauge
    histogram = HistogramMetricFamily(name, words, labels=label_names)
    for labels, values in series.items():
        so_far, buckets = 0.0, []
        for bound, count in zip([*map(str, map(float, bounds)), "+Inf"], values[:-1], strict=True):
            so_far += count
            buckets.append((bound, so_far))
        histogram.add_metric(labels, buckets=buckets, sum_value=values[-1])
    return histogram


def is_alive(pid: int) -> bool:
    """Whether there is a process of this number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
