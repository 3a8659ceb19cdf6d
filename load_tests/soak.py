"""Work for minutes at 80 % of what the service can do: every answer right, and its memory flat within 5 %.

    python -m load_tests soak --minutes 5

What it can do is measured first, by callers who each wait for their answer before they ask again; then
requests come on time, whether or not those before them have been answered. All models, at both doors.
The callers share the machine with the service: what is measured is what both can do together.
"""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from typing import Final

from load_tests import proof
from load_tests.doors import DOORS, Doors, Known, get_to_know, ready_rooms
from load_tests.proof import Deviation, check_flat
from load_tests.scenarios import HOST
from load_tests.servers import Running

SHARE: Final = 0.8
INPUTS: Final = 20
"""Of each model, whose answers are known."""

CALLERS: Final = 32
MOST_UNDER_WAY: Final = 500
"""So many requests without an answer mean that the service does not keep up."""


async def ask_one(doors: Doors, known: Sequence[Known], chance: random.Random) -> None:
    """One request, and its right answer.

    Raises:
        Deviation: it has another.
    """
    of, door = chance.choice(known), chance.choice(DOORS)
    places = of.draw(chance, 3)
    outcome = await doors.ask(door, of.room, [of.inputs[place] for place in places])
    if not of.is_right(door, places, outcome):
        raise Deviation(f"{of.room}, {door}: {outcome} to the inputs {places}")


async def capacity(doors: Doors, known: Sequence[Known], chance: random.Random, seconds: float) -> float:
    """Requests per second that are answered when each caller asks as soon as it is answered."""
    answered, started = 0, time.monotonic()

    async def call() -> None:
        nonlocal answered
        while time.monotonic() - started < seconds:
            await ask_one(doors, known, chance)
            answered += 1

    async with asyncio.TaskGroup() as callers:
        for _ in range(CALLERS):
            callers.create_task(call())
    return answered / (time.monotonic() - started)


async def soak(
    doors: Doors,
    known: Sequence[Known],
    chance: random.Random,
    rate: float,
    seconds: float,
    look: Callable[[], object],
) -> int:
    """Ask so many requests a second for so many seconds, on time; how many were asked, and answered right.

    `look` is called every second.

    Raises:
        Deviation: the service does not keep up.
    """
    under_way: set[asyncio.Task[None]] = set()
    asked, started, looked = 0, time.monotonic(), 0.0
    async with asyncio.TaskGroup() as requests:
        while asked < rate * seconds:
            elapsed = time.monotonic() - started
            while asked < rate * min(elapsed, seconds):
                request = requests.create_task(ask_one(doors, known, chance))
                under_way.add(request)
                request.add_done_callback(under_way.discard)
                asked += 1
            if len(under_way) > MOST_UNDER_WAY:
                raise Deviation(f"{len(under_way)} requests are under way: the service does not keep up")
            if elapsed - looked >= 1:
                look()
                looked = elapsed
            await asyncio.sleep(0.005)
    return asked


async def run(running: Running, chance: random.Random, warm_up_seconds: float, seconds: float) -> None:
    """Measure, soak and judge.

    Raises:
        Deviation: something is not as it should be.
    """
    held: list[float] = []
    async with Doors(f"{HOST}:{running.port}", f"{HOST}:{running.grpc_port}") as doors:
        known = [await get_to_know(doors, room, INPUTS, chance) for room in await ready_rooms(doors)]
        try:
            most = await capacity(doors, known, chance, warm_up_seconds)
            print(f"capacity: {most:,.0f} requests/s of all models at both doors", flush=True)
            rate = SHARE * most
            asked = await soak(
                doors, known, chance, rate, seconds, lambda: held.append(running.resident_mib())
            )
        except* Deviation as several:
            raise several.exceptions[0] from None
    print(f"{asked:,} requests in {seconds:.0f} s, all answered right", flush=True)
    check_flat(held)


def main(arguments: Sequence[str]) -> int:
    """Start a server and soak it; 0 if all went as it should."""
    parser = proof.parser_of("soak", __doc__)
    parser.add_argument("--minutes", type=float, default=5, help="(default %(default)s)")
    parser.add_argument(
        "--warm-up", type=float, default=30, help="seconds in which its capacity is measured (default 30)"
    )
    options = parser.parse_args(arguments)
    chance = random.Random(options.seed)
    return proof.carry_out(
        options,
        lambda running: asyncio.run(run(running, chance, options.warm_up, options.minutes * 60)),
    )
