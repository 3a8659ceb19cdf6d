"""How fast a network runs with no server around it: ONNX Runtime alone, in its best batches and lanes.

    python -m load_tests.limit image --seconds 3              # finds the best, then measures it
    python -m load_tests.limit image --lanes 2 --batch 8 --seconds 3

A lane is a thread that runs batch after batch; all lanes share one session. Its batches are
stacked beforehand, texts with those of about their own length: what is timed is the run. With
`--decode` each batch is decoded and stacked first, as a server must.
"""

import argparse
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime

from load_tests import payloads
from service.matrix_units import suited
from service.models import MODELS
from service.models.spec import Array, Room, Sample
from service.providers import Profile, profile_of, refuse_other_provider
from service.repository import ModelFiles, Repository
from service.settings import Settings, cores

BATCHES: Final = (1, 2, 4, 8, 16, 32, 64)
TRIAL_SECONDS: Final = 0.4
LONGEST_BATCH_SECONDS: Final = 0.5
"""Nobody would wait for a larger one."""

Feed = Mapping[str, Array]


@dataclass(frozen=True)
class Way:
    """How batches are run.

    Attributes:
        lanes: Threads that run batches at the same time.
        threads: Threads inside a run.
        batch: Inputs in a run.
    """

    lanes: int
    threads: int
    batch: int


@dataclass(frozen=True)
class Runs:
    """What came of it.

    Attributes:
        inputs_per_second: In all lanes together.
        p50_ms: How long half of the runs took at the most.
        inputs: How many there were.
    """

    inputs_per_second: float
    p50_ms: float
    inputs: int


class BareNetwork:
    """One model's network and what it is run on."""

    def __init__(
        self, room: Room, files: ModelFiles, inputs: Sequence[Mapping[str, Any]], profile: Profile
    ) -> None:
        """Prepare.

        Args:
            room: The model, furnished.
            files: Its network.
            inputs: What is asked, by turns.
            profile: Where it runs.
        """
        self._room = room
        self._file = suited(files.network, profile)
        self._profile = profile
        self._providers = profile.providers(room, files.variant, graphs=False)
        self._inputs = inputs
        samples = [room.to_tensor(one) for one in inputs]
        # Neighbours in length make batches without padding; pictures are all of one size.
        self._samples = sorted(samples, key=lambda sample: sample.tensors[0].size)
        self._outputs = [tensor.name for tensor in room.network_outputs]

    def session(self, threads: int) -> onnxruntime.InferenceSession:
        """A session as the service opens it, with so many threads inside a run.

        Raises:
            ProviderRefused: it does not run where it should.
        """
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(self._file, options, providers=self._providers)
        refuse_other_provider(self._profile.name, session.get_providers())
        return session

    def measure(self, way: Way, seconds: float, *, decodes: bool = False) -> Runs:
        """Run batches for a while.

        Args:
            way: In so many lanes, so large.
            seconds: For how long.
            decodes: Whether the inputs are decoded and stacked each time.
        """
        session = self.session(way.threads)
        lanes = [_Lane() for _ in range(way.lanes)]
        starts = range(0, len(lanes) * way.batch, way.batch)
        feeds = self._ready(way.batch)
        # Whole turns only: texts stand by length, and a part of them would be none of the average.
        turn = 1 if decodes else len(feeds)
        batches = [
            self._decoded(way.batch, start)
            if decodes
            else itertools.cycle([partial(dict, feed) for feed in feeds])
            for start in starts
        ]
        session.run(self._outputs, next(batches[0])())
        threads = [
            threading.Thread(target=lane.run, args=(session, self._outputs, ready, way.batch, turn, seconds))
            for lane, ready in zip(lanes, batches, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        durations = [one for lane in lanes for one in lane.durations]
        return Runs(
            sum(lane.inputs / lane.seconds for lane in lanes),
            float(np.median(durations)) * 1000,
            sum(lane.inputs for lane in lanes),
        )

    def find_best(self, count: int) -> Way:
        """The lanes, threads and batch that run most inputs a second on so many cores."""
        rates: dict[Way, float] = {}
        for lanes, threads in sorted({(count, 1), (1, count)}):
            for batch in BATCHES:
                way = Way(lanes, threads, batch)
                runs = self.measure(way, TRIAL_SECONDS)
                rates[way] = runs.inputs_per_second
                if runs.p50_ms > LONGEST_BATCH_SECONDS * 1000 / 2:
                    break
        return max(rates, key=lambda way: rates[way])

    def _ready(self, batch: int) -> list[Feed]:
        """Batches stacked beforehand, of all samples together."""
        count = max(len(self._samples), batch)
        row = [self._samples[place * len(self._samples) // count] for place in range(count)]
        return [self._stacked(row[start : start + batch]) for start in range(0, count - batch + 1, batch)]

    def _decoded(self, batch: int, start: int) -> Iterator[Callable[[], Feed]]:
        """Batches that are decoded and stacked when they are called for, for ever."""
        turns = itertools.cycle(self._inputs)
        inputs = itertools.islice(turns, start, None)
        while True:
            some = list(itertools.islice(inputs, batch))
            yield lambda some=some: self._stacked([self._room.to_tensor(one) for one in some])

    def _stacked(self, samples: Sequence[Sample]) -> Feed:
        feed = {}
        for position, tensor in enumerate(self._room.network_inputs):
            arrays = [sample.tensors[position] for sample in samples]
            shape = np.max([array.shape for array in arrays], axis=0)
            stacked = np.zeros((len(arrays), *map(int, shape)), tensor.dtype)
            for row, array in enumerate(arrays):
                stacked[(row, *(slice(size) for size in array.shape))] = array
            feed[tensor.name] = stacked
        return feed


class _Lane:
    """One thread's work."""

    def __init__(self) -> None:
        self.durations: list[float] = []
        self.inputs = 0
        self.seconds = 0.0

    def run(
        self,
        session: onnxruntime.InferenceSession,
        outputs: Sequence[str],
        batches: Iterator[Callable[[], Feed]],
        size: int,
        turn: int,
        seconds: float,
    ) -> None:
        began = now = time.perf_counter()
        while now - began < seconds or len(self.durations) % turn:
            session.run(outputs, next(batches)())
            ended = time.perf_counter()
            self.durations.append(ended - now)
            self.inputs += size
            now = ended
        self.seconds = now - began


def open_network(model: str, models: Path, precision: str = "") -> BareNetwork:
    """A model's network out of the repository, in the precision that the service takes or in this one.

    Raises:
        ProviderRefused: there is no such place here.
    """
    settings = Settings(models=models, precision=precision or "auto")
    profile = profile_of(settings)
    files = Repository(models).open(model, None, profile.variants)
    return BareNetwork(files.furnish(MODELS[model]), files, payloads.inputs_of(model), profile)


def main() -> None:
    """Measure, and say in one line of JSON what came of it."""
    parser = argparse.ArgumentParser(prog="python -m load_tests.limit", description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("--models", type=Path, default=Settings().models, help="model repository")
    parser.add_argument("--precision", default="", help="fp32, fp16 or int8; default: what the service takes")
    parser.add_argument("--lanes", type=int, default=0, help="runs at a time (default: the best)")
    parser.add_argument("--threads", type=int, default=1, help="threads in a run (default %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="inputs in a run (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=3, help="default %(default)s")
    parser.add_argument("--decode", action="store_true", help="count the decoding too")
    options = parser.parse_args()
    network = open_network(options.model, options.models, options.precision)
    way = Way(options.lanes, options.threads, options.batch)
    if not options.lanes:
        way = network.find_best(cores())
    runs = network.measure(way, options.seconds, decodes=options.decode)
    print(json.dumps({"way": asdict(way), **asdict(runs)}))


if __name__ == "__main__":
    main()
