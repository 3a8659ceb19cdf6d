"""A run of the load tests: sections, each in rounds, until they agree."""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any, Final

import httpx
import numpy as np
import psutil
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from load_tests import report
from load_tests.generators import NO_ANSWER, Load, ProgramMissing, arrive, ask, replay, require
from load_tests.limit import BareNetwork, Way, open_network
from load_tests.measurement import Measurement, best
from load_tests.report import Outcome
from load_tests.scenarios import HOST, OPEN_SHARE, Scenario, Section, Server, sections
from load_tests.servers import NotInstalled, Running, ServerFailed
from service.models import MODELS
from service.providers import ProviderRefused, profile_of, refuse_without_gpu
from service.repository import Repository, RepositoryError
from service.settings import Settings, read_settings

SAME: Final = 1e-3
"""Two servers of one network may differ by this much in a probability."""

MORE_ROUNDS: Final = 3
"""So many more, where the last ones do not agree."""

Expected = dict[tuple[str, str, int], np.ndarray]
"""The right answers, by model, precision and number of the request."""


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    settings = read_settings()
    parser = argparse.ArgumentParser(
        prog="python -m load_tests", description="Measure the service beside its peers and its limit."
    )
    parser.add_argument("--seconds", type=int, default=3, help="one measurement (default %(default)s)")
    parser.add_argument("--warm-up", type=int, default=1, help="seconds before it (default %(default)s)")
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        help=f"measurements per row (default %(default)s), and up to {MORE_ROUNDS} more until they agree",
    )
    parser.add_argument("--connections", type=int, default=32, help="callers at a time (default %(default)s)")
    parser.add_argument("--workers", type=int, default=settings.workers, help="default: one per core")
    parser.add_argument(
        "--models", type=Path, default=settings.models, help="model repository (default: the shipped one)"
    )
    names = ", ".join(sections(1, MODELS))
    parser.add_argument("--only", default="", help=f"sections: {names} (default: all)")
    parser.add_argument("--servers", default="", help="only rows of these servers, by name (default: all)")
    parser.add_argument(
        "--name",
        default="",
        help="before the section in the results' names, for trials that are not to take the place of whole "
        "sections in the summary (default: trial with --servers, else none)",
    )
    parser.add_argument(
        "--to", type=Path, default=Path(__file__).with_name("results"), help="folder of the results"
    )
    chosen = parser.parse_args(given)
    if min(chosen.seconds, chosen.warm_up, chosen.rounds, chosen.connections, chosen.workers) < 1:
        parser.error("seconds, warm-up, rounds, connections and workers must be 1 or more.")
    if chosen.servers and not chosen.name:
        chosen.name = "trial"
    return chosen


class Bench:
    """One section of a run."""

    def __init__(
        self, section: Section, options: argparse.Namespace, expected: Expected, console: Console
    ) -> None:
        self._options = options
        self._console = console
        self._expected = expected
        self._rows = [
            row
            for row in section.rows
            if not options.servers or row.server.name in options.servers.split(",")
        ]
        self._networks: dict[tuple[str, str], BareNetwork] = {}
        self._ways: dict[str, Way] = {}
        self.outcome = Outcome(section, {row.name: [] for row in self._rows})
        asked = {row.name for row in self._rows}
        left_out = [row.name for row in section.rows if row.name not in asked]
        self.outcome.absent |= dict.fromkeys(left_out, "left out with --servers")

    def run(self, scratch: Path) -> None:
        """Measure all rows in all rounds; `outcome` fills up.

        Raises:
            ServerFailed: our own server does not start.
        """
        rounds = min(self._options.rounds, self.outcome.section.most_rounds)
        turn = 0
        while turn < rounds or (
            turn < rounds + MORE_ROUNDS and rounds == self._options.rounds > 2 and self.outcome.unsteady()
        ):
            crews = [list(rows) for _, rows in groupby(self._still_wanted(), key=lambda row: row.server)]
            for rows in crews[::-1] if turn % 2 else crews:
                server = rows[0].server
                heading = f"{self.outcome.section.name}, round {turn + 1} of {rounds}: {server.name}"
                self._console.print(f"{heading}, workers: {server.workers}", style="dim", highlight=False)
                if rows[0].is_bare:
                    for row in rows:
                        self._keep(row, self._measure_bare(row))
                else:
                    self._visit(server, rows, scratch)
            turn += 1

    def _still_wanted(self) -> list[Scenario]:
        """The rows without those that are absent, or that another of their choice has beaten."""
        wanted = [row for row in self._rows if row.name not in self.outcome.absent]
        winners = {}
        for choice in {row.choice for row in wanted if row.choice}:
            alternatives = [row.name for row in wanted if row.choice == choice]
            winners[choice] = best(self.outcome.results, alternatives)
        return [row for row in wanted if not row.choice or winners[row.choice] in (None, row.name)]

    def _visit(self, server: Server, rows: Sequence[Scenario], scratch: Path) -> None:
        """Start a server, measure its rows, stop it."""
        models = self._options.models.resolve()
        network = _network_path(models, server) if server.model and server.peer else None
        home = scratch / f"server-{time.monotonic_ns()}"
        home.mkdir()
        try:
            with Running(server, models, home, network) as running:
                running.wait_until(partial(_all_answer, running, rows))
                for crowd, members in groupby(rows, key=lambda row: row.crowd):
                    together = list(members)
                    if crowd:
                        self._measure_together(running, together, home)
                    else:
                        for row in together:
                            self._keep(row, self._measure(running, row, home))
        except ServerFailed as error:
            if not server.peer:
                raise
            self._console.print(f"  {error}", style="yellow", highlight=False, markup=False)
            # Where it is not installed the message is a command; where it failed, lines with folders in them.
            reason = str(error) if isinstance(error, NotInstalled) else str(error).partition(":\n")[0]
            self.outcome.absent |= {row.name: reason for row in rows}

    def _keep(self, row: Scenario, measured: Measurement) -> None:
        self.outcome.results[row.name].append(measured)
        note = f"  {'; '.join(measured.problems)}"
        figures = f"{measured.inputs_per_second:,.0f} inputs/s, p50 {measured.p50_ms:.2f} ms"
        self._console.print(f"  {row.name}: {figures}{note}", highlight=False, markup=False)

    def _measure_bare(self, row: Scenario) -> Measurement:
        key = (row.server.model, row.server.precision)
        network = self._networks.get(key)
        if network is None:
            network = self._networks[key] = open_network(key[0], self._options.models, key[1])
        way = self._ways.get(row.name)
        if way is None:
            way = (
                Way(row.server.workers, 1, row.batch) if row.batch else network.find_best(row.server.workers)
            )
            self._ways[row.name] = way
            self.outcome.notes[row.name] = f"{way.lanes} of {way.threads} threads, batches of {way.batch}"
        machine_before, ours_before = _busy_seconds(), os.times()
        runs = network.measure(way, self._options.seconds, decodes=row.counts_decoding)
        machine, ours = _busy_seconds() - machine_before, os.times()
        used = sum(ours[:2]) - sum(ours_before[:2])
        return Measurement(
            requests_per_second=round(runs.inputs_per_second, 1),
            p50_ms=round(runs.p50_ms, 4),
            cpu_us=round(used / max(1, runs.inputs) * 1e6, 1),
            other_cores=round(max(0.0, machine - used) / (ours.elapsed - ours_before.elapsed), 2),
        )

    def _send(self, running: Running, row: Scenario, seconds: float, scratch: Path) -> Load:
        folder = scratch / f"bodies-{self._rows.index(row)}"
        if row.open_after:
            capacity = self.outcome.results[row.open_after][-1].requests_per_second
            return arrive(running.port, row.payload, seconds, OPEN_SHARE * capacity, folder)
        return replay(running, row.payload, seconds, row.connections or self._options.connections, folder)

    def _measure(self, running: Running, row: Scenario, scratch: Path) -> Measurement:
        try:
            return self._measure_soundly(running, row, scratch)
        except (*NO_ANSWER, RuntimeError, subprocess.SubprocessError) as error:
            # A server that breaks under the load is a row that says so; the others are measured all the same.
            trouble = str(error).splitlines()[0] if isinstance(error, RuntimeError) else type(error).__name__
            ended = "" if running.is_alive() else "the server ended; "
            return Measurement(0.0, inputs=row.payload.inputs, problems=(f"{ended}{trouble}",))

    def _measure_soundly(self, running: Running, row: Scenario, scratch: Path) -> Measurement:
        options = self._options
        problems = self._check(running, row)
        self._send(running, row, options.warm_up, scratch)
        batches_before = _batches(running, row)
        machine_before, ours_before = _busy_seconds(), os.times()
        before = running.cpu_seconds()
        load = self._send(running, row, options.seconds, scratch)
        after = running.cpu_seconds()
        machine, ours = _busy_seconds() - machine_before, os.times()
        elapsed = ours.elapsed - ours_before.elapsed
        batches = {
            size: count - batches_before.get(size, 0) for size, count in _batches(running, row).items()
        }
        problems += load.problems + self._check(running, row)
        used = [seconds - before.get(pid, 0.0) for pid, seconds in after.items()]
        # The load generator is a child that has ended; its time is ours.
        generator = sum(ours[:4]) - sum(ours_before[:4])
        return Measurement(
            requests_per_second=round(load.requests_per_second, 1),
            p50_ms=round(load.p50_ms, 3),
            p95_ms=round(load.p95_ms, 3),
            p99_ms=round(load.p99_ms, 3),
            cpu_us=round(sum(used) / max(1, load.requests * row.payload.inputs) * 1e6, 1),
            busiest_share=round(max(used) / max(sum(used), 1e-9), 3),
            other_cores=round(max(0.0, machine - sum(used) - generator) / elapsed, 2),
            memory_mib=round(running.memory_mib(), 1),
            batches={size: count for size, count in batches.items() if count},
            inputs=row.payload.inputs,
            problems=tuple(dict.fromkeys(problems)),
        )

    def _measure_together(self, running: Running, rows: Sequence[Scenario], scratch: Path) -> None:
        """Measure rows that load the server at the same time, each by itself for all that is its own."""
        problems = {row.name: self._check(running, row) for row in rows}
        with ThreadPoolExecutor(len(rows)) as crowd:
            loads: list[Load] = []
            # So long that each gets about as many answers as alone. What is under way at the end is lost.
            for seconds in (self._options.warm_up, self._options.seconds * len(rows)):
                sending = [crowd.submit(self._send, running, row, seconds, scratch) for row in rows]
                loads = [one.result() for one in sending]
        memory = round(running.memory_mib(), 1)
        for row, load in zip(rows, loads, strict=True):
            wrong = (*problems[row.name], *load.problems, *self._check(running, row))
            measured = Measurement(
                requests_per_second=round(load.requests_per_second, 1),
                p50_ms=round(load.p50_ms, 3),
                p95_ms=round(load.p95_ms, 3),
                p99_ms=round(load.p99_ms, 3),
                memory_mib=memory,
                inputs=row.payload.inputs,
                problems=tuple(dict.fromkeys(wrong)),
            )
            self._keep(row, measured)

    def _check(self, running: Running, row: Scenario) -> tuple[str, ...]:
        """What is wrong with the answers to some requests; the first of a run say what is right."""
        for number in range(min(2, len(row.payload.bodies))):
            try:
                found = row.payload.read(ask(running, row.payload, number))
            except (*NO_ANSWER, ValueError, KeyError) as error:
                return (f"no good answer ({type(error).__name__})",)
            if not row.server.answers_truly:
                continue
            key = (row.payload.model, row.server.precision, number)
            right = self._expected.setdefault(key, found)
            if found.shape != right.shape or not np.allclose(found, right, rtol=0, atol=SAME):
                return ("the answer is not that of the other servers",)
        return ()


def _network_path(models: Path, server: Server) -> Path:
    """The file that a peer is given: what the service takes, or that of the precision asked for.

    Raises:
        RepositoryError: there is none.
    """
    repository = Repository(models)
    profile = profile_of(Settings(models=models, precision=server.precision or "auto"))
    files = repository.open(server.model, None, profile.variants)
    folder = models / server.model / str(files.version)
    return folder / str(files.card["files"][files.variant]["path"])


def _all_answer(running: Running, rows: Sequence[Scenario]) -> bool:
    try:
        return all(ask(running, row.payload) for row in rows)
    except NO_ANSWER:
        return False


def _batches(running: Running, row: Scenario) -> dict[str, int]:
    """How many batches of the row's model had at most so many inputs so far; nothing of who does not tell."""
    if not row.server.name.startswith("quintet"):
        return {}
    told = httpx.get(f"http://{HOST}:{running.port}/metrics", trust_env=False).text
    counts: dict[str, int] = {}
    below = 0
    for family in text_string_to_metric_families(told):
        for sample in family.samples:
            if sample.name == "quintet_batch_size_bucket" and sample.labels["model"] == row.payload.model:
                counts[sample.labels["le"]] = int(sample.value) - below
                below = int(sample.value)
    return counts


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


def interrupt_on_signals() -> None:
    """However we are told to end, the servers end first."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)


def _wanted(options: argparse.Namespace, models: Iterable[str]) -> tuple[list[Section], list[str]]:
    """The sections that are asked for, and the names of those that cannot be."""
    there = sections(options.workers, models)
    known = sections(options.workers, MODELS)
    asked = options.only.split(",") if options.only else list(known)
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise SystemExit(f"There is no section {unknown[0]!r}; there are {', '.join(known)}.")
    return [there[name] for name in asked if name in there], [name for name in asked if name not in there]


def main(given: Sequence[str]) -> int:
    """Run the load tests; 0 if every target that was measured is met."""
    options = arguments(given)
    console = Console() if sys.stdout.isatty() else Console(width=180)
    interrupt_on_signals()
    outcomes: list[Outcome] = []
    expected: Expected = {}
    try:
        require("wrk")
        # On a GPU (QUINTET_RUNTIME) without one, every server of ours would fail, one after the other.
        refuse_without_gpu(profile_of(read_settings()))
        conditions: dict[str, Any] = report.surroundings(options.models)
        conditions |= {"connections": options.connections, "seconds": options.seconds}
        wanted, impossible = _wanted(options, Repository(options.models).models())
        for name in impossible:
            console.print(f"NOT MEASURED: {name}, whose model is not in the repository", style="yellow")
        for section in wanted:
            bench = Bench(section, options, expected, console)
            _leave_out_grpc(bench, console)
            began = time.monotonic()
            with tempfile.TemporaryDirectory(prefix="quintet-load-", ignore_cleanup_errors=True) as scratch:
                bench.run(Path(scratch))
            outcomes.append(bench.outcome)
            report.show(console, bench.outcome)
            took = {"took_seconds": round(time.monotonic() - began)}
            for path in report.write(
                options.to, options.name and f"{options.name}-", bench.outcome, conditions | took
            ):
                console.print(f"written: {path.parent.name}/{path.name}", style="dim")
            console.print(f"{section.name}: {took['took_seconds']} s", style="dim", highlight=False)
        if not options.name:
            report.summarise(options.to)
    except (ProgramMissing, ProviderRefused, RepositoryError, ServerFailed) as error:
        console.print(str(error), style="red", highlight=False, markup=False)
        return 2
    except KeyboardInterrupt:
        console.print("Stopped; nothing more was written.")
        return 130
    if any(verdict.is_missed for one in outcomes for verdict in one.verdicts()) or any(
        one.invalid() for one in outcomes
    ):
        return 1
    return 3 if any(one.unsteady() for one in outcomes) else 0


def _leave_out_grpc(bench: Bench, console: Console) -> None:
    """Say of rows that h2load would measure that it is not installed, where it is not."""
    try:
        require("h2load")
    except ProgramMissing as error:
        absent = {
            row.name: str(error) for row in bench.outcome.section.rows if row.payload.protocol == "grpc"
        }
        bench.outcome.absent |= absent
        if absent:
            console.print(f"{error}. The rows that need it are left out.", style="yellow")
