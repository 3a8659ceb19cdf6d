"""Measure the service beside its peers: `python -m load_tests`, or `make bench`.

Every round starts each server once, one at a time, and odd rounds go the other way
round, so that a machine that drifts favours nobody. Ends with 1 if a target is missed.
"""

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Final

import grpc
import httpx
import numpy as np
import psutil
from rich.console import Console

from load_tests import report
from load_tests.generators import ProgramMissing, ask, replay, require
from load_tests.report import Measurement, Results
from load_tests.scenarios import Scenario, scenarios, targets
from load_tests.servers import Running, ServerFailed
from service.repository import RepositoryError
from service.settings import Settings

SAME: Final = 1e-4
"""Two servers of one network may differ by this much in a probability."""


def arguments() -> argparse.Namespace:
    """The command line."""
    settings = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m load_tests", description="Measure the service beside its peers."
    )
    parser.add_argument("--seconds", type=int, default=6, help="one measurement (default %(default)s)")
    parser.add_argument("--warm-up", type=int, default=2, help="seconds before it (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements per row (default %(default)s)")
    parser.add_argument("--connections", type=int, default=32, help="callers at a time (default %(default)s)")
    parser.add_argument(
        "--workers", type=int, default=settings.workers, help="beside 1 (default: one per core)"
    )
    parser.add_argument(
        "--models", type=Path, default=settings.models, help="model repository (default: the shipped one)"
    )
    parser.add_argument(
        "--only", default="quintet,bare,bentoml-batchable", help="servers (default %(default)s)"
    )
    parser.add_argument("--name", default="digit", help="of the results' files (default %(default)s)")
    parser.add_argument(
        "--to", type=Path, default=Path(__file__).with_name("results"), help="folder of the results"
    )
    chosen = parser.parse_args()
    if min(chosen.seconds, chosen.warm_up, chosen.rounds, chosen.connections, chosen.workers) < 1:
        parser.error("seconds, warm-up, rounds, connections and workers must be 1 or more.")
    return chosen


class Bench:
    """One run of the load tests."""

    def __init__(self, options: argparse.Namespace, rows: Sequence[Scenario], console: Console) -> None:
        self._options = options
        self._rows = rows
        self._console = console
        self._expected: np.ndarray | None = None
        self.results: Results = {row.name: [] for row in rows}

    def run(self, scratch: Path) -> None:
        """Measure all rows in all rounds; `results` fills up.

        Raises:
            ServerFailed: a server does not start.
        """
        crews = [list(rows) for _, rows in groupby(self._rows, key=lambda row: row.server)]
        for turn in range(self._options.rounds):
            for rows in crews[::-1] if turn % 2 else crews:
                server = rows[0].server
                heading = (
                    f"round {turn + 1} of {self._options.rounds}: {server.name}, workers: {server.workers}"
                )
                self._console.print(heading, style="dim")
                with Running(server, self._options.models.resolve(), scratch) as running:
                    running.wait_until(partial(_all_answer, running, rows))
                    for row in rows:
                        self.results[row.name].append(self._measure(running, row, scratch))

    def _measure(self, running: Running, row: Scenario, scratch: Path) -> Measurement:
        options = self._options
        problems = self._check(running, row)
        replay(running, row.payload, options.warm_up, options.connections, scratch)
        machine_before, ours_before = _busy_seconds(), os.times()
        before = running.cpu_seconds()
        load = replay(running, row.payload, options.seconds, options.connections, scratch)
        after = running.cpu_seconds()
        machine, ours = _busy_seconds() - machine_before, os.times()
        elapsed = ours.elapsed - ours_before.elapsed
        problems += load.problems + self._check(running, row)
        used = [seconds - before.get(pid, 0.0) for pid, seconds in after.items()]
        # The load generator is a child that has ended; its time is ours.
        generator = sum(ours[:4]) - sum(ours_before[:4])
        measured = Measurement(
            requests_per_second=round(load.requests_per_second, 1),
            p50_ms=load.p50_ms,
            p99_ms=load.p99_ms,
            cpu_us=round(sum(used) / max(1, load.requests) * 1e6, 1),
            busiest_share=round(max(used) / max(sum(used), 1e-9), 3),
            other_cores=round(max(0.0, machine - sum(used) - generator) / elapsed, 2),
            problems=tuple(dict.fromkeys(problems)),
        )
        note = f"  {'; '.join(measured.problems)}" if problems else ""
        self._console.print(f"  {row.name}: {measured.requests_per_second:,.0f} requests/s{note}")
        return measured

    def _check(self, running: Running, row: Scenario) -> tuple[str, ...]:
        """What is wrong with the answer to one request; the first answer of a run says what is right."""
        try:
            probabilities = np.array(row.payload.read(ask(running, row.payload)))
        except (httpx.HTTPError, grpc.RpcError, ValueError, KeyError) as error:
            return (f"no good answer ({type(error).__name__})",)
        if self._expected is None:
            self._expected = probabilities
        if not np.allclose(probabilities, self._expected, rtol=0, atol=SAME):
            return ("the answer is not that of the other servers",)
        return ()


def _all_answer(running: Running, rows: Sequence[Scenario]) -> bool:
    try:
        return all(ask(running, row.payload) for row in rows)
    except (httpx.HTTPError, grpc.RpcError):
        return False


def _busy_seconds() -> float:
    """Processor time that the cores we may use have spent on anything, in seconds."""
    allowed = psutil.Process().cpu_affinity() if hasattr(psutil.Process, "cpu_affinity") else None
    busy = 0.0
    for core, times in enumerate(psutil.cpu_times(percpu=True)):
        if allowed is None or core in allowed:
            busy += sum(times) - times.idle - getattr(times, "iowait", 0.0)
            # Linux counts guests twice: in `guest` and in `user`.
            busy -= getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
    return busy


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Run the load tests; 0 if every target that was measured is met."""
    options = arguments()
    console = Console() if sys.stdout.isatty() else Console(width=160)
    # However we are told to end, the servers end first.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    rows = [row for row in scenarios(options.workers) if row.server.name in options.only.split(",")]
    try:
        require("wrk")
        conditions = report.surroundings(options.models)
        try:
            require("h2load")
        except ProgramMissing as error:
            console.print(f"{error}. The rows that need it are left out.", style="yellow")
            rows = [row for row in rows if row.payload.protocol != "grpc"]
        if not rows:
            raise SystemExit(
                f"There is no server {options.only!r}; there are quintet, bare and bentoml-batchable."
            )
        bench = Bench(options, rows, console)
        with tempfile.TemporaryDirectory(prefix="quintet-load-", ignore_cleanup_errors=True) as scratch:
            bench.run(Path(scratch))
    except (ProgramMissing, RepositoryError, ServerFailed) as error:
        console.print(str(error), style="red", highlight=False, markup=False)
        return 2
    except KeyboardInterrupt:
        console.print("Stopped; nothing was written.")
        return 130
    conditions |= {
        "connections": options.connections,
        "round_count": options.rounds,
        "seconds": options.seconds,
    }
    verdicts = report.judge(bench.results, targets(rows, options.workers))
    report.show(console, bench.results, rows, verdicts)
    for path in report.write(options.to, options.name, bench.results, rows, verdicts, conditions):
        console.print(f"written: {path.parent.name}/{path.name}", style="dim")
    has_miss = any(verdict.ratio is not None and not verdict.is_met for verdict in verdicts)
    has_invalid = any(not report.is_valid(rounds) for rounds in bench.results.values())
    return 1 if has_miss or has_invalid else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
