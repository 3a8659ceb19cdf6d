"""What the proofs share: their options, a server of their own, and a look at its memory.

A proof asks whether the service is right, where the bench asks how fast it is.
"""

import argparse
import math
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import httpx

from load_tests.bench import interrupt_on_signals
from load_tests.scenarios import HOST, quintet
from load_tests.servers import LOG, Running, ServerFailed
from service.settings import Settings

FLAT: Final = 0.05
"""By this share of itself a server's memory may grow or shrink while it works."""

TROUBLE: Final = ("Traceback", '"level": "error"', '"level": "critical"', "[ERROR]", "Exception in callback")
"""Signs in the service's log that something went wrong which nobody sent."""


class Deviation(Exception):
    """The service did what it should not have done."""


def parser_of(module: str, words: str | None) -> argparse.ArgumentParser:
    """The options that every proof has."""
    settings = Settings()
    parser = argparse.ArgumentParser(
        prog=f"python -m load_tests {module}",
        description=words,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workers", type=int, default=settings.workers, help="(default %(default)s)")
    parser.add_argument("--models", type=Path, default=settings.models, help="model repository")
    parser.add_argument("--seed", type=int, default=0, help="of all chance (default %(default)s)")
    return parser


def carry_out(options: argparse.Namespace, work: Callable[[Running], object], **settings: object) -> int:
    """Start a server, prove something of it, and say the verdict; 0 if it did as it should.

    `settings` are the service's own, by their names in `service/settings.py`.
    """
    interrupt_on_signals()
    environment = {f"QUINTET_{name.upper()}": str(value) for name, value in settings.items()}
    with tempfile.TemporaryDirectory(prefix="quintet-proof-", ignore_cleanup_errors=True) as scratch:
        server = quintet(options.workers, environment)
        try:
            with Running(server, options.models.resolve(), Path(scratch)) as running:
                running.wait_until(partial(_is_ready, running))
                work(running)
                running.check(math.inf)
            _check_log(Path(scratch) / LOG)
        except (Deviation, ServerFailed) as error:
            print(f"NOT as it should be: {error}", flush=True)
            return 1
    print("All as it should be.", flush=True)
    return 0


def _is_ready(running: Running) -> bool:
    """Whether a worker of it takes requests."""
    try:
        return httpx.get(f"http://{HOST}:{running.port}/readyz", trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def _check_log(path: Path) -> None:
    """See that a server's log tells of nothing that went wrong.

    Raises:
        Deviation: it does.
    """
    for line in path.read_text(errors="replace").splitlines():
        if any(sign in line for sign in TROUBLE):
            raise Deviation(f"the server's log has an error:\n{line}")


def check_flat(held: Sequence[float]) -> None:
    """Say how a server's memory went, and see that it was flat after a fifth of the time, when it was warm.

    Args:
        held: What its processes held together, in MiB, look by look.

    Raises:
        Deviation: it was not.
    """
    later = held[len(held) // 5 :]
    least, most = min(later), max(later)
    change = most / least - 1
    print(
        f"resident memory: {later[0]:.0f} MiB after a fifth of the time, then between "
        f"{least:.0f} and {most:.0f}, in the end {later[-1]:.0f} "
        f"({change:.1%})",
        flush=True,
    )
    if change > FLAT:
        raise Deviation(f"resident memory changed by {change:.1%}, where {FLAT:.0%} is allowed")
