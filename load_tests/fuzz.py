"""Nonsense for both doors: random bytes, cut and lying tensors, huge shapes, endless headers, slow bodies.

    python -m load_tests fuzz --minutes 5

No answer may be a fault of the server's (5xx, INTERNAL), the server must live, and its memory stay flat
within 5 %.
"""

import json
import random
import socket
import struct
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, Self

import grpc

from load_tests import proof
from load_tests.proof import Deviation, check_flat
from load_tests.scenarios import HOST
from load_tests.servers import Running
from service import http2
from service.models import MODELS
from service.proto import grpc_service_pb2 as pb

Chance = random.Random
GOOD_CODES: Final = (
    "OK",
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "RESOURCE_EXHAUSTED",
    "UNIMPLEMENTED",
    "DEADLINE_EXCEEDED",
)
PATHS: Final = (
    b"/inference.GRPCInferenceService/ModelInfer",
    b"/inference.GRPCInferenceService/ModelStreamInfer",
    b"/grpc.health.v1.Health/Watch",
    b"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    b"/",
)
SLOW_CALLERS: Final = 100
"""Connections that send a byte now and then, and never come to an end."""


def http_head(path: str, length: int, *headers: str) -> bytes:
    """The first lines of a POST that says it has so many bytes."""
    lines = [f"POST {path} HTTP/1.1", "Host: quintet", f"Content-Length: {length}", "Connection: close"]
    return "\r\n".join([*lines, *headers, "", ""]).encode("latin-1")


def random_bytes(chance: Chance) -> bytes:
    """No HTTP at all, or the beginning of some."""
    start = chance.choice(
        [b"", b"POST /digit HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: x\r\n", b"PRI * HTTP/2.0\r\n\r\n"]
    )
    return start + chance.randbytes(chance.randrange(1, 2000))


def random_body(chance: Chance) -> bytes:
    """Any bytes, said to be of any kind, for any path."""
    path = chance.choice([f"/{name}" for name in MODELS] + [f"/v2/models/{name}/infer" for name in MODELS])
    kind = chance.choice(
        ["image/png", "application/json", "multipart/form-data; boundary=x", "text/plain", "a/b", ""]
    )
    coding = chance.choice(["", "Content-Encoding: gzip", "Content-Encoding: deflate"])
    body = chance.choice([b"", b"{", b"\x89PNG\r\n\x1a\n", b"--x\r\n"]) + chance.randbytes(
        chance.randrange(500)
    )
    return http_head(path, len(body), f"Content-Type: {kind}", *([coding] if coding else [])) + body


def lying_tensor(chance: Chance) -> bytes:
    """A binary tensor whose lengths and shape are not those of its bytes."""
    shape = [chance.choice([0, 1, 2, 28, 2**31, 2**62, -1]) for _ in range(chance.randrange(0, 5))]
    raw = chance.randbytes(chance.randrange(0, 900))
    name, datatype = chance.choice(
        [("pixels", "UINT8"), ("image", "BYTES"), ("text", "BYTES"), ("digit", "INT64")]
    )
    size = chance.choice([len(raw), len(raw) + 1, 0, 2**40, -1])
    tensor = {"name": name, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": size}}
    head = json.dumps({"inputs": [tensor]}).encode()
    said = chance.choice([len(head), len(head) - 1, 0, 10**9])
    model = chance.choice(list(MODELS))
    return (
        http_head(f"/v2/models/{model}/infer", len(head + raw), f"Inference-Header-Content-Length: {said}")
        + head
        + raw
    )


def endless_headers(chance: Chance) -> bytes:
    """Ten thousand headers, or one that is very long."""
    if chance.random() < 0.5:
        return http_head("/digit", 0, *(f"X-{number}: {number}" for number in range(10_000)))
    return http_head("/digit", 0, f"X-Long: {'x' * 200_000}")


def cut_body(chance: Chance) -> bytes:
    """Less than was promised: the caller waits a little, and hangs up."""
    return http_head(f"/{chance.choice(list(MODELS))}", 100_000) + chance.randbytes(chance.randrange(100))


HTTP: Final[tuple[Callable[[Chance], bytes], ...]] = (
    random_bytes,
    random_body,
    random_body,
    lying_tensor,
    lying_tensor,
    endless_headers,
    cut_body,
)


def http_status(port: int, sent: bytes) -> str:
    """What the HTTP door says to these bytes; `none` where it hangs up or waits for more."""
    with socket.create_connection((HOST, port), timeout=5) as connection:
        connection.settimeout(0.5)
        try:
            connection.sendall(sent)
            answer = connection.recv(4096)
        except OSError:
            return "none"
    return answer.split(b" ")[1].decode("latin-1") if answer.startswith(b"HTTP/1.1 ") else "none"


def grpc_message(chance: Chance) -> bytes:
    """A message that is none, is cut, or says what is not so."""
    request = pb.ModelInferRequest(model_name=chance.choice([*MODELS, "", "x" * 1000]))
    for _ in range(chance.randrange(3)):
        shape = [chance.choice([0, 1, 2**62, -1]) for _ in range(chance.randrange(4))]
        request.inputs.add(
            name=chance.choice(["pixels", "image", "text", "digit", ""]),
            datatype=chance.choice(["UINT8", "BYTES", "FP16", "nonsense"]),
            shape=shape,
        )
        length = struct.pack("<I", chance.choice([0, 5, 2**32 - 1]))
        request.raw_input_contents.append(length + chance.randbytes(chance.randrange(50)))
    message: bytes = request.SerializeToString()
    return chance.choice([message, message[: len(message) // 2], chance.randbytes(100)])


def grpc_status(infer: Callable[..., object], message: bytes) -> str:
    """How the gRPC door ends a call with this message."""
    try:
        infer(message, timeout=10)
    except grpc.RpcError as error:
        code: str = error.code().name
        return code
    return "OK"


def right_frames(chance: Chance, number: int) -> bytes:
    """A call with a message or two that may be none, or something small between calls."""
    head = b"\x83\x86" + http2.literal(b":path", chance.choice(PATHS))
    head += http2.literal(b"content-type", b"application/grpc")
    if chance.random() < 0.3:
        head += http2.literal(b"grpc-encoding", chance.choice([b"gzip", b"deflate", b"identity", b"br"]))
    if chance.random() < 0.3:
        head += http2.literal(b"grpc-timeout", chance.choice([b"1S", b"10m", b"1n", b"x", b""]))
    frames = [(http2.HEADERS, http2.END_HEADERS, number, head)]
    for _ in range(chance.randrange(3)):
        message = grpc_message(chance)
        length = chance.choice([len(message), len(message), len(message), 2**32 - 1, 1])
        framed = struct.pack(">BI", chance.choice([0, 0, 0, 1, 7]), length) + message
        cut = chance.randrange(len(framed) + 1)
        frames += [(http2.DATA, 0, number, framed[:cut]), (http2.DATA, 0, number, framed[cut:])]
    frames += chance.choice(
        [
            [(http2.DATA, http2.END_STREAM, number, b"")],
            [(http2.RST_STREAM, 0, number, bytes(4))],
            [(http2.PING, 0, 0, bytes(8))],
            [(http2.WINDOW_UPDATE, 0, number, struct.pack(">I", chance.randrange(1, 1 << 20)))],
            [
                (
                    http2.SETTINGS,
                    0,
                    0,
                    struct.pack(">HI", http2.INITIAL_WINDOW_SIZE, chance.choice([0, 9, 1 << 20])),
                )
            ],
            [],
        ]
    )
    return b"".join(
        http2.HEAD.pack(len(payload) << 8 | kind, flags, number) + payload
        for kind, flags, number, payload in frames
    )


def wrong_frame(chance: Chance) -> bytes:
    """A frame of any kind, of any stream, which may be longer or shorter than it says."""
    payload = chance.choice(
        [b"", bytes(4), bytes(8), b"\x83\x86\x84", chance.randbytes(chance.randrange(300))]
    )
    kind = chance.choice([http2.DATA, http2.HEADERS, *range(11), 0x77])
    flags = chance.choice([0, 1, 4, 5, 5, 8, 0x20, 0xFF])
    number = chance.choice([0, 1, 1, 3, 3, 5, 7, 2, 99, 2**31 - 1])
    length = len(payload) if chance.random() < 0.9 else chance.randrange(1 << 24)
    return http2.HEAD.pack(length << 8 | kind, flags, number) + payload


def random_frames(chance: Chance) -> bytes:
    """HTTP/2 that is right, nearly right, or none."""
    frames = [http2.PREFACE + http2.HEAD.pack(http2.SETTINGS, 0, 0)]
    if chance.random() < 0.05:
        frames = [chance.choice([http2.PREFACE, b"", http2.PREFACE[:10]])]
    wrongness = chance.choice([0, 0.05, 0.2, 1])
    for number in range(1, chance.randrange(2, 60), 2):
        wrong = chance.random() < wrongness
        frames.append(wrong_frame(chance) if wrong else right_frames(chance, number))
    return b"".join(frames)


def http2_answer(port: int, sent: bytes) -> str:
    """Whether the gRPC door says goodbye to these bytes, hangs up, or waits for more."""
    with socket.create_connection((HOST, port), timeout=5) as connection:
        connection.settimeout(0.05)
        answer = b""
        try:
            connection.sendall(sent)
            while part := connection.recv(65536):
                answer += part
        except TimeoutError:
            return "HTTP/2 waits"
        except OSError:
            return "HTTP/2 hangs up"
    return "HTTP/2 goodbye" if answer else "HTTP/2 hangs up"


class SlowCallers:
    """Callers who send their bodies a byte at a time; the oldest makes room for a new one."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._open: deque[socket.socket] = deque()

    def send_a_byte_each(self) -> None:
        """Add a caller, and have every one send its next byte."""
        caller = socket.create_connection((HOST, self._port), timeout=5)
        caller.sendall(http_head(f"/{next(iter(MODELS))}", 100_000))
        self._open.append(caller)
        for one in self._open:
            # Those that the server has hung up on stay in line until it is their turn to go.
            with suppress(OSError):
                one.sendall(b"x")
        if len(self._open) > SLOW_CALLERS:
            self._open.popleft().close()

    def __enter__(self) -> Self:
        """Begin with nobody."""
        return self

    def __exit__(self, *error: object) -> None:
        """Hang up, all of them."""
        while self._open:
            self._open.popleft().close()


def throw(
    http_port: int, grpc_port: int, chance: Chance, seconds: float, look: Callable[[], object]
) -> Counter[str]:
    """Throw nonsense at both doors for a while, among slow callers; how often each answer came.

    `look` is called now and then.

    Raises:
        Deviation: the server was at fault.
    """
    counted = Counter[str]()
    give_up = time.monotonic() + seconds
    with (
        SlowCallers(http_port) as slow,
        grpc.insecure_channel(f"{HOST}:{grpc_port}", [("grpc.enable_http_proxy", 0)]) as channel,
    ):
        infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        while time.monotonic() < give_up:
            for _ in range(20):
                status = http_status(http_port, chance.choice(HTTP)(chance))
                if status.startswith("5"):
                    raise Deviation(f"the HTTP door says {status} to nonsense")
                code = grpc_status(infer, grpc_message(chance))
                if code not in GOOD_CODES:
                    raise Deviation(f"the gRPC door says {code} to nonsense")
                frames = http2_answer(grpc_port, random_frames(chance))
                counted.update((f"HTTP {status}", code, frames))
            slow.send_a_byte_each()
            look()
    if http_status(http_port, b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n") != "200":
        raise Deviation("the server does not answer any more")
    return counted


def run(running: Running, seconds: float, chance: Chance) -> None:
    """Throw nonsense at a server for a while and tell what came back.

    Raises:
        Deviation: the server was at fault, or its memory did not stay flat.
    """
    held: list[float] = []
    counted = throw(
        running.port, running.grpc_port, chance, seconds, lambda: held.append(running.resident_mib())
    )
    for answer, count in sorted(counted.items()):
        print(f"{count:9,} {answer}")
    check_flat(held)


def main(arguments: Sequence[str]) -> int:
    """Start a server and send it nonsense; 0 if it bore that well."""
    parser = proof.parser_of("fuzz", __doc__)
    parser.add_argument("--minutes", type=float, default=5, help="(default %(default)s)")
    options = parser.parse_args(arguments)
    chance = Chance(options.seed)
    return proof.carry_out(options, lambda running: run(running, options.minutes * 60, chance))
