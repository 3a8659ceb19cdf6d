"""What a section of a run found: a table, verdicts, a plot, and every single measurement as JSON."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Final

from dotenv import dotenv_values
from rich.console import Console
from rich.table import Table

from load_tests import generators
from load_tests.claims import Verdict
from load_tests.measurement import (
    RIVALS_SPREAD,
    WIDEST_SPREAD,
    Measurement,
    Results,
    Spread,
    by_round,
    is_valid,
    rate,
    sound,
    spread_of_last,
)
from load_tests.scenarios import Scenario, Section
from load_tests.servers import ROOT
from service.models import MODELS
from service.providers import gpu_name, profile_of
from service.repository import Repository
from service.settings import Settings, cores, settings_file

LIBRARIES: Final = ("bentoml", "uvicorn", "uvloop", "httptools", "onnxruntime", "numpy", "grpcio")

BUSY_CORES: Final = 0.1
"""Above this, something else than the test kept the machine busy, and the figures are noisy."""


@dataclass
class Outcome:
    """A section after its rounds.

    Attributes:
        section: What was to be measured.
        results: What was, by row.
        absent: Why a row was not measured at all, by row.
        notes: More about single rows, for the table.
    """

    section: Section
    results: Results
    absent: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def verdicts(self) -> list[Verdict]:
        """What became of the section's claims."""
        return [claim.judge(self.results) for claim in self.section.claims]

    def unsteady(self) -> dict[str, float]:
        """The rows whose last rounds lie too far apart, and how far; those that were given up count not."""
        most = max((len(rounds) for rounds in self.results.values()), default=0)
        spreads = {
            name: spread_of_last(rounds)
            for name, rounds in self.results.items()
            if is_valid(rounds) and len(rounds) == most and most > 1
        }
        rivals = {row.name for row in self.section.rows if row.choice}
        widest = {name: RIVALS_SPREAD if name in rivals else WIDEST_SPREAD for name in spreads}
        return {name: spread for name, spread in spreads.items() if spread > widest[name]}

    def invalid(self) -> list[str]:
        """The rows with wrong answers or errors: of ours in any round, of peers' in too many."""
        peers = {row.name for row in self.section.rows if row.server.peer}
        return [
            name
            for name, rounds in self.results.items()
            if rounds and (not is_valid(rounds) or (name not in peers and len(sound(rounds)) < len(rounds)))
        ]


def surroundings(models: Path) -> dict[str, Any]:
    """What the figures depend on: machine, versions, networks, commit; no names of hosts or folders."""
    repository = Repository(models)
    profile = profile_of(Settings())
    networks = {}
    for model in sorted(set(repository.models()) & set(MODELS)):
        files = repository.open(model, None, profile.variants)
        digest = files.card["files"][files.variant]["sha256"][:12]
        networks[model] = f"{files.version} {files.variant}, sha256 {digest}"
    return {
        "cores": cores(),
        **({"gpu": gpu_name()} if profile.is_gpu else {}),
        "processor": _processor(),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
        "versions": {library: version(library) for library in LIBRARIES},
        "wrk": generators.version("wrk"),
        "networks": networks,
        "commit": _commit(),
        "settings": _settings(),
    }


def _settings() -> dict[str, str]:
    """What is set otherwise than by default, in the environment or in the file of settings."""
    file = settings_file()
    in_file = dotenv_values(file) if file is not None and file.is_file() else {}
    said = {name: value or "" for name, value in {**in_file, **os.environ}.items() if _is_told(name)}
    return dict(sorted(said.items()))


def _is_told(name: str) -> bool:
    hidden = ("KEY", "DATA", "MODELS", "PEERS", "SETTINGS")
    return name.startswith("QUINTET_") and not any(word in name for word in hidden)


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
    "inputs/s",
    "of ours",
    "p50 ms",
    "p95 ms",
    "p99 ms",
    "CPU µs each",
    "busiest",
    "batch",
    "MiB",
    "",
)


def rows(outcome: Outcome) -> list[tuple[str, ...]]:
    """The table, a line per row of the section."""
    return [_row(outcome, scenario) for scenario in outcome.section.rows]


def _row(outcome: Outcome, scenario: Scenario) -> tuple[str, ...]:
    rounds = outcome.results.get(scenario.name, [])
    payload = scenario.what
    if scenario.connections is not None:
        payload += f", {scenario.connections} at a time"
    if scenario.open_after:
        payload += ", Poisson"
    if scenario.crowd:
        payload += f", {scenario.crowd}"
    if scenario.counts_decoding:
        payload += ", decoded"
    head = (scenario.server.name, payload, str(scenario.server.workers))
    blank = [""] * (len(HEADINGS) - len(head) - 1)
    if scenario.name in outcome.absent:
        return (*head, *blank, f"NOT MEASURED: {outcome.absent[scenario.name]}")
    problems = "; ".join(dict.fromkeys(problem for one in rounds for problem in one.problems))
    if scenario.name in outcome.invalid() or not rounds:
        return (*head, *blank, f"INVALID: {problems}" if problems else "NOT MEASURED")
    share = None
    if outcome.section.yardstick:
        names = (scenario.name, outcome.section.yardstick)
        share = by_round(outcome.results, names, lambda one, ours: rate(one) / rate(ours))

    def middle(figure: str, form: str) -> str:
        value = median(getattr(one, figure) for one in rounds)
        return format(value, form) if value else ""

    notes = [outcome.notes.get(scenario.name, "")]
    if len(rounds) < max(map(len, outcome.results.values())):
        notes.append("not the best of its kind, 1 round")
    if problems:
        notes.append(f"broke in {len(rounds) - len(sound(rounds))} of {len(rounds)} rounds: {problems}")
    rounds = sound(rounds)
    return (
        *head,
        Spread.of([rate(one) for one in rounds]).text(",.0f"),
        share.text(".2f") if share else "",
        middle("p50_ms", ".2f"),
        middle("p95_ms", ".2f"),
        middle("p99_ms", ".2f"),
        middle("cpu_us", ",.0f"),
        middle("busiest_share", ".0%"),
        _mean_batch(rounds),
        middle("memory_mib", ",.0f"),
        "; ".join(note for note in notes if note),
    )


def _mean_batch(rounds: Sequence[Measurement]) -> str:
    """About how many inputs ran together: the middle of the batches, by size."""
    counted: dict[float, int] = {}
    for one in rounds:
        for size, count in one.batches.items():
            counted[float(size)] = counted.get(float(size), 0) + count
    total, seen = sum(counted.values()), 0
    for size in sorted(counted):
        seen += counted[size]
        if seen * 2 >= total > 0:
            return f"≤ {size:g}"
    return ""


def noise(results: Results) -> str:
    """A warning where the machine had other work; else nothing."""
    other = [one.other_cores for rounds in results.values() for one in rounds]
    if not other or max(other) <= BUSY_CORES:
        return ""
    return (
        f"NOISY: other programs kept {Spread.of(other).text('.1f')} cores busy meanwhile; "
        "measure again on an idle machine."
    )


def warnings(outcome: Outcome) -> list[str]:
    """What makes the figures less than sure."""
    found = [
        f"SPREAD TOO WIDE: the last rounds of {name} lie {spread:.0%} apart."
        for name, spread in outcome.unsteady().items()
    ]
    if warning := noise(outcome.results):
        found.append(warning)
    return found


def show(console: Console, outcome: Outcome) -> None:
    """Print the table and the verdicts."""
    table = Table(*HEADINGS, title=outcome.section.title, title_justify="left")
    for column in table.columns[:5]:
        column.no_wrap = True
    for column in table.columns[2:-1]:
        column.justify = "right"
    for row in rows(outcome):
        table.add_row(*row)
    console.print(table)
    for warning in warnings(outcome):
        console.print(warning, style="yellow", highlight=False, markup=False)
    for verdict in outcome.verdicts():
        style = "red" if verdict.is_missed else "green" if verdict.is_met else "yellow"
        console.print(str(verdict), style=style, highlight=False, markup=False)


def write(folder: Path, prefix: str, outcome: Outcome, conditions: Mapping[str, Any]) -> list[Path]:
    """Write `<date>-<prefix><section>` as `.md`, `.json` and, where there is something to see, `.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC)
    stem = f"{now:%Y-%m-%d}-{prefix}{outcome.section.name}"
    record: dict[str, Any] = {
        "date": f"{now:%Y-%m-%d %H:%M} UTC",
        **conditions,
        "section": outcome.section.name,
        "round_count": max((len(rounds) for rounds in outcome.results.values()), default=0),
        "claims": [
            {
                "claim": verdict.claim.words,
                "against": verdict.against,
                "bound": verdict.claim.bound,
                "outcome": verdict.outcome,
                "found": verdict.text,
            }
            for verdict in outcome.verdicts()
        ],
        "warnings": warnings(outcome),
        "absent": outcome.absent,
        "rows": {name: [asdict(one) for one in rounds] for name, rounds in outcome.results.items()},
    }
    texts = {
        f"{stem}.md": _markdown(record, outcome),
        f"{stem}.json": json.dumps(record, indent=1, ensure_ascii=False) + "\n",
    }
    for file, text in texts.items():
        draft = folder / f"{file}.tmp"
        draft.write_text(text, encoding="utf-8")
        draft.replace(folder / file)
    written = [folder / file for file in texts]
    picture = folder / f"{stem}.png"
    if _plot(picture, outcome):
        written.append(picture)
    return written


SUMMARY: Final = "README.md"


def summarise(folder: Path) -> Path:
    """Write what the latest run of each section found of its claims; the file."""
    latest: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        # Runs under a name of their own are trials of something else.
        if "claims" in record and path.stem == f"{record['date'][:10]}-{record['section']}":
            latest[record["section"]] = record
    lines = [
        "# What the latest runs found",
        "",
        "Written by `python -m load_tests`; each section's own file tells machine, versions and every row.",
        "",
        "| section | must show | bound | found | | measured | commit |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for section, record in latest.items():
        link = f"[{section}]({record['date'][:10]}-{section}.md)"
        doubt = " (see its warnings)" if record["warnings"] else ""
        lines += [
            f"| {link} | {claim['claim']} | {claim['bound']} | {claim['found']} | {claim['outcome']}{doubt} "
            f"| {record['date']} | {record['commit']} |"
            for claim in record["claims"]
        ]
    (folder / SUMMARY).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / SUMMARY


def _markdown(record: Mapping[str, Any], outcome: Outcome) -> str:
    versions = ", ".join(f"{library} {number}" for library, number in record["versions"].items())
    settings = ", ".join(f"{name}={value}" for name, value in record["settings"].items()) or "defaults"
    networks = "; ".join(f"{model} {network}" for model, network in record["networks"].items())
    lines = [
        f"# {outcome.section.title}, {record['date']}",
        "",
        f"{record['cores']} cores of {record['processor']}; {record['system']}; commit {record['commit']}.",
        f"Python {record['python']}, {versions}; wrk {record['wrk']}. Settings: {settings}.",
        f"Networks: {networks}. {record['connections']} connections, where the row names no other number; "
        f"{record['round_count']} interleaved rounds of {record['seconds']:g} s each: medians, some with "
        "(least-most), and the most uneven round's busiest worker; ratios are taken within rounds.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "| --- | --- |" + " ---: |" * (len(HEADINGS) - 3) + " --- |",
        *("| " + " | ".join(row) + " |" for row in rows(outcome)),
        "",
        *(f"- {verdict}" for verdict in outcome.verdicts()),
        *(f"- {warning}" for warning in warnings(outcome)),
    ]
    return "\n".join(lines) + "\n"


def _plot(path: Path, outcome: Outcome) -> bool:
    """Draw the section: its curves, or else a bar for each row. False where nothing was measured."""
    # Slow to load, and needed once at the end.
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    measured = {name: rounds for name, rounds in outcome.results.items() if is_valid(rounds)}
    if not measured:
        return False
    curves = outcome.section.curves
    if curves:
        figure, axes = pyplot.subplots(1, len(curves), figsize=(6 * len(curves), 4), squeeze=False)
        for axis, (unit, points) in zip(axes[0], curves.items(), strict=True):
            there = [(name, amount) for name, amount in points if name in measured]
            spreads = [Spread.of([rate(one) for one in sound(measured[name])]) for name, _ in there]
            amounts = [amount for _, amount in there]
            axis.plot(amounts, [spread.median for spread in spreads], marker="o")
            axis.fill_between(
                amounts, [one.least for one in spreads], [one.most for one in spreads], alpha=0.2
            )
            axis.set(xscale="log", xlabel=unit, ylabel="inputs a second", ylim=(0, None))
            axis.set_xticks(amounts, [str(amount) for amount in amounts], minor=False)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    else:
        figure, axis = pyplot.subplots(figsize=(9, 0.8 + 0.35 * len(measured)))
        names = [row.name for row in outcome.section.rows if row.name in measured][::-1]
        spreads = [Spread.of([rate(one) for one in sound(measured[name])]) for name in names]
        middles = [spread.median for spread in spreads]
        around = [
            [spread.median - spread.least for spread in spreads],
            [spread.most - spread.median for spread in spreads],
        ]
        colours = ["tab:orange" if name.startswith("quintet") else "tab:blue" for name in names]
        axis.barh(names, middles, xerr=around, color=colours, capsize=2)
        axis.set(xlabel="inputs a second: median, least and most of the rounds")
        axis.grid(axis="x", alpha=0.3)
    figure.suptitle(outcome.section.title)
    figure.tight_layout()
    draft = path.with_suffix(".png.tmp")
    figure.savefig(draft, format="png", dpi=110)
    pyplot.close(figure)
    draft.replace(path)
    return True
