"""Load: `wrk` for HTTP/1.1, `h2load` for gRPC, our own programs where no tool fits; and single requests."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any, Final

import grpc
import httpx
import orjson
from quintet_client import Classification, Client, QuintetError

from load_tests.payloads import FRAME, Payload, framed, unframed
from load_tests.scenarios import HOST
from load_tests.servers import Running

PACKAGES: Final = {"wrk": "wrk", "h2load": "nghttp2-client"}
"""The Debian package of each program."""

SCRIPT: Final = Path(__file__).with_name("post.lua")

PEOPLE: Final = 1000
"""Connections on which requests come by themselves."""

ANSWER_SECONDS: Final = 10
"""An answer that takes longer counts as an error."""

NO_ANSWER: Final = (httpx.HTTPError, grpc.RpcError, QuintetError, OSError)
"""What `ask` raises where there is no good answer."""


class ProgramMissing(Exception):
    """A load generator is not installed; the message names its package."""


@dataclass(frozen=True)
class Load:
    """What a load generator saw: how many answers, how fast, and what was wrong with them."""

    requests: int
    seconds: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    problems: tuple[str, ...] = ()

    @property
    def requests_per_second(self) -> float:
        """Answers that came back."""
        return self.requests / self.seconds


def require(program: str) -> str:
    """The path of a load generator.

    Raises:
        ProgramMissing: it is not installed.
    """
    path = shutil.which(program)
    if path is None:
        raise ProgramMissing(f"{program} is not installed; on Debian: apt install {PACKAGES[program]}")
    return path


def version(program: str) -> str:
    """What a load generator says of itself, for the record."""
    option = {"wrk": "-v", "h2load": "--version"}[program]
    said = subprocess.run([require(program), option], capture_output=True, text=True, check=False)
    found = re.search(r"\d[\w.+-]*", said.stdout + said.stderr)
    return found[0] if found else "unknown"


def ask(running: Running, payload: Payload, number: int = 0) -> bytes:
    """Send one request; the body of its answer.

    Args:
        running: The server.
        payload: What to send.
        number: Which of its requests.

    Raises:
        httpx.HTTPError, grpc.RpcError, QuintetError, OSError: there is no good answer.
    """
    body = payload.bodies[number]
    if payload.protocol == "http":
        answer = httpx.post(
            f"http://{HOST}:{running.port}{payload.path}",
            content=body,
            headers=payload.headers,
            timeout=ANSWER_SECONDS,
            trust_env=False,
        )
        return answer.raise_for_status().content
    if payload.protocol == "client":
        with Client(client_url(payload, running), retries=0, timeout=ANSWER_SECONDS) as quintet:
            read: Classification = quintet.digit(body)
            return orjson.dumps([read.probabilities[label] for label in sorted(read.probabilities)])
    with grpc.insecure_channel(f"{HOST}:{running.grpc_port}", [("grpc.enable_http_proxy", 0)]) as channel:
        # The frames are for h2load to send; gRPC's own client puts them around messages itself.
        messages = unframed(body)
        if len(messages) == 1:
            message: bytes = channel.unary_unary(payload.path)(messages[0], timeout=ANSWER_SECONDS)
            return message
        return framed(list(channel.stream_stream(payload.path)(iter(messages), timeout=ANSWER_SECONDS)))


def client_url(payload: Payload, running: Running) -> str:
    """Where our Python client asks, over the protocol that the payload says."""
    return f"{payload.path}://{HOST}:{running.grpc_port if payload.path == 'grpc' else running.port}"


def replay(running: Running, payload: Payload, seconds: float, connections: int, scratch: Path) -> Load:
    """Send a payload over and over, on as many connections, each waiting for its answer before the next.

    Args:
        running: The server.
        payload: What to send.
        seconds: For how long; whole seconds.
        connections: How many at a time.
        scratch: A folder for the load generator's files, its own.
    """
    files = _bodies(payload, scratch)
    if payload.protocol == "grpc":
        return _h2load(running, payload, files[0], seconds, connections)
    if payload.protocol == "client":
        options = [client_url(payload, running), str(seconds), str(connections)]
        return _program("client_load", [*options, *map(str, files)], seconds)
    return _wrk(running.port, payload, files, seconds, connections)


def arrive(port: int, payload: Payload, seconds: float, rate: float, scratch: Path) -> Load:
    """Send a payload at random moments, about so many a second, while others are still being answered.

    `PEOPLE` connections each pause for a random, exponentially distributed time before each
    request. While few of them wait for an answer, their requests come together as a Poisson
    process (Kleinrock, *Queueing Systems*, 1975: many sources), whoever is being answered.
    A server is asked the less, the longer its answers take beside the pauses: a few hundredths,
    where answers take some milliseconds. Schroeder, Wierman and Harchol-Balter, *Open Versus
    Closed: A Cautionary Tale*, 2006, say why that matters.

    Args:
        port: Of the server, on this machine.
        payload: What to send.
        seconds: For how long; whole seconds.
        rate: Requests a second, on average.
        scratch: A folder for the load generator's files, its own.
    """
    return _wrk(port, payload, _bodies(payload, scratch), seconds, PEOPLE, PEOPLE / rate * 1000)


def _wrk(
    port: int, payload: Payload, files: list[Path], seconds: float, connections: int, pause_ms: float = 0
) -> Load:
    options = ["-t1", f"-c{connections}", f"-d{seconds:.0f}s", f"--timeout={ANSWER_SECONDS}s", f"-s{SCRIPT}"]
    for name, value in payload.headers.items():
        options += ["-H", f"{name}: {value}"]
    url = f"http://{HOST}:{port}{payload.path}"
    pauses = [f"pause={pause_ms:.3f}"] if pause_ms else []
    return _read(_run([require("wrk"), *options, url, "--", *pauses, *map(str, files)], seconds))


def _bodies(payload: Payload, scratch: Path) -> list[Path]:
    scratch.mkdir(exist_ok=True)
    files = []
    for number, body in enumerate(payload.bodies):
        files.append(scratch / f"body-{number}")
        files[-1].write_bytes(body)
    return files


def _run(command: list[str], seconds: float) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=seconds + 60, check=False, start_new_session=True
    )
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def _program(module: str, options: list[str], seconds: float) -> Load:
    """One of our own load programs, which end as `post.lua` does."""
    return _read(_run([sys.executable, "-m", f"load_tests.{module}", *options], seconds))


def _read(output: str) -> Load:
    seen: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    problems = []
    if not_ok := seen.pop("not_ok"):
        problems.append(f"{not_ok} answers were not 2xx")
    if errors := seen.pop("socket_errors"):
        problems.append(f"{errors} socket errors")
    return Load(**seen, problems=tuple(problems))


def _h2load(running: Running, payload: Payload, body: Path, seconds: float, connections: int) -> Load:
    answer = ask(running, payload)
    if payload.inputs == 1:
        # Of gRPC's own errors HTTP/2 knows nothing: their status is 200, but they carry no message.
        due = len(answer) + FRAME
        return _h2load_once(running, payload, body, connections, [f"-D{seconds:.0f}"], due)
    # Streams are counted out: cut off when the time is over, they would leave half of their answers.
    probe = _h2load_once(running, payload, body, connections, [f"-n{2 * connections}"], len(answer))
    count = max(2 * connections, round(probe.requests_per_second * seconds))
    return _h2load_once(running, payload, body, connections, [f"-n{count}"], len(answer))


def _h2load_once(
    running: Running, payload: Payload, body: Path, connections: int, how_much: list[str], due: int
) -> Load:
    """One run, whose answers must have `due` bytes each."""
    log = body.with_name("h2load.log")
    log.unlink(missing_ok=True)
    options = ["-t1", f"-c{connections}", "-m1", *how_much, f"-d{body}", f"--log-file={log}"]
    for name, value in payload.headers.items():
        options += ["-H", f"{name}: {value}"]
    url = f"http://{HOST}:{running.grpc_port}{payload.path}"
    output = _run([require("h2load"), *options, url], ANSWER_SECONDS)
    rate = _number(r"finished in \S+, ([\d.]+) req/s", output)
    requests = int(_number(r"(\d+) done", output))
    bad = requests - int(_number(r"(\d+) 2xx", output))
    data = int(_number(r"\((\d+)\) data", output))
    problems = [f"{bad} answers were not 2xx"] if bad else []
    if abs(data - due * requests) > 0.01 * due * requests:
        problems.append(f"{data} bytes of messages where {due * requests} were due")
    durations = [int(line.split("\t")[2]) / 1000 for line in log.read_text().splitlines()]
    if len(durations) < 2 or not rate:
        # A server that ends its streams at once, say.
        return Load(0, 1.0, 0.0, 0.0, 0.0, (*problems, "no answers"))
    shares = quantiles(durations, n=100)
    return Load(requests, requests / rate, shares[49], shares[94], shares[98], tuple(problems))


def _number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"h2load's output is not as expected:\n{text}")
    return float(found[1])
