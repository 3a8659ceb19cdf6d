"""From start to ready, and each model's first request beside its hundredth: `python -m load_tests start`.

A server that says it is ready has run every network before, at the sizes that will come: nobody
pays for being first. One worker, one connection, one request after the other.
"""

import argparse
import http.client
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Final

import httpx
from rich.console import Console
from rich.table import Table

from load_tests import payloads, report
from load_tests.scenarios import HOST, quintet
from load_tests.servers import START_SECONDS, Running
from service.repository import Repository
from service.settings import Settings

REQUESTS: Final = 110
HUNDREDTH: Final = slice(90, 110)
"""The hundredth request and its neighbours: their median is steadier than any one of them."""

MOST_TIMES_SLOWER: Final = 2.0


def measure(models: Path, scratch: Path) -> tuple[float, dict[str, list[float]]]:
    """Start a server once.

    Returns:
        Seconds until `/readyz` said so, and each model's requests in milliseconds, in order.
    """
    server = quintet(1)
    started = time.perf_counter()
    with Running(server, models, scratch) as running:
        address = f"http://{HOST}:{running.port}"

        def is_ready() -> bool:
            try:
                return httpx.get(f"{address}/readyz").status_code == 200
            except httpx.HTTPError:
                return False

        give_up = time.monotonic() + START_SECONDS
        while not is_ready():
            running.check(give_up)
            time.sleep(0.02)
        seconds = time.perf_counter() - started
        taken = {}
        for model in Repository(models).models():
            payload = payloads.room_payload(model)
            # The same input each time, or a long text would be compared with a short one.
            body = payload.bodies[0]
            # The plainest client: what httpx does at its own first request takes longer than a digit.
            connection = http.client.HTTPConnection(HOST, running.port)
            # The connection is made before the clock starts.
            _milliseconds(connection, "/v2/repository/index", b"", {})
            taken[model] = [
                _milliseconds(connection, payload.path, body, payload.headers) for _ in range(REQUESTS)
            ]
            connection.close()
    return seconds, taken


def _milliseconds(
    connection: http.client.HTTPConnection, path: str, body: bytes, headers: Mapping[str, str]
) -> float:
    started = time.perf_counter()
    connection.request("POST", path, body, headers)
    response = connection.getresponse()
    answer = response.read()
    seconds = time.perf_counter() - started
    if response.status != 200:
        raise RuntimeError(f"POST {path}: {response.status} {answer.decode(errors='replace')}")
    return seconds * 1000


def main(arguments: list[str]) -> int:
    """Measure several starts and print the table; 1 if a first request is too slow."""
    settings = Settings()
    options = argparse.ArgumentParser(prog="python -m load_tests start", description=__doc__)
    options.add_argument("--starts", type=int, default=5, help="how often (default %(default)s)")
    options.add_argument("--models", type=Path, default=settings.models, help="model repository")
    options.add_argument("--to", type=Path, default=Path(__file__).with_name("results"))
    chosen = options.parse_args(arguments)
    console = Console(soft_wrap=True)
    starts = []
    with tempfile.TemporaryDirectory(prefix="quintet-load-") as scratch:
        for number in range(chosen.starts):
            starts.append(measure(chosen.models.resolve(), Path(scratch)))
            console.print(f"start {number + 1}: ready after {starts[-1][0]:.2f} s", style="dim")
    ready = median(seconds for seconds, _ in starts)
    table = Table("model", "first ms", "hundredth ms", "ratio", title=f"ready after {ready:.2f} s")
    found = {}
    for model in starts[0][1]:
        first = median(taken[model][0] for _, taken in starts)
        hundredth = median(median(taken[model][HUNDREDTH]) for _, taken in starts)
        ratio = median(taken[model][0] / median(taken[model][HUNDREDTH]) for _, taken in starts)
        found[model] = {"first_ms": first, "hundredth_ms": hundredth, "ratio": ratio}
        table.add_row(model, f"{first:.2f}", f"{hundredth:.2f}", f"{ratio:.2f}")
    console.print(table)
    chosen.to.mkdir(parents=True, exist_ok=True)
    path = chosen.to / "start.json"
    conditions = report.surroundings(chosen.models)
    figures = {"ready_seconds": ready, "starts": chosen.starts, "models": found, "conditions": conditions}
    path.write_text(json.dumps(figures, indent=2, default=str) + "\n")
    console.print(f"written: {path.parent.name}/{path.name}", style="dim")
    return int(any(one["ratio"] > MOST_TIMES_SLOWER for one in found.values()))
