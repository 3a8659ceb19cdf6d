"""Nonsense for both doors: random bytes, cut and lying tensors, huge shapes, endless headers, slow bodies.

    python -m load_tests.fuzz --port 3000 --grpc-port 3001 --seconds 300 --pid <the worker's>

No answer may be a fault of the server's (5xx, INTERNAL), the server must live, and its memory stay flat.
"""

import argparse
import json
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final

import grpc

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
MEBIBYTE: Final = 1024 * 1024


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
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
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


def resident(pid: int) -> float:
    """A process's resident memory, in mebibytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 / MEBIBYTE


def main() -> None:
    """Send nonsense for a while and tell what came back."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=3000)
    parser.add_argument("--grpc-port", type=int, default=3001)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pid", type=int, help="the worker whose memory is watched")
    options = parser.parse_args()
    chance, counted = Chance(options.seed), Counter[str]()
    channel = grpc.insecure_channel(f"127.0.0.1:{options.grpc_port}", [("grpc.enable_http_proxy", 0)])
    infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    give_up, memory = time.monotonic() + options.seconds, []
    while time.monotonic() < give_up:
        for _ in range(50):
            status = http_status(options.port, chance.choice(HTTP)(chance))
            assert not status.startswith("5"), f"the server's fault: {status}"
            counted[status] += 1
            code = grpc_status(infer, grpc_message(chance))
            assert code in GOOD_CODES, f"the server's fault: {code}"
            counted[code] += 1
        if options.pid:
            memory.append(resident(options.pid))
    print(dict(counted))
    if memory:
        print(f"resident memory in MiB: first {memory[0]:.0f}, last {memory[-1]:.0f}, most {max(memory):.0f}")
    assert http_status(options.port, b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n") == "200"


if __name__ == "__main__":
    main()
