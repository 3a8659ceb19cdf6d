"""What one measurement found, and how several of them agree."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Final

MEBIBYTE: Final = 1024 * 1024

AGREEING_ROUNDS: Final = 3
"""So many rounds, the last ones, must agree."""

WIDEST_SPREAD: Final = 0.10
"""They agree when the most of them is above the least by no more than this share of their median."""


RIVALS_SPREAD: Final = 0.25
"""The same for peers: some never run evenly, and their targets are whole multiples away."""


@dataclass(frozen=True)
class Measurement:
    """One row in one round.

    Attributes:
        requests_per_second: Answers that came back.
        p50_ms, p95_ms, p99_ms: How long half, 95 and 99 of 100 of them took at the most.
        cpu_us: Processor time of all the server's processes for one input, in microseconds.
        busiest_share: The part of that time that the busiest process used.
        other_cores: Cores kept busy by neither server nor load generator.
        memory_mib: Memory of all the server's processes, what they share counted once.
        batches: How many batches had at most so many inputs, by that size; empty where it is not told.
        inputs: Inputs in one request.
        problems: Why this does not count; empty if it does.
    """

    requests_per_second: float
    p50_ms: float = 0.0
    p95_ms: float = 0.0
    p99_ms: float = 0.0
    cpu_us: float = 0.0
    busiest_share: float = 0.0
    other_cores: float = 0.0
    memory_mib: float = 0.0
    batches: dict[str, int] = field(default_factory=dict)
    inputs: int = 1
    problems: tuple[str, ...] = ()

    @property
    def inputs_per_second(self) -> float:
        """Inputs answered."""
        return self.requests_per_second * self.inputs


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


Results = dict[str, list[Measurement]]
"""The rounds of each row, by its name."""

Figure = Callable[[Measurement], float]


def rate(one: Measurement) -> float:
    """Inputs answered in a second."""
    return one.inputs_per_second


def sound(rounds: Sequence[Measurement]) -> list[Measurement]:
    """The rounds without problems."""
    return [one for one in rounds if not one.problems]


def is_valid(rounds: Sequence[Measurement]) -> bool:
    """Whether a row was measured: without problems, or in enough rounds without.

    Some servers break now and then under a load; what they do while they live is known all the same.
    """
    count = len(sound(rounds))
    return 0 < count == len(rounds) or count >= AGREEING_ROUNDS


def by_round(results: Results, names: Sequence[str], figure: Callable[..., float]) -> Spread | None:
    """A figure made of several rows, round by round: the rows of one round saw the same machine.

    Args:
        results: What was measured.
        names: Rows; `figure` is given one measurement of each.
        figure: What to make of them.

    Returns:
        None where one of the rows was not measured, or never together with the others.
    """
    rounds = [results.get(name, []) for name in names]
    if not all(map(is_valid, rounds)):
        return None
    # A row that others have outlived was not the best of its kind; it has the first rounds only.
    together = [ones for ones in zip(*rounds, strict=False) if len(sound(ones)) == len(ones)]
    return Spread.of([figure(*ones) for ones in together]) if together else None


def best(results: Results, names: Sequence[str]) -> str | None:
    """Of these rows, the one that answers most inputs; None where none was measured."""
    valid = [name for name in names if is_valid(results.get(name, []))]
    if not valid:
        return None
    longest = max(len(results[name]) for name in valid)
    return max(
        (name for name in valid if len(results[name]) == longest),
        key=lambda name: median(map(rate, sound(results[name]))),
    )


def spread_of_last(rounds: Sequence[Measurement]) -> float:
    """How far the last rounds of a row lie apart, as a share of their median."""
    rates = [rate(one) for one in sound(rounds)[-AGREEING_ROUNDS:]]
    middle = median(rates)
    return (max(rates) - min(rates)) / middle if middle else 0.0
