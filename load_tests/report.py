"""What a run found: medians with their ranges, ratios within rounds, targets met or missed."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from load_tests import generators
from load_tests.scenarios import Scenario, Target, beside
from load_tests.servers import ROOT
from service.models.digit import DIGIT
from service.providers import profile_of
from service.repository import Repository
from service.settings import Settings

LIBRARIES: Final = ("bentoml", "uvicorn", "uvloop", "httptools", "onnxruntime", "numpy", "grpcio")

BUSY_CORES: Final = 0.1
"""Above this, something else than the test kept the machine busy, and the figures are noisy."""


@dataclass(frozen=True)
class Measurement:
    """One scenario in one round.

    Attributes:
        requests_per_second: Answers that came back.
        p50_ms, p99_ms: How long half, and 99 of 100 of them, took at the most.
        cpu_us: Processor time of all the server's processes for one answer, in microseconds.
        busiest_share: The part of that time that the busiest process used.
        other_cores: Cores kept busy by neither server nor load generator.
        problems: Why this does not count; empty if it does.
    """

    requests_per_second: float
    p50_ms: float
    p99_ms: float
    cpu_us: float
    busiest_share: float
    other_cores: float
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Spread:
    """The median of several rounds, with the least and the most."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of at least one value."""
        return cls(median(values), min(values), max(values))

    def text(self, form: str) -> str:
        """`median (least-most)`, each in the format `form`."""
        if self.least == self.most:
            return format(self.median, form)
        return f"{self.median:{form}} ({self.least:{form}}-{self.most:{form}})"


@dataclass(frozen=True)
class Verdict:
    """One target, and what became of it; `ratio` is None where it was not measured."""

    target: Target
    peer: str
    ratio: Spread | None

    @property
    def is_met(self) -> bool:
        """Whether the median of the rounds reaches the target."""
        return self.ratio is not None and self.ratio.median >= self.target.at_least

    def __str__(self) -> str:
        """The target in a line."""
        claim = f"{self.target.ours} at least {self.target.at_least:g} times {self.peer}"
        if self.ratio is None:
            return f"NOT MEASURED: {claim}"
        return f"{'PASS' if self.is_met else 'FAIL'}: {claim}: {self.ratio.text('.2f')}"


Results = dict[str, list[Measurement]]


def is_valid(rounds: Sequence[Measurement]) -> bool:
    """Whether a row was measured, without problems."""
    return bool(rounds) and not any(one.problems for one in rounds)


def _rate(one: Measurement) -> float:
    return one.requests_per_second


def ratio(
    results: Results, ours: str, peer: str, of: Callable[[Measurement], float] = _rate
) -> Spread | None:
    """How many times `peer`'s figure ours is, round by round: a round's two figures saw the same machine."""
    mine, theirs = results.get(ours, []), results.get(peer, [])
    if not is_valid(mine) or not is_valid(theirs):
        return None
    return Spread.of([of(one) / of(other) for one, other in zip(mine, theirs, strict=True)])


def judge(results: Results, targets: Sequence[Target]) -> list[Verdict]:
    """Hold the results against the targets, each against the best of its peers."""
    verdicts = []
    for target in targets:
        valid = [peer for peer in target.peers if is_valid(results.get(peer, []))]
        if not valid:
            verdicts.append(Verdict(target, target.peers[0] if target.peers else "its peer", None))
            continue
        best = max(valid, key=lambda peer: median(map(_rate, results[peer])))
        verdicts.append(Verdict(target, best, ratio(results, target.ours, best)))
    return verdicts


def surroundings(models: Path) -> dict[str, Any]:
    """What the figures depend on: machine, versions, network, commit; no names of hosts or folders."""
    files = Repository(models).open(DIGIT.name, None, profile_of(Settings()).variants)
    return {
        "cores": os.cpu_count(),
        "processor": _processor(),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
        "versions": {library: version(library) for library in LIBRARIES},
        "wrk": generators.version("wrk"),
        "network": f"digit {files.version} {files.variant}, {len(files.network):,} bytes, "
        f"sha256 {files.card['files'][files.variant]['sha256'][:12]}",
        "commit": _commit(),
        "settings": {name: value for name, value in sorted(os.environ.items()) if _is_told(name)},
    }


def _is_told(name: str) -> bool:
    return name.startswith("QUINTET_") and "KEY" not in name and "DATA" not in name and "MODELS" not in name


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "--short", "HEAD")
    if not commit:
        return "none"
    changed = git("status", "--porcelain", "--", "service", "load_tests", ":!load_tests/results")
    return f"{commit} with changes" if changed else commit


HEADINGS: Final = (
    "server",
    "payload",
    "workers",
    "requests/s",
    "of bare",
    "p50 ms",
    "p99 ms",
    "CPU µs each",
    "busiest worker",
)


def rows(results: Results, scenarios: Sequence[Scenario]) -> list[tuple[str, ...]]:
    """The table, a line per scenario that was run."""
    table = []
    for scenario in scenarios:
        rounds = results.get(scenario.name, [])
        head = (scenario.server.name, scenario.payload.name, str(scenario.server.workers))
        problems = dict.fromkeys(problem for one in rounds for problem in one.problems)
        if problems:
            table.append((*head, f"INVALID: {'; '.join(problems)}", *[""] * 5))
            continue
        share = ratio(results, scenario.name, beside(scenario))
        figures = (
            Spread.of([one.requests_per_second for one in rounds]).text(",.0f"),
            share.text(".2f") if share else "",
            f"{median(one.p50_ms for one in rounds):.1f}",
            f"{median(one.p99_ms for one in rounds):.1f}",
            f"{median(one.cpu_us for one in rounds):,.0f}",
            f"{max(one.busiest_share for one in rounds):.0%}",
        )
        table.append((*head, *figures))
    return table


def noise(results: Results) -> str:
    """A warning where the machine had other work; else nothing."""
    other = [one.other_cores for rounds in results.values() for one in rounds]
    if not other or max(other) <= BUSY_CORES:
        return ""
    return (
        f"NOISY: other programs kept {Spread.of(other).text('.1f')} cores busy meanwhile; "
        "measure again on an idle machine."
    )


def show(
    console: Console, results: Results, scenarios: Sequence[Scenario], verdicts: Sequence[Verdict]
) -> None:
    """Print the table and the verdicts."""
    table = Table(*HEADINGS)
    for column in table.columns[:5]:
        column.no_wrap = True
    for column in table.columns[2:]:
        column.justify = "right"
    for row in rows(results, scenarios):
        table.add_row(*row)
    console.print(table)
    if warning := noise(results):
        console.print(warning, style="yellow")
    for verdict in verdicts:
        console.print(str(verdict), style="green" if verdict.is_met else "red", highlight=False)


def write(
    folder: Path,
    name: str,
    results: Results,
    scenarios: Sequence[Scenario],
    verdicts: Sequence[Verdict],
    conditions: dict[str, Any],
) -> list[Path]:
    """Write `<date>-<name>.md` and `.json`; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC)
    stem = f"{now:%Y-%m-%d}-{name}"
    record = {
        "date": f"{now:%Y-%m-%d %H:%M} UTC",
        **conditions,
        "targets": [
            {"claim": str(verdict), "met": verdict.is_met if verdict.ratio else None} for verdict in verdicts
        ],
        "rows": {row: [asdict(one) for one in rounds] for row, rounds in results.items()},
    }
    texts = {
        f"{stem}.md": _markdown(record, results, scenarios, verdicts),
        f"{stem}.json": json.dumps(record, indent=1, ensure_ascii=False) + "\n",
    }
    for file, text in texts.items():
        draft = folder / f"{file}.tmp"
        draft.write_text(text, encoding="utf-8")
        draft.replace(folder / file)
    return [folder / file for file in texts]


def _markdown(
    record: dict[str, Any],
    results: Results,
    scenarios: Sequence[Scenario],
    verdicts: Sequence[Verdict],
) -> str:
    versions = ", ".join(f"{library} {number}" for library, number in record["versions"].items())
    settings = ", ".join(f"{name}={value}" for name, value in record["settings"].items()) or "defaults"
    lines = [
        f"# Load test, {record['date']}",
        "",
        f"{record['cores']} cores of {record['processor']}; {record['system']}; commit {record['commit']}.",
        f"Python {record['python']}, {versions}; wrk {record['wrk']}. Settings: {settings}.",
        f"Network: {record['network']}. {record['connections']} connections; {record['round_count']} "
        f"interleaved rounds of {record['seconds']:g} s each: medians, some with (least-most), and the most "
        "uneven round's busiest worker; ratios are taken within rounds.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "| --- | --- |" + " ---: |" * (len(HEADINGS) - 2),
        *("| " + " | ".join(row) + " |" for row in rows(results, scenarios)),
        "",
        *(f"- {verdict}" for verdict in verdicts),
    ]
    if warning := noise(results):
        lines += [f"- {warning}"]
    return "\n".join(lines) + "\n"
