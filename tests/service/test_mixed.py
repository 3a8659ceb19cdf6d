"""Requests of every kind in flight together, and batches that both doors share."""

import random

import httpx

from load_tests.mixed import GIVEN_UP, Doors, ready_models, storm
from tests.conftest import QuintetServer


async def test_right_broken_late_and_given_up_requests_go_their_own_ways(
    quintet_server: QuintetServer, http: httpx.Client
) -> None:
    doors = Doors(quintet_server.http_url, quintet_server.grpc_address)
    models = await ready_models(doors)
    chance = random.Random(0)
    for _ in range(3):
        counted = await storm(doors, models, chance)
        assert sum(counted.values()) == 200
        assert counted[GIVEN_UP]
    await doors.close()
    for model in models:
        assert http.get(f"/v2/models/{model}/ready").status_code == 200
    assert 'outcome="500"' not in http.get("/metrics").text
