"""Find the settings that serve most on this machine, and write them where the service reads them.

    python -m load_tests tune                         # some minutes; close everything else first
    python -m load_tests tune --p99-ms 50             # most, with 99 of 100 answers within 50 ms
    python -m load_tests tune --prove digit           # and try every combination, to see what was missed

Workers, lanes and threads are of the whole service, the window and the largest batch of each
model. One setting is varied at a time, those of all models at once, and the best value is kept
before the next is tried (coordinate ascent; the settings that matter most come first, so one
pass over them comes near to the best of all combinations). A value must gain something to take
the place of the one before it: what cannot be told apart stays as it was.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from itertools import product
from math import exp, log
from pathlib import Path
from typing import Final

from rich.console import Console

from load_tests import report
from load_tests.bench import interrupt_on_signals
from load_tests.generators import NO_ANSWER, ProgramMissing, ask, replay, require
from load_tests.payloads import room_payload
from load_tests.scenarios import quintet
from load_tests.servers import ROOT, Running, ServerFailed
from service.models import MODELS
from service.repository import Repository, RepositoryError
from service.settings import SETTINGS_FILE, Settings, cores, settings_file

LEAST_GAIN: Final = 1.03
"""A value that gains less than this is not told from noise."""

WINDOWS_MS: Final = (0.0, 0.5, 2.0)
BATCHES: Final = (8, 16, 32, 64, 128)

Policy = dict[str, float]

Measure = Callable[["Choice", Sequence[str]], Mapping[str, float]]


@dataclass(frozen=True)
class Choice:
    """Settings to try: of the whole service, and of single models."""

    whole: Mapping[str, int]
    policies: Mapping[str, Policy] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        """As the service reads them."""
        said = {f"QUINTET_{name.upper()}": str(value) for name, value in self.whole.items()}
        policies = {model: policy for model, policy in self.policies.items() if policy}
        return said | ({"QUINTET_POLICIES": json.dumps(policies)} if policies else {})

    def with_whole(self, name: str, value: int) -> "Choice":
        """With another value of the whole service's."""
        return replace(self, whole={**self.whole, name: value})

    def with_policies(self, name: str, values: Mapping[str, float]) -> "Choice":
        """With another value of each model's."""
        policies = {model: {**self.policies.get(model, {}), name: value} for model, value in values.items()}
        return replace(self, policies={**self.policies, **policies})

    def __str__(self) -> str:
        """The settings in a line."""
        return " ".join(
            f"{name.removeprefix('QUINTET_')}={value}" for name, value in self.environment().items()
        )


class Trials:
    """Measures choices, each once."""

    def __init__(self, options: argparse.Namespace, scratch: Path, console: Console) -> None:
        self._options = options
        self._scratch = scratch
        self._console = console
        self.count = 0

    def rates(self, choice: Choice, models: Sequence[str]) -> dict[str, float]:
        """What each model answers in a second under these settings; 0 where it is too slow for the limit.

        Raises:
            ServerFailed: the service does not start.
        """
        options = self._options
        self.count += 1
        home = self._scratch / str(self.count)
        home.mkdir()
        found = {}
        # What an earlier search found must not mix with what is tried.
        environment = {SETTINGS_FILE: "", **choice.environment()}
        server = quintet(int(choice.whole["workers"]), environment)
        with Running(server, options.models.resolve(), home) as running:
            running.wait_until(partial(_answers, running, models))
            for model in models:
                payload = room_payload(model)
                replay(running, payload, 1, options.connections, home / model)
                load = replay(running, payload, options.seconds, options.connections, home / model)
                is_late = options.p99_ms and load.p99_ms > options.p99_ms
                found[model] = 0.0 if is_late or load.problems else load.requests_per_second
        figures = ", ".join(f"{model} {rate:,.0f}" for model, rate in found.items())
        self._console.print(
            f"{self.count:3}. {choice}: {figures}", highlight=False, markup=False, soft_wrap=True
        )
        return found


def _answers(running: Running, models: Sequence[str]) -> bool:
    try:
        return all(ask(running, room_payload(model)) for model in models)
    except NO_ANSWER:
        return False


def gain(rates: Mapping[str, float], before: Mapping[str, float]) -> float:
    """How many times as fast all models are together: the geometric mean of their own gains."""
    ratios = [max(rates[model], 1e-9) / max(before[model], 1e-9) for model in before]
    return exp(sum(map(log, ratios)) / len(ratios))


def whole_values(count: int) -> dict[str, tuple[int, ...]]:
    """What is tried of the whole service's settings, those that matter most first."""
    counts = tuple(sorted({1, max(1, count // 2), count}, reverse=True))
    return {"workers": counts, "lanes": tuple(sorted({1, 2, count})), "threads": tuple(sorted({0, 1, count}))}


def search(measure: Measure, models: Sequence[str], count: int, start: Choice) -> Choice:
    """The best settings that one pass over them finds.

    Args:
        measure: What each of some models answers in a second, under settings.
        models: Whom to tune for.
        count: Cores.
        start: The settings to begin with, which stay where nothing gains.
    """
    choice, rates = start, measure(start, models)
    for name, values in whole_values(count).items():
        for value in values:
            if value == start.whole[name]:
                continue
            other = choice.with_whole(name, value)
            found = measure(other, models)
            if gain(found, rates) >= LEAST_GAIN:
                choice, rates = other, found
    defaults = Settings()
    for name, tried in (("batch_window_ms", WINDOWS_MS), ("max_batch", BATCHES)):
        best = {model: (rates[model], float(getattr(defaults, name))) for model in models}
        for amount in tried:
            if amount == getattr(defaults, name):
                continue
            found = measure(choice.with_policies(name, dict.fromkeys(models, amount)), models)
            for model in models:
                if found[model] >= best[model][0] * LEAST_GAIN:
                    best[model] = (found[model], amount)
        better = {
            model: amount for model, (_, amount) in best.items() if amount != float(getattr(defaults, name))
        }
        if better:
            choice = choice.with_policies(name, better)
            rates = {model: rate for model, (rate, _) in best.items()}
    return choice


def grid(count: int, model: str) -> Iterator[Choice]:
    """Every combination for one model."""
    whole = whole_values(count)
    for values in product(*whole.values(), WINDOWS_MS, BATCHES):
        *common, window, batch = values
        yield Choice(
            dict(zip(whole, map(int, common), strict=True)),
            {model: {"batch_window_ms": window, "max_batch": int(batch)}},
        )


def prove(trials: Trials, chosen: Choice, model: str, count: int, console: Console) -> None:
    """Try every combination for one model, and say how near the search came, and at what cost."""
    searched = trials.count
    best = max(trials.rates(choice, [model])[model] for choice in grid(count, model))
    # Measured again beside the others, on the machine as it is now.
    reached = trials.rates(chosen, [model])[model]
    combinations = trials.count - searched - 1
    console.print(
        f"{model}: {reached / best:.1%} of the best of {combinations} combinations, "
        f"after {searched} trials ({searched / combinations:.0%} of them) for all models together.",
        highlight=False,
    )


def write(path: Path, choice: Choice, models: Path) -> None:
    """Write the settings, as a file of environment variables."""
    conditions = report.surroundings(models)
    lines = [
        f"# Found by `python -m load_tests tune`, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC,",
        f"# on {conditions['cores']} cores of {conditions['processor']}, commit {conditions['commit']}.",
        "# Variables of the environment go before what stands here.",
        *(f"{name}={_quoted(value)}" for name, value in choice.environment().items()),
    ]
    draft = path.with_name(f"{path.name}.tmp")
    draft.write_text("\n".join(lines) + "\n", encoding="utf-8")
    draft.replace(path)


def _quoted(value: str) -> str:
    return f"'{value}'" if '"' in value else value


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    settings = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m load_tests tune", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--seconds", type=int, default=2, help="one measurement (default %(default)s)")
    parser.add_argument("--connections", type=int, default=32, help="callers at a time (default %(default)s)")
    parser.add_argument(
        "--p99-ms", type=float, default=0, help="99 of 100 answers must be within (default: any)"
    )
    parser.add_argument("--only", default="", help="models to tune for, with commas (default: all)")
    parser.add_argument(
        "--prove", default="", metavar="MODEL", help="try every combination too, for one model"
    )
    parser.add_argument(
        "--models", type=Path, default=settings.models, help="model repository (default: the shipped one)"
    )
    parser.add_argument("--to", type=Path, help="file of settings (default: what the service reads)")
    return parser.parse_args(given)


def main(given: Sequence[str]) -> int:
    """Tune; 0 if settings were written."""
    options = arguments(given)
    console = Console() if sys.stdout.isatty() else Console(width=180)
    interrupt_on_signals()
    machine_cores = cores()
    target = options.to or settings_file() or ROOT / "quintet.env"
    try:
        require("wrk")
        there = set(Repository(options.models).models())
        models = [model for model in MODELS if model in there]
        wanted = options.only.split(",") if options.only else models
        if unknown := {*wanted, options.prove or wanted[0]} - set(models):
            raise SystemExit(f"There is no model {min(unknown)}; there are {', '.join(models)}.")
        with tempfile.TemporaryDirectory(prefix="quintet-tune-", ignore_cleanup_errors=True) as scratch:
            trials = Trials(options, Path(scratch), console)
            start = Choice({name: getattr(Settings(), name) for name in whole_values(machine_cores)})
            chosen = search(trials.rates, wanted, machine_cores, start)
            if options.prove:
                prove(trials, chosen, options.prove, machine_cores, console)
        write(target, chosen, options.models)
    except (ProgramMissing, RepositoryError, ServerFailed) as error:
        console.print(str(error), style="red", highlight=False, markup=False)
        return 2
    except KeyboardInterrupt:
        console.print("Stopped; nothing was written.")
        return 130
    console.print(f"{chosen}\nwritten: {target.name}", highlight=False, markup=False, soft_wrap=True)
    return 0
