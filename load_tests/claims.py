"""What a run must show: figures out of its rows, each held against a bound."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from load_tests.measurement import Measurement, Results, Spread, best, by_round, rate

KEPT_OF_PEAK: Final = 0.9
"""As work grows, throughput may fall to this share of its peak."""

Found = tuple[Spread | None, str]
"""A figure, None where it was not measured; and what it was held against, for people."""


@dataclass(frozen=True)
class Claim:
    """A figure and its bound.

    Attributes:
        words: What must hold, without the bound.
        figure: The figure and what it was compared with.
        least, most: The bound, one of them; none for a figure that is only stated.
        form: How the figure is written.
        unit: What follows it.
    """

    words: str
    figure: Callable[[Results], Found]
    least: float | None = None
    most: float | None = None
    form: str = ".2f"
    unit: str = ""

    @property
    def bound(self) -> str:
        """The bound in words."""
        if self.least is not None:
            return f"at least {self.least:g}{self.unit}"
        return f"at most {self.most:g}{self.unit}" if self.most is not None else "stated"

    def judge(self, results: Results) -> "Verdict":
        """Hold the results against the bound."""
        return Verdict(self, *self.figure(results))


@dataclass(frozen=True)
class Verdict:
    """One claim, and what became of it; `found` is None where it was not measured."""

    claim: Claim
    found: Spread | None
    against: str = ""

    @property
    def is_met(self) -> bool:
        """Whether the median of the rounds is within the bound."""
        if self.found is None:
            return False
        if self.claim.least is not None:
            return self.found.median >= self.claim.least
        return self.claim.most is None or self.found.median <= self.claim.most

    @property
    def is_missed(self) -> bool:
        """Whether it was measured, and is out of the bound."""
        return self.found is not None and not self.is_met

    @property
    def outcome(self) -> str:
        """In a word."""
        if self.found is None:
            return "NOT MEASURED"
        if self.claim.least is None and self.claim.most is None:
            return "STATED"
        return "PASS" if self.is_met else "FAIL"

    @property
    def text(self) -> str:
        """The figure, with its least and most."""
        return f"{self.found.text(self.claim.form)}{self.claim.unit}" if self.found else ""

    def __str__(self) -> str:
        """The claim in a line."""
        against = f" [{self.against}]" if self.against else ""
        found = f": {self.text}" if self.found else ""
        return f"{self.outcome}: {self.claim.words}{against}, {self.claim.bound}{found}"


def times(words: str, ours: str, peers: Sequence[str], at_least: float | None) -> Claim:
    """`ours` answers so many times the inputs of the best of `peers`."""

    def figure(results: Results) -> Found:
        peer = best(results, peers)
        if peer is None:
            return None, ""
        return by_round(results, (ours, peer), lambda mine, theirs: rate(mine) / rate(theirs)), peer

    return Claim(words, figure, least=at_least, unit=" times")


def of_the_limit(words: str, ours: str, parts: Sequence[str], at_least: float | None) -> Claim:
    """`ours` answers such a share of what `parts` allow together.

    Each part says how long all cores work for one input; one after another they take the sum.
    """

    def figure(results: Results) -> Found:
        found = by_round(
            results, (ours, *parts), lambda mine, *rest: rate(mine) * sum(1 / rate(one) for one in rest)
        )
        return found, " + ".join(parts)

    return Claim(words, figure, least=at_least)


def added_milliseconds(words: str, ours: str, bare: str, at_most: float) -> Claim:
    """The median answer of `ours` takes so much longer than the median run of `bare`."""

    def figure(results: Results) -> Found:
        return by_round(results, (ours, bare), lambda mine, run: mine.p50_ms - run.p50_ms), bare

    return Claim(words, figure, most=at_most, form=".3f", unit=" ms")


def tail(words: str, row: str, at_most: float) -> Claim:
    """Of 100 answers 99 take no longer than so many times what half of them take."""
    return Claim(
        words,
        lambda results: (by_round(results, (row,), lambda one: one.p99_ms / one.p50_ms), ""),
        most=at_most,
    )


def memory(words: str, row: str, at_most_mib: float) -> Claim:
    """All of a server's processes take no more memory than this."""
    return Claim(
        words,
        lambda results: (by_round(results, (row,), lambda one: one.memory_mib), ""),
        most=at_most_mib,
        form=",.0f",
        unit=" MiB",
    )


def fair_shares(words: str, together: Sequence[str], alone: Sequence[str], at_least: float) -> Claim:
    """Each of several loads at once gets such a share of its part: what it gets alone, by their number."""

    def least(*both: Measurement) -> float:
        count = len(together)
        return min(
            rate(one) / (rate(by_itself) / count)
            for one, by_itself in zip(both[:count], both[count:], strict=True)
        )

    return Claim(
        words,
        lambda results: (by_round(results, (*together, *alone), least), "the least of them"),
        least=at_least,
    )


def keeps_up(words: str, rows: Sequence[str], unit: str) -> Claim:
    """From its peak on, throughput does not fall as work grows; `rows` go from little work to much."""

    def least_after_peak(*growing: Measurement) -> float:
        rates = [rate(one) for one in growing]
        peak = max(rates)
        return min(rates[rates.index(peak) :]) / peak

    return Claim(
        words,
        lambda results: (by_round(results, rows, least_after_peak), f"of the peak, over {unit}"),
        least=KEPT_OF_PEAK,
    )
