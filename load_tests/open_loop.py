"""Requests that come by themselves: Poisson arrivals at a rate, whatever has become of those before.

`wrk` and `h2load` wait for an answer before they ask again, so that a slow server is asked less
(Schroeder, Wierman and Harchol-Balter, *Open Versus Closed: A Cautionary Tale*, 2006). Here a
request is sent when its time has come, and its latency counts from then, also where it had to
wait for a connection. One thread and `select`, whose clock counts microseconds.

    python -m load_tests.open_loop --port 3000 --path /digit --rate 5000 --seconds 5 seven.png
"""

import argparse
import json
import re
import select
import socket
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

HOST: Final = "127.0.0.1"
CONNECTIONS: Final = 256
DRAIN_SECONDS: Final = 5
"""How long after the last arrival answers are waited for."""

LENGTH: Final = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")


class Caller:
    """One connection, with at most one request on its way."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection((HOST, port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.due = 0.0
        self._received = b""

    def send(self, request: bytes, due: float) -> None:
        """Send a request whose time came at `due`."""
        self.due = due
        self.socket.sendall(request)

    def receive(self) -> bytes | None:
        """The answer's first line, once all of it is there.

        Raises:
            OSError: the server hung up.
        """
        received = self.socket.recv(1 << 18)
        if not received:
            raise ConnectionResetError
        self._received += received
        head, found, body = self._received.partition(b"\r\n\r\n")
        if not found:
            return None
        length = LENGTH.search(head)
        if length is None:
            raise OSError("an answer without a length")
        if len(body) < int(length[1]):
            return None
        self._received = b""
        return head[: head.index(b"\r\n")]


def run(port: int, requests: Sequence[bytes], rate: float, seconds: float, seed: int = 0) -> dict[str, float]:
    """Send requests by turns at random moments; what came of them.

    Args:
        port: Of the server, on this machine.
        requests: Whole HTTP/1.1 requests.
        rate: How many a second, on average.
        seconds: For how long.
        seed: Of the moments.
    """
    chance = np.random.default_rng(seed)
    gaps = chance.exponential(1 / rate, int(rate * seconds * 1.5) + 100)
    moments = np.cumsum(gaps)
    moments = moments[moments < seconds]
    callers = {caller.socket.fileno(): caller for caller in (Caller(port) for _ in range(CONNECTIONS))}
    poll = select.epoll()
    for number in callers:
        poll.register(number, select.EPOLLIN)
    free, waiting = list(callers.values()), deque[float]()
    latencies: list[float] = []
    not_ok = errors = 0
    began = time.perf_counter() + 0.01
    due = (moments + began).tolist()
    next_one, sent, give_up = 0, 0, due[-1] + DRAIN_SECONDS
    while len(latencies) + errors < len(due):
        now = time.perf_counter()
        if now > give_up:
            errors += len(due) - len(latencies) - errors
            break
        while next_one < len(due) and due[next_one] <= now:
            waiting.append(due[next_one])
            next_one += 1
        while waiting and free:
            free.pop().send(requests[sent % len(requests)], waiting.popleft())
            sent += 1
        until = due[next_one] if next_one < len(due) else give_up
        # epoll itself counts milliseconds.
        if not select.select([poll], [], [], max(0.0, until - time.perf_counter()))[0]:
            continue
        for number, _ in poll.poll(0):
            caller = callers[number]
            try:
                status = caller.receive()
            except OSError:
                errors += 1
                poll.unregister(number)
                del callers[number]
                continue
            if status is not None:
                latencies.append(time.perf_counter() - caller.due)
                not_ok += not status.startswith(b"HTTP/1.1 2")
                free.append(caller)
    took = time.perf_counter() - began
    p50, p95, p99 = (float(share) * 1000 for share in np.percentile(latencies or [0.0], (50, 95, 99)))
    return {
        "requests": len(latencies), "seconds": took, "p50_ms": p50, "p95_ms": p95, "p99_ms": p99,
        "not_ok": not_ok, "socket_errors": errors,
    }  # fmt: skip


def http_request(path: str, headers: Sequence[str], body: bytes) -> bytes:
    """A whole request."""
    lines = [f"POST {path} HTTP/1.1", f"Host: {HOST}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def main() -> None:
    """Send files and say in one line of JSON what came of it."""
    parser = argparse.ArgumentParser(
        prog="python -m load_tests.open_loop", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--port", type=int, default=3000)
    parser.add_argument("--path", default="/digit")
    parser.add_argument("--rate", type=float, default=1000, help="requests a second (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=5, help="default %(default)s")
    parser.add_argument("--header", action="append", default=[], help="as in HTTP: 'name: value'")
    parser.add_argument("bodies", nargs="+", type=Path, help="files that are sent by turns")
    options = parser.parse_args()
    requests = [http_request(options.path, options.header, file.read_bytes()) for file in options.bodies]
    print(json.dumps(run(options.port, requests, options.rate, options.seconds)))


if __name__ == "__main__":
    main()
