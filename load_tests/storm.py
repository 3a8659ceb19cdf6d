"""Requests of every kind together: right, broken, late, hurried and given up, for all models, at both doors.

    python -m load_tests storm --times 1000

Every right one must be right (as it is when it is asked alone, within 1e-3), every wrong one must be
told so, nothing else may come back, and the server must be none the worse for it: it says so in the end.
"""

import asyncio
import random
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from load_tests import proof
from load_tests.doors import DOORS, Door, Doors, Known, Outcome, get_to_know, give_up_after, ready_rooms
from load_tests.proof import Deviation
from load_tests.scenarios import HOST
from load_tests.servers import Running
from service.models.spec import Inputs, Tensor

IN_FLIGHT: Final = 200
INPUTS: Final = 20
"""Of each model, whose answers are known."""

FATES: Final = {"right": 12, "broken": 3, "late": 1, "hurried": 2, "given up": 2}
"""What becomes of requests, and how often."""

SHARING_TRIES: Final = 20
SHARING_MACHINES: Final = 6

BROKEN: Final[dict[str, Inputs]] = {
    "pictures": {"image": b"a seven, I promise"},
    "texts": {"text": b"not \xff UTF-8"},
    "digits": {"digit": 10, "seed": 7},
}
"""By `Room.takes`: an input that nothing can be made of."""


ANSWERS: Final = {"ok", "400", "404", "415", "504"}
"""What may become of a storm's requests, in the words of the metrics; a full queue is not among it."""


async def storm(
    doors: Doors, known: Sequence[Known], chance: random.Random, count: int = IN_FLIGHT
) -> Counter[tuple[str, str]]:
    """Send `count` requests at once; how many there were of each fate at each door.

    Raises:
        Deviation: one of them was not answered as it should be.
    """
    counted: Counter[tuple[str, str]] = Counter()
    # A model that takes long is asked less, or the storm would be of its requests alone.
    weights = [1 / max(one.seconds, 0.01) for one in known]

    async def one() -> None:
        (of,) = chance.choices(known, weights)
        door = chance.choice(DOORS)
        (fate,) = chance.choices(list(FATES), list(FATES.values()))
        counted[door, fate] += 1
        if fate == "broken":
            words, status, ask = chance.choice(wrong_ways(doors, door, of, chance))
            outcome = await ask()
            if outcome.status != status:
                raise Deviation(f"{of.room}, {door}, {words}: {outcome.status} instead of {status}")
            return
        places = of.draw(chance, 4)
        milliseconds = {"late": 0.001, "hurried": chance.uniform(1, 200)}.get(fate)
        asking = asyncio.ensure_future(
            doors.ask(door, of.room, [of.inputs[place] for place in places], milliseconds)
        )
        if fate == "given up":
            await give_up_after(chance.random() * 0.1, asking)
            return
        outcome = await asking
        is_told = fate in ("late", "hurried") and outcome.status == 504
        if not is_told and (fate == "late" or not of.is_right(door, places, outcome)):
            raise Deviation(f"{of.room}, {door}, {fate}: {outcome} to the inputs {places}")

    # All are waited for, or the one that deviates would leave the others behind.
    ended = await asyncio.gather(*(one() for _ in range(count)), return_exceptions=True)
    for error in ended:
        if error is not None:
            raise error
    return counted


def wrong_ways(
    doors: Doors, door: Door, of: Known, chance: random.Random
) -> list[tuple[str, int, Callable[[], Awaitable[Outcome]]]]:
    """Ways to ask wrongly: each in words, with the status that is due, and the asking."""
    room = of.room
    good = [of.inputs[place] for place in of.draw(chance, 3)]
    place = chance.randrange(len(good) + 1)
    broken = [*good[:place], BROKEN[room.takes], *good[place:]]
    if door == "people" and room.takes == "texts":
        # What is not UTF-8 has no form in JSON, and plain text is one text.
        broken = [BROKEN[room.takes]]
    ways: list[tuple[str, int, Callable[[], Awaitable[Outcome]]]] = [
        ("an input that nothing can be made of", 400, lambda: doors.ask(door, room, broken))
    ]
    if door == "people":
        path, gif = f"/{room.name}", {"headers": {"Content-Type": "image/gif"}, "content": b"GIF89a"}
        return [
            *ways,
            ("a field that there is not", 400, lambda: doors.post(path, json={"nothing": []})),
            ("a media type that is not served", 415, lambda: doors.post(path, **gif)),
            ("a path that there is not", 404, lambda: doors.post(f"{path}/nothing", json={})),
        ]
    strange = [(Tensor("nothing", "BYTES"), [b"x"])]
    return [
        *ways,
        ("a tensor that there is not", 400, lambda: doors.infer(door, room.name, strange)),
        ("a version that there is not", 404, lambda: doors.infer(door, room.name, strange, version="999")),
    ]


async def share_a_batch(http_address: str, grpc_address: str, model: Known, chance: random.Random) -> int:
    """Have one batch hold requests of both doors; how many inputs it held.

    Machines ask over gRPC without a pause, each about several inputs, so that there is always a queue, and
    one person asks about one input: if that was in a batch above 1, the others were a machine's. With
    several workers they must also meet at one of them, so it takes some tries, on new connections.

    Raises:
        Deviation: no batch ever held both.
    """

    async def keep_asking(doors: Doors) -> None:
        while True:
            await doors.ask("machines over grpc", model.room, model.inputs[:8])

    for _ in range(SHARING_TRIES):
        async with Doors(http_address, grpc_address) as doors:
            machines = [asyncio.create_task(keep_asking(doors)) for _ in range(SHARING_MACHINES)]
            for _ in range(SHARING_TRIES):
                # Not in step with the machines, or it might be the first in line each time, and run alone.
                await asyncio.sleep(chance.random() * 0.01)
                size = (await doors.ask("people", model.room, model.inputs[:1])).batch_size
                if size > 1:
                    break
            for machine in machines:
                machine.cancel()
            await asyncio.gather(*machines, return_exceptions=True)
        if size > 1:
            return size
    raise Deviation(f"{model.room}: no batch held requests of both doors")


async def answers_given(doors: Doors) -> Counter[str]:
    """How many requests the server has counted of each outcome."""
    counted: Counter[str] = Counter()
    text = (await doors.http.get("/metrics")).text
    for outcome, count in re.findall(
        r'^quintet_requests_total{.*outcome="(\w+)".*} (\S+)$', text, re.MULTILINE
    ):
        counted[outcome] += int(float(count))
    return counted


async def check_accounts(doors: Doors, before: Counter[str]) -> None:
    """See that the server is well, has nothing left to do, and gave no answer that it should not have given.

    `before` is what it had given before the storm.

    Raises:
        Deviation: it is not so.
    """
    for _ in range(100):
        text = (await doors.http.get("/metrics")).text
        left = re.findall(r"^quintet_(?:queue_depth|in_flight)\S* (\S+)$", text, re.MULTILINE)
        if not any(map(float, left)):
            break
        # Who hung up last may still be on their way out.
        await asyncio.sleep(0.1)
    else:
        raise Deviation("requests are left in the house after all have been answered")
    odd = set(await answers_given(doors) - before) - ANSWERS
    if odd:
        raise Deviation(f"the server counted answers that nobody should have got: {sorted(odd)}")
    if (await doors.http.get("/readyz")).status_code != 200:
        raise Deviation("the server is no longer ready")


async def batch_sizes(doors: Doors) -> dict[str, dict[int, int]]:
    """How often a batch of each size ran, by model."""
    sizes: dict[str, dict[int, int]] = {}
    for stats in (await doors.http.get("/v2/models/stats")).json()["model_stats"]:
        of = sizes.setdefault(stats["name"], {})
        for batch in stats["batch_stats"]:
            size = batch["batch_size"]
            of[size] = of.get(size, 0) + batch["compute_infer"]["count"]
    return sizes


async def run(running: Running, times: int, chance: random.Random) -> None:
    """Storm a server so many times, and say how it went.

    Raises:
        Deviation: it did not go as it should.
    """
    addresses = f"{HOST}:{running.port}", f"{HOST}:{running.grpc_port}"
    async with Doors(*addresses) as doors:
        known = [await get_to_know(doors, room, INPUTS, chance) for room in await ready_rooms(doors)]
        for one in known:
            size = await share_a_batch(*addresses, one, chance)
            print(f"{one.room}: a batch of {size} held requests of both doors", flush=True)
        before = await answers_given(doors)
        total, started = Counter[tuple[str, str]](), time.monotonic()
        for number in range(1, times + 1):
            total += await storm(doors, known, chance)
            if number % 50 == 0 or number == times:
                minutes = (time.monotonic() - started) / 60
                print(f"{number} times {IN_FLIGHT} requests, {minutes:.1f} minutes", flush=True)
        await check_accounts(doors, before)
        for (door, fate), count in sorted(total.items()):
            print(f"{count:9,} {fate:9} {door}")
        for model, sizes in (await batch_sizes(doors)).items():
            together = sum(count for size, count in sizes.items() if size > 1)
            print(
                f"{model}: {together:,} of {sum(sizes.values()):,} batches above 1, the largest {max(sizes)}"
            )
            if not together:
                raise Deviation(f"{model}: no batch was larger than 1")


def main(arguments: Sequence[str]) -> int:
    """Start a server and storm it; 0 if all went as it should."""
    parser = proof.parser_of("storm", __doc__)
    parser.add_argument("--times", type=int, default=1000, help="(default %(default)s)")
    options = parser.parse_args(arguments)
    chance = random.Random(options.seed)
    return proof.carry_out(
        options,
        lambda running: asyncio.run(run(running, options.times, chance)),
        # However slow the machine, of no model is one input all that a batch may hold.
        batch_ms=1000,
    )
