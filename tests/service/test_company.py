"""An answer does not depend on what it was batched with, at any door, through the real service."""

import asyncio
import random
from collections.abc import Iterator

import pytest

from load_tests.doors import DOORS, Doors, get_to_know
from service.models.spec import Room
from tests.conftest import SHIPPED, QuintetServer, StartQuintet

INPUTS = 200
MOST_IN_A_REQUEST = 8


@pytest.fixture(scope="module")
def server(start_quintet: StartQuintet) -> Iterator[QuintetServer]:
    """However slow the machine, of no model is one input all that a batch may hold."""
    with start_quintet(inline_ms=0, batch_ms=1000, drain_seconds=0) as quintet:
        yield quintet


@pytest.mark.parametrize("room", SHIPPED.values(), ids=str)
async def test_two_hundred_inputs_are_answered_alone_as_they_are_in_random_batches(
    server: QuintetServer, room: Room
) -> None:
    chance = random.Random(0)
    async with Doors(server.http_address, server.grpc_address) as doors:
        known = await get_to_know(doors, room, INPUTS, chance)
        parcels = [(chance.choice(DOORS), places) for places in known.parcels(chance, MOST_IN_A_REQUEST)]
        asking = [
            doors.ask(door, room, [known.inputs[place] for place in places]) for door, places in parcels
        ]
        outcomes = await asyncio.gather(*asking)
    assert sorted(place for _, places in parcels for place in places) == list(range(INPUTS))
    for (door, places), outcome in zip(parcels, outcomes, strict=True):
        assert known.is_right(door, places, outcome), f"{door}, {places}: {outcome}"
    # More than a request brought: strangers ran together.
    assert max(outcome.batch_size for outcome in outcomes) > 1
