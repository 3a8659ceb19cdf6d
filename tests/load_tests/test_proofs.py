"""The proofs themselves: a short form of each against the shared service, and none that cannot fail."""

import random
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from load_tests import fuzz, schema, soak, storm
from load_tests.doors import Doors, Known, get_to_know, is_close, ready_rooms
from load_tests.proof import Deviation, check_flat
from tests.conftest import MODELS_FOLDER, ROOT, SHIPPED, QuintetServer


@pytest.fixture
async def doors(quintet_server: QuintetServer) -> AsyncIterator[Doors]:
    async with Doors(quintet_server.http_address, quintet_server.grpc_address) as doors:
        yield doors


@pytest.fixture
async def known(doors: Doors) -> list[Known]:
    chance = random.Random(0)
    return [await get_to_know(doors, room, 10, chance) for room in await ready_rooms(doors)]


async def test_in_a_storm_all_requests_go_their_own_ways(doors: Doors, known: Sequence[Known]) -> None:
    chance, before = random.Random(0), await storm.answers_given(doors)
    for _ in range(3):
        counted = await storm.storm(doors, known, chance)
        assert counted.total() == storm.IN_FLIGHT
        assert {fate for _, fate in counted} == set(storm.FATES)
    await storm.check_accounts(doors, before)


async def test_an_answer_that_no_storm_should_get_is_noticed(doors: Doors) -> None:
    before = await storm.answers_given(doors)
    await doors.http.get("/digit")
    with pytest.raises(Deviation, match="405"):
        await storm.check_accounts(doors, before)


async def test_an_answer_that_is_another_inputs_is_noticed(doors: Doors, known: Sequence[Known]) -> None:
    mistaken = [
        replace(one, for_people=one.for_people[::-1], for_machines=one.for_machines[::-1]) for one in known
    ]
    with pytest.raises(Deviation, match=r"right|hurried"):
        await storm.storm(doors, mistaken, random.Random(0))


async def test_a_soak_asks_on_time_and_every_answer_is_right(doors: Doors, known: Sequence[Known]) -> None:
    chance = random.Random(0)
    assert await soak.capacity(doors, known, chance, seconds=0.5) > 0
    looks: list[int] = []
    asked = await soak.soak(doors, known, chance, rate=10, seconds=3, look=lambda: looks.append(1))
    assert asked == 30
    assert looks


# What does not ship answers 503, as described; the next two allow no 5xx.
@pytest.mark.room("sentiment")
def test_nonsense_is_refused_and_never_the_services_fault(quintet_server: QuintetServer) -> None:
    ports = quintet_server.http_port, quintet_server.grpc_port
    counted = fuzz.throw(*ports, random.Random(0), seconds=10, look=lambda: None)
    assert counted["HTTP 400"] > 0
    assert counted["INVALID_ARGUMENT"] > 0


@pytest.mark.room("sentiment")
def test_the_service_and_its_description_agree(quintet_server: QuintetServer) -> None:
    schema.compare(quintet_server.http_port, seconds=20, seed=0)


def test_a_proof_starts_a_server_of_its_own_and_ends_well() -> None:
    options = ["--times", "3", "--workers", "1", "--models", str(MODELS_FOLDER)]
    command = [sys.executable, "-m", "load_tests", "storm", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for model in SHIPPED:
        assert re.search(rf"^{model}: a batch of \d+ held requests of both doors$", done.stdout, re.MULTILINE)
    assert done.stdout.splitlines()[-1] == "All as it should be."


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        pytest.param({"confidence": 0.5}, {"confidence": 0.5009}, True, id="within the tolerance"),
        pytest.param({"confidence": 0.5}, {"confidence": 0.5011}, False, id="beyond the tolerance"),
        pytest.param({"label": "7"}, {"label": "1"}, False, id="another label"),
        pytest.param([1.0], [1.0, 1.0], False, id="an answer too many"),
        pytest.param({"label": "7"}, {}, False, id="a field too few"),
        pytest.param(np.uint8([0, 255]), np.uint8([1, 254]), True, id="pixels within a level"),
        pytest.param(np.uint8([0, 255]), np.uint8([255, 255]), False, id="pixels beyond a level"),
        pytest.param(np.float32([0.5]), np.float32([0.502]), False, id="tensors beyond the tolerance"),
    ],
)
def test_answers_are_compared_by_what_they_say(one: Any, other: Any, expected: bool) -> None:
    assert is_close(one, other) is expected


def test_memory_that_grows_is_told_from_memory_that_warms_up() -> None:
    check_flat([50, 90, *[100] * 10, 104])
    with pytest.raises(Deviation, match=r"6\.0%"):
        check_flat([*[100] * 10, 106])
