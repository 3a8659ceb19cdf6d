"""A bar on standard error that shows how many inputs have their answer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Bar(Protocol):
    """Counts answers."""

    def __call__(self, more: int) -> None:
        """Count so many more."""


@contextmanager
def bar(name: str, total: int | None) -> Iterator[Bar]:
    """A bar for the model called `name`; without a `total`, where nobody knows how many are to come."""
    # Here, because it takes a while to load and few ask for it.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(name, total=total)
        yield lambda more: progress.advance(task, more)


@contextmanager
def no_bar() -> Iterator[Bar]:
    """What counts and shows nothing."""
    yield lambda more: None
