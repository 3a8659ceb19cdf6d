"""Load from outside Python: `wrk` for HTTP/1.1, `h2load` for gRPC; and single requests, to check answers."""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Final

import grpc
import httpx

from load_tests.payloads import Payload
from load_tests.scenarios import HOST
from load_tests.servers import Running

PACKAGES: Final = {"wrk": "wrk", "h2load": "nghttp2-client"}
"""The Debian package of each program."""

SCRIPT: Final = Path(__file__).with_name("post.lua")

FRAME: Final = 5
"""Bytes that gRPC puts before a message."""

ANSWER_SECONDS: Final = 10
"""An answer that takes longer counts as an error."""


class ProgramMissing(Exception):
    """A load generator is not installed; the message names its package."""


@dataclass(frozen=True)
class Load:
    """What a load generator saw: how many answers, how fast, and what was wrong with them."""

    requests: int
    requests_per_second: float
    p50_ms: float
    p99_ms: float
    problems: tuple[str, ...] = ()


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


def ask(running: Running, payload: Payload) -> bytes:
    """Send one request; the body of its answer.

    Raises:
        httpx.HTTPError, grpc.RpcError: there is no good answer.
    """
    if payload.protocol == "http":
        answer = httpx.post(
            f"http://{HOST}:{running.port}{payload.path}",
            content=payload.body,
            headers=payload.headers,
            timeout=ANSWER_SECONDS,
            trust_env=False,
        )
        return answer.raise_for_status().content
    with grpc.insecure_channel(f"{HOST}:{running.grpc_port}", [("grpc.enable_http_proxy", 0)]) as channel:
        # The frame is for h2load to send; gRPC's own client puts one around the message.
        message: bytes = channel.unary_unary(payload.path)(payload.body[FRAME:], timeout=ANSWER_SECONDS)
        return message


def replay(running: Running, payload: Payload, seconds: float, connections: int, scratch: Path) -> Load:
    """Send `payload` over and over, on as many connections, each waiting for its answer before the next.

    Args:
        running: The server.
        payload: What to send.
        seconds: For how long; whole seconds.
        connections: How many at a time.
        scratch: A folder for the load generator's files.
    """
    body = scratch / "body"
    body.write_bytes(payload.body)
    if payload.protocol == "http":
        return _wrk(running, payload, body, seconds, connections)
    return _h2load(running, payload, body, seconds, connections)


def _run(command: list[str], seconds: float) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=seconds + 60, check=False, start_new_session=True
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def _wrk(running: Running, payload: Payload, body: Path, seconds: float, connections: int) -> Load:
    options = ["-t1", f"-c{connections}", f"-d{seconds:.0f}s", f"--timeout={ANSWER_SECONDS}s", f"-s{SCRIPT}"]
    for name, value in payload.headers.items():
        options += ["-H", f"{name}: {value}"]
    url = f"http://{HOST}:{running.port}{payload.path}"
    output = _run([require("wrk"), *options, url, "--", str(body)], seconds)
    seen = json.loads(output.splitlines()[-1])
    problems = []
    if seen["not_ok"]:
        problems.append(f"{seen['not_ok']} answers were not 2xx")
    if seen["socket_errors"]:
        problems.append(f"{seen['socket_errors']} socket errors")
    rate = seen["requests"] / seen["microseconds"] * 1e6
    return Load(seen["requests"], rate, seen["p50"] / 1000, seen["p99"] / 1000, tuple(problems))


def _h2load(running: Running, payload: Payload, body: Path, seconds: float, connections: int) -> Load:
    log = body.with_name("h2load.log")
    log.unlink(missing_ok=True)
    options = ["-t1", f"-c{connections}", "-m1", f"-D{seconds:.0f}", f"-d{body}", f"--log-file={log}"]
    for name, value in payload.headers.items():
        options += ["-H", f"{name}: {value}"]
    url = f"http://{HOST}:{running.grpc_port}{payload.path}"
    output = _run([require("h2load"), *options, url], seconds)
    rate = _number(r"finished in \S+, ([\d.]+) req/s", output)
    requests = int(_number(r"(\d+) done", output))
    bad = requests - int(_number(r"(\d+) 2xx", output))
    # Of gRPC's own errors HTTP/2 knows nothing: their status is 200, but they carry no message.
    expected = (FRAME + len(ask(running, payload))) * requests
    data = int(_number(r"\((\d+)\) data", output))
    problems = [f"{bad} answers were not 2xx"] if bad else []
    if abs(data - expected) > 0.01 * expected:
        problems.append(f"{data} bytes of messages where {expected} were due")
    durations = [int(line.split("\t")[2]) / 1000 for line in log.read_text().splitlines()]
    shares = quantiles(durations, n=100)
    return Load(requests, rate, shares[49], shares[98], tuple(problems))


def _number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"h2load's output is not as expected:\n{text}")
    return float(found[1])
