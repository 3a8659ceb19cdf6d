"""Who is measured with what, and how fast the service must be: the sections of a run."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from load_tests import claims, payloads
from load_tests.claims import Claim
from load_tests.payloads import Payload
from load_tests.peers.environments import python_of
from service.models import MODELS

HOST: Final = "127.0.0.1"
PEERS: Final = Path(__file__).with_name("peers")
CONNECTIONS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
INPUTS: Final = (1, 2, 4, 8, 16, 32, 64)
STREAMS: Final = 8
"""At a time. Triton's server ends under more of them in nearly every round, and under these in some."""

OPEN_SHARE: Final = 0.7
"""Of what a closed loop gets, the rate at which requests come by themselves."""

MOST_MEMORY_MIB: Final = 1.2 * 1024


@dataclass(frozen=True)
class Server:
    """A server as it is started.

    Attributes:
        name: For the table.
        workers: Processes that answer, or instances.
        command: With `{port}`, `{grpc_port}` and `{scratch}` where they belong; none for the bare
            ONNX Runtime, which has no door.
        environment: Variables beside the usual ones.
        peer: The environment of its own that it needs; none for what runs in ours.
        model: Which model's file it is given, where it serves one alone.
        precision: Of that file; none for what the service takes.
        answers_truly: Whether its answers are the network's.
    """

    name: str
    workers: int
    command: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    peer: str = ""
    model: str = ""
    precision: str = ""
    answers_truly: bool = True


@dataclass(frozen=True)
class Scenario:
    """One row of the table: a payload, sent to a server over and over.

    Attributes:
        server: Who is asked.
        payload: What.
        connections: Callers at a time, each waiting for its answer; none for the run's own number.
        choice: Rows of one choice are alternatives: after the first round only the best goes on.
        open_after: The row, earlier in the same section, at a share of whose rate requests come by
            themselves, answered or not.
        crowd: Rows of one crowd are measured at the same time.
        counts_decoding: For the bare ONNX Runtime: whether the input is decoded too.
        batch: For it: inputs in a run; none for what is found best.
    """

    server: Server
    payload: Payload
    connections: int | None = None
    choice: str = ""
    open_after: str = ""
    crowd: str = ""
    counts_decoding: bool = False
    batch: int | None = None

    @property
    def what(self) -> str:
        """What is sent, or run."""
        return self.payload.name if not self.is_bare or self.counts_decoding else "ready tensors"

    @property
    def name(self) -> str:
        """The row's name."""
        details = [str(self.server.workers)]
        if self.connections is not None:
            details.append(f"{self.connections} connection{'s' * (self.connections > 1)}")
        if self.open_after:
            details.append("Poisson")
        if self.crowd:
            details.append(self.crowd)
        if self.counts_decoding:
            details.append("decoding too")
        return f"{self.server.name} {self.what} ({', '.join(details)})"

    @property
    def is_bare(self) -> bool:
        """Whether there is no server, only ONNX Runtime."""
        return not self.server.command


@dataclass(frozen=True)
class Section:
    """Rows that belong together, and what they must show.

    Attributes:
        name: On the command line and of its files.
        title: For people.
        rows: In the order of a round.
        claims: What must hold.
        yardstick: The row that the others are compared with in the table.
        grows: What the rows differ by, where they are a curve: `(row, amount)` of each.
        most_rounds: It needs no more.
    """

    name: str
    title: str
    rows: tuple[Scenario, ...]
    claims: tuple[Claim, ...] = ()
    yardstick: str = ""
    curves: Mapping[str, tuple[tuple[str, int], ...]] = field(default_factory=dict)
    most_rounds: int = 1 << 30


def _python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, *arguments)


def _script(peer: str, script: str, *arguments: str) -> tuple[str, ...]:
    return (str(python_of(peer)), str(PEERS / script), *arguments)


# Ours.


def quintet(workers: int, environment: Mapping[str, str] | None = None, name: str = "quintet") -> Server:
    """The service, as it is deployed."""
    serve = ("-m", "bentoml", "serve", "service:Quintet", "--host", HOST, "--port", "{port}")
    return Server(name, workers, _python(*serve), environment or {})


def _uvicorn(name: str, factory: str, workers: int, model: str, *, answers_truly: bool = True) -> Server:
    options = ("--http", "httptools", "--loop", "uvloop", "--lifespan", "off", "--no-server-header")
    quiet = ("--no-access-log", "--log-level", "warning", "--workers", str(workers))
    address = ("--factory", factory, "--host", HOST, "--port", "{port}")
    command = _python("-m", "uvicorn", *address, *options, *quiet)
    return Server(name, workers, command, {"PEER_MODEL": model}, model=model, answers_truly=answers_truly)


def bare(workers: int) -> Server:
    """The same decode, batcher and session with nothing around them."""
    return _uvicorn("bare", "load_tests.peers.bare_asgi:application", workers, "digit")


# The limit: what the parts of serving allow, each by itself.


def onnxruntime(cores: int, model: str, precision: str = "") -> Server:
    """The network alone, in as many lanes and as large batches as it likes best."""
    return Server("onnxruntime", cores, model=model, precision=precision)


def answering(workers: int, model: str) -> Server:
    """The barest ASGI server: it decodes and answers, and asks no network."""
    factory = "load_tests.peers.answer_asgi:application"
    return _uvicorn("decode and answer", factory, workers, model, answers_truly=False)


def answering_grpc(workers: int) -> Server:
    """The barest gRPC server: it decodes and answers, and asks no network."""
    command = _python("-m", "load_tests.peers.answer_grpc")
    return Server("decode and answer", workers, command, model="digit", answers_truly=False)


# The peers, each as its own documentation advises.


def bentoml_batchable(workers: int) -> Server:
    """The same network behind BentoML's own batching."""
    service = "load_tests.peers.bentoml_batchable:Peer"
    command = _python("-m", "bentoml", "serve", service, "--host", HOST, "--port", "{port}")
    return Server("bentoml-batchable", workers, command)


def triton(instances: int, model: str = "digit", precision: str = "") -> Server:
    """Triton's C++ server with its Python backend."""
    command = _script("triton", "triton_server.py", "{scratch}/repository")
    name = f"triton {precision}".strip()
    return Server(
        name, instances, command, {"PEER_MODEL": model}, peer="triton", model=model, precision=precision
    )


def mosec(workers: int) -> Server:
    """Mosec, with its Rust server."""
    options = ("--address", HOST, "--port", "{port}", "--log-level", "error")
    return Server("mosec", workers, _script("mosec", "mosec_digit.py", *options), peer="mosec", model="digit")


def litserve(workers: int) -> Server:
    """LitServe."""
    return Server(
        "litserve", workers, _script("litserve", "litserve_digit.py"), peer="litserve", model="digit"
    )


def mlserver(workers: int) -> Server:
    """MLServer, with a custom runtime."""
    command = _script("mlserver", "mlserver_digit.py", "{scratch}/settings")
    return Server("mlserver", workers, command, peer="mlserver", model="digit")


def ray_serve(replicas: int) -> Server:
    """Ray Serve."""
    return Server("ray serve", replicas, _script("ray", "ray_digit.py"), peer="ray", model="digit")


# The sections.


def _counts(workers: int) -> list[int]:
    return sorted({1, workers}, reverse=True)


def digit_rest(workers: int) -> Section:
    """`POST /digit` and the Open Inference Protocol over REST, beside everybody."""
    ours, png, tensor = quintet(workers), payloads.pictures("digit"), payloads.binary_tensor()
    limit = Scenario(onnxruntime(workers, "digit"), payloads.pictures("digit"))
    answer = Scenario(answering(workers, "digit"), png)
    answer_tensor = Scenario(answering(workers, "digit"), tensor)
    the_bare = Scenario(bare(workers), png)
    mine, mine_tensor = Scenario(ours, png), Scenario(ours, tensor)
    peers: dict[str, list[Scenario]] = {
        "triton": [Scenario(triton(count), tensor, choice="triton") for count in _counts(workers)],
        "mosec": [
            Scenario(mosec(count), payloads.picture_of_a_peer("/inference"), choice="mosec")
            for count in _counts(workers)
        ],
        "litserve": [
            Scenario(litserve(count), payloads.json_picture_of_a_peer("/predict"), choice="litserve")
            for count in _counts(workers)
        ],
        "mlserver": [
            Scenario(mlserver(count), payloads.json_tensor(), choice="mlserver") for count in _counts(workers)
        ],
        "ray serve": [
            Scenario(ray_serve(count), payloads.picture_of_a_peer("/digit"), choice="ray serve")
            for count in _counts(workers)
        ],
        "bentoml": [
            Scenario(bentoml_batchable(count), payload, choice="bentoml")
            for count in _counts(workers)
            for payload in (payloads.multipart_pictures(), payloads.json_arrays())
        ],
    }
    names = {peer: [row.name for row in rows] for peer, rows in peers.items()}
    at_least = {"mosec": 4, "litserve": 8, "mlserver": 5, "ray serve": 5, "bentoml": 8}
    rows = (
        limit, answer, answer_tensor, the_bare, mine, mine_tensor,
        *(row for alternatives in peers.values() for row in alternatives),
    )  # fmt: skip
    return Section(
        "digit-rest",
        "One digit a request over REST",
        rows,
        (
            claims.times("POST /digit against Triton fed the raw tensor", mine.name, names["triton"], 1.6),
            *(
                claims.times(f"POST /digit against {peer}", mine.name, names[peer], least)
                for peer, least in at_least.items()
            ),
            claims.of_the_limit("POST /digit of the limit", mine.name, (answer.name, limit.name), 0.75),
            claims.of_the_limit(
                "V2 tensor of the limit", mine_tensor.name, (answer_tensor.name, limit.name), None
            ),
            claims.times("V2 tensor over REST against Triton's", mine_tensor.name, names["triton"], 1.7),
            claims.times("POST /digit against the barest application", mine.name, (the_bare.name,), 0.85),
        ),
        yardstick=mine.name,
    )


def grpc(workers: int) -> Section:
    """The Open Inference Protocol over gRPC, beside Triton."""
    ours, call, stream = quintet(workers), payloads.grpc_call(), payloads.grpc_stream()
    limit = Scenario(onnxruntime(workers, "digit"), payloads.pictures("digit"))
    answer = Scenario(answering_grpc(workers), call)
    mine, streaming = Scenario(ours, call), Scenario(ours, stream, connections=STREAMS)
    theirs = [Scenario(triton(count), call, choice="triton") for count in _counts(workers)]
    streams = [
        Scenario(triton(count), stream, connections=STREAMS, choice="triton stream")
        for count in _counts(workers)
    ]
    # Both payloads of one Triton side by side, so that it is started once for both.
    rivals = [row for pair in zip(theirs, streams, strict=True) for row in pair]
    return Section(
        "grpc",
        "One digit a request over gRPC",
        (limit, answer, mine, streaming, *rivals),
        (
            claims.times("one call a request against Triton's", mine.name, [row.name for row in theirs], 1),
            claims.times(
                "streaming infer against Triton's", streaming.name, [row.name for row in streams], 1.5
            ),
            claims.of_the_limit(
                "one call a request of the limit", mine.name, (answer.name, limit.name), None
            ),
        ),
        yardstick=mine.name,
    )


def image(workers: int) -> Section:
    """Photographs."""
    png = payloads.pictures("image")
    limit = Scenario(onnxruntime(workers, "image"), png)
    answer = Scenario(answering(workers, "image"), png)
    mine = Scenario(quintet(workers), png)
    theirs = [
        Scenario(triton(count, "image", "fp32"), payloads.binary_tensor("image"), choice="triton")
        for count in _counts(workers)
    ]
    return Section(
        "image",
        "One photograph a request",
        (limit, answer, mine, *theirs),
        (
            claims.of_the_limit("POST /image of the limit", mine.name, (answer.name, limit.name), 0.9),
            claims.times(
                "POST /image in auto precision against Triton on fp32",
                mine.name,
                [row.name for row in theirs],
                3,
            ),
        ),
        yardstick=mine.name,
    )


def sentiment(workers: int) -> Section:
    """Reviews of mixed length."""
    limit = Scenario(onnxruntime(workers, "sentiment"), payloads.texts())
    answer = Scenario(answering(workers, "sentiment"), payloads.texts())
    mine = Scenario(quintet(workers), payloads.texts())
    claim = claims.of_the_limit("POST /sentiment of the limit", mine.name, (answer.name, limit.name), 0.9)
    return Section("sentiment", "One review a request", (limit, answer, mine), (claim,), yardstick=mine.name)


def detection(workers: int) -> Section:
    """Slides of blood."""
    slides = payloads.pictures("detection")
    limit = Scenario(onnxruntime(workers, "detection"), slides, counts_decoding=True)
    mine = Scenario(quintet(workers), slides)
    claim = claims.times(
        "POST /detection against bare ONNX Runtime, decoding on both sides", mine.name, (limit.name,), 0.92
    )
    return Section("detection", "One slide a request", (limit, mine), (claim,), yardstick=mine.name)


def latency(workers: int) -> Section:
    """One caller, who waits for nobody else."""
    png = payloads.pictures("digit")
    run = Scenario(onnxruntime(1, "digit"), png, counts_decoding=True, batch=1)
    mine = Scenario(quintet(workers), png, connections=1)
    claim = claims.added_milliseconds(
        "one connection: added to decode and run, p50", mine.name, run.name, 0.35
    )
    return Section("latency", "One caller", (run, mine), (claim,))


def open_loop(workers: int) -> Section:
    """Callers who come when they like, to all workers and to one fewer, which leaves the callers a core."""
    png = payloads.pictures("digit")
    rows, found = [], []
    for count, beside in ((workers, ""), (workers - 1, ", a core left to the callers")):
        if count:
            closed = Scenario(quintet(count), png)
            arriving = Scenario(quintet(count), png, open_after=closed.name)
            words = f"Poisson arrivals at {OPEN_SHARE:.0%} of capacity, p99 by p50{beside}"
            rows += [closed, arriving]
            found.append(claims.tail(words, arriving.name, 3))
    return Section("open-loop", "Requests that come by themselves", tuple(rows), tuple(found))


def mixed(workers: int, models: Sequence[str]) -> Section:
    """All models at once, and each alone."""
    ours = quintet(workers)
    alone = [Scenario(ours, payloads.room_payload(model), connections=16) for model in models]
    together = [
        Scenario(ours, payloads.room_payload(model), connections=16, crowd="together") for model in models
    ]
    return Section(
        "mixed",
        "All models at once",
        (*alone, *together),
        (
            claims.fair_shares(
                f"{len(models)} models at once: each of its fair share",
                [row.name for row in together],
                [row.name for row in alone],
                0.8,
            ),
            claims.memory(
                f"memory with {len(models)} models loaded and asked, {workers} workers",
                together[-1].name,
                MOST_MEMORY_MIB,
            ),
        ),
    )


def growth(workers: int) -> Section:
    """More callers, and more inputs in a request."""
    ours = quintet(workers)
    callers = [Scenario(ours, payloads.pictures("digit"), connections=count) for count in CONNECTIONS]
    # As many callers as may all wait at one worker with the most inputs: the queue holds 1,024.
    sizes = [Scenario(ours, payloads.binary_tensor("digit", count), connections=16) for count in INPUTS]
    return Section(
        "growth",
        "Cost as work grows",
        (*callers, *sizes),
        (
            claims.keeps_up(
                f"{CONNECTIONS[0]} to {CONNECTIONS[-1]} connections",
                [row.name for row in callers],
                "connections",
            ),
            claims.keeps_up(
                f"{INPUTS[0]} to {INPUTS[-1]} inputs a request",
                [row.name for row in sizes],
                "inputs a request",
            ),
        ),
        curves={
            "connections": tuple((row.name, count) for row, count in zip(callers, CONNECTIONS, strict=True)),
            "inputs a request": tuple((row.name, count) for row, count in zip(sizes, INPUTS, strict=True)),
        },
        most_rounds=3,
    )


def doors(workers: int) -> Section:
    """The same digits through every door."""
    ours = quintet(workers)
    every = (
        payloads.pictures("digit"),
        payloads.json_pictures("digit"),
        payloads.json_tensor(),
        payloads.binary_tensor(),
        payloads.grpc_call(),
        payloads.python_client("http"),
        payloads.python_client("grpc"),
    )
    rows = tuple(Scenario(ours, payload) for payload in every)
    return Section(
        "doors", "One digit a request through each door", rows, yardstick=rows[0].name, most_rounds=3
    )


def tracing(workers: int) -> Section:
    """What spans cost: of no request, of one in a hundred, of every one."""
    png = payloads.pictures("digit")
    command = _python("-m", "load_tests.traced", "--port", "{port}")
    plain = Scenario(quintet(workers), png)
    some = Scenario(Server("quintet, 1 % traced", workers, command, {"QUINTET_TRACE_SHARE": "0.01"}), png)
    every = Scenario(Server("quintet, all traced", workers, command), png)
    claim_some = claims.times("one request in a hundred traced, against none", some.name, (plain.name,), None)
    claim_every = claims.times("every request traced, against none", every.name, (plain.name,), None)
    rows = (plain, some, every)
    return Section("tracing", "With and without spans", rows, (claim_some, claim_every), plain.name)


def sections(workers: int, models: Iterable[str]) -> dict[str, Section]:
    """Every section that the repository's models allow, by name, in the order of a run."""
    there = [model for model in MODELS if model in set(models)]
    rooms: dict[Literal["digit", "image", "sentiment", "detection"], list[Section]] = {
        "digit": [digit_rest(workers), grpc(workers)],
        "image": [image(workers)],
        "sentiment": [sentiment(workers)],
        "detection": [detection(workers)],
    }
    found = [section for model, of_model in rooms.items() if model in there for section in of_model]
    if "digit" in there:
        found += [latency(workers), open_loop(workers), growth(workers), doors(workers), tracing(workers)]
    found.append(mixed(workers, there))
    return {section.name: section for section in found}
