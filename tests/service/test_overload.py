"""More than the service can take, and one bad request among many good ones."""

import asyncio
import contextlib
import re
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import httpx
import numpy as np
import psutil
import pytest

from service.proto import grpc_service_pb2 as pb
from tests.conftest import QuintetServer, StartQuintet

from .brittle import WHITE, write_brittle_model
from .knocking import (
    INFER,
    TOLERANCE,
    ask_alone,
    floats_in,
    http_client,
    infer_request,
    json_pixels,
    picture_request,
    probabilities_of,
)

Pngs = list[tuple[bytes, str]]
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Outcome:
    """How a request ended, whatever its door: in codes of HTTP."""

    status: int
    probabilities: list[float] | None = None
    retry_after: str | None = None
    sentence: str = ""


class HttpDoor:
    """Asks over HTTP, each request on a connection of its own."""

    def __init__(self, server: QuintetServer) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._client = httpx.AsyncClient(base_url=server.http_url, trust_env=False, timeout=30, limits=limits)

    async def picture(self, picture: bytes) -> Outcome:
        response = await self._client.post("/digit", content=picture)
        if response.status_code != 200:
            return self._refused(response)
        return Outcome(200, probabilities_of(response.json()["predictions"][0]))

    async def pixels(self, pixels: Pixels) -> Outcome:
        response = await self._client.post(INFER, json={"inputs": [json_pixels(pixels[np.newaxis])]})
        if response.status_code != 200:
            return self._refused(response)
        return Outcome(200, response.json()["outputs"][1]["data"])

    def _refused(self, response: httpx.Response) -> Outcome:
        body = response.json()
        sentence = body["detail"] if "detail" in body else body["error"]
        return Outcome(response.status_code, None, response.headers.get("retry-after"), sentence)

    async def close(self) -> None:
        await self._client.aclose()


class GrpcDoor:
    """Asks over gRPC, on one channel."""

    def __init__(self, server: QuintetServer) -> None:
        self._channel = grpc.aio.insecure_channel(server.grpc_address, [("grpc.enable_http_proxy", 0)])
        self.infer = self._channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelInferResponse.FromString,
        )

    async def picture(self, picture: bytes) -> Outcome:
        return await self._ask(picture_request(picture))

    async def pixels(self, pixels: Pixels) -> Outcome:
        return await self._ask(infer_request(pixels.tobytes()))

    async def _ask(self, request: Any) -> Outcome:
        try:
            response = await self.infer(request, timeout=30)
        except grpc.aio.AioRpcError as error:
            status = {"RESOURCE_EXHAUSTED": 429, "INVALID_ARGUMENT": 400, "INTERNAL": 500}[error.code().name]
            metadata = dict(error.trailing_metadata() or ())
            return Outcome(status, None, metadata.get("retry-after"), error.details())
        return Outcome(200, floats_in(response)[0].tolist())

    async def close(self) -> None:
        await self._channel.close()


Door = HttpDoor | GrpcDoor
OpenDoor = Callable[[QuintetServer], AbstractAsyncContextManager[Door]]


@pytest.fixture(params=[HttpDoor, GrpcDoor], ids=["over http", "over grpc"])
def open_door(request: pytest.FixtureRequest) -> OpenDoor:
    @asynccontextmanager
    async def open_at(server: QuintetServer) -> AsyncIterator[Door]:
        door = request.param(server)
        try:
            yield door
        finally:
            await door.close()

    return open_at


async def all_at_once(requests: Sequence[Awaitable[Outcome]]) -> tuple[list[Outcome], list[Outcome]]:
    """What each request got, in their order and in the order of arrival."""
    arrived: list[Outcome] = []

    async def note(request: Awaitable[Outcome]) -> Outcome:
        arrived.append(await request)
        return arrived[-1]

    return await asyncio.gather(*map(note, requests)), arrived


def check_each_has_its_own(outcomes: Sequence[Outcome], alone: Sequence[list[float]]) -> None:
    for outcome, expected in zip(outcomes, alone, strict=True):
        if outcome.status == 200:
            assert outcome.probabilities == pytest.approx(expected, abs=TOLERANCE)


@pytest.fixture(scope="module")
def alone(http: httpx.Client, digit_pngs: Pngs) -> list[list[float]]:
    """What each picture is answered with when it is alone."""
    return [ask_alone(http, picture) for picture, _ in digit_pngs]


# ---- a short queue ----

QUEUE = 8


@pytest.fixture(scope="module")
def short_queue(start_quintet: StartQuintet) -> Iterator[QuintetServer]:
    """Eight may wait, and they wait for a second: long enough for all that ask at once to come."""
    # Whatever the network takes, eight must fit into one batch: a full batch does not wait.
    settings = {"queue_size": QUEUE, "batch_window_ms": 1000, "inline_ms": 1000}
    with start_quintet(**settings, workers=1, drain_seconds=0) as server:
        yield server


async def test_what_does_not_fit_into_the_queue_is_refused_at_once(
    short_queue: QuintetServer, open_door: OpenDoor, digit_pngs: Pngs, alone: list[list[float]]
) -> None:
    async with open_door(short_queue) as door:
        outcomes, arrived = await all_at_once([door.picture(picture) for picture, _ in digit_pngs[:32]])
    assert {outcome.status for outcome in outcomes} == {200, 429}
    # Nobody is answered before the window is over, so whoever came before that was refused at once.
    assert arrived[0].status == 429
    assert sum(outcome.status == 200 for outcome in outcomes) >= QUEUE
    for outcome in outcomes:
        if outcome.status == 429:
            assert int(outcome.retry_after or 0) >= 1
            assert "full" in outcome.sentence
    check_each_has_its_own(outcomes, alone[:32])


async def test_one_request_larger_than_the_queue_is_refused(
    short_queue: QuintetServer, digit_pngs: Pngs
) -> None:
    async with httpx.AsyncClient(base_url=short_queue.http_url, trust_env=False) as client:
        files = [("images", ("digit.png", picture)) for picture, _ in digit_pngs[: QUEUE + 1]]
        response = await client.post("/digit", files=files)
    assert response.status_code == 429
    assert response.headers["retry-after"]


async def test_callers_who_leave_make_room(
    short_queue: QuintetServer, digit_pngs: Pngs, alone: list[list[float]]
) -> None:
    door = GrpcDoor(short_queue)
    pictures = [picture for picture, _ in digit_pngs[:QUEUE]]
    waiting = [door.infer(picture_request(picture)) for picture in pictures]
    async with asyncio.timeout(30):
        with http_client(short_queue) as client:
            while "quintet_queue_depth{" not in (text := client.get("/metrics").text) or (
                metric(text, 'quintet_queue_depth{model="digit"}') < QUEUE
            ):
                await asyncio.sleep(0.01)
            answered = 'quintet_requests_total{model="digit"'
            before = sum_of(text, answered)
            for call in waiting:
                call.cancel()
            while metric(client.get("/metrics").text, "quintet_in_flight"):
                await asyncio.sleep(0.01)
            # Nobody got an answer, so none is counted.
            assert sum_of(client.get("/metrics").text, answered) == before
    outcomes, _ = await all_at_once([door.picture(picture) for picture in pictures])
    assert [outcome.status for outcome in outcomes] == [200] * QUEUE
    check_each_has_its_own(outcomes, alone[:QUEUE])
    await door.close()


async def test_the_queue_is_empty_when_everybody_is_answered(short_queue: QuintetServer) -> None:
    with http_client(short_queue) as client:
        text = client.get("/metrics").text
    assert metric(text, 'quintet_queue_depth{model="digit"}') == 0
    assert metric(text, "quintet_in_flight") == 0
    assert metric(text, 'quintet_rejected_total{reason="queue_full"}') > 0


def metric(text: str, series: str) -> float:
    (line,) = [line for line in text.splitlines() if line.startswith(f"{series} ")]
    return float(line.split()[-1])


def sum_of(text: str, start: str) -> float:
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(start))


# ---- few requests, little memory ----

REQUESTS = 4
BUFFERED = 300_000


@pytest.fixture(scope="module")
def small_house(start_quintet: StartQuintet) -> Iterator[QuintetServer]:
    """Few requests may be under way, and they may hold few bytes."""
    with start_quintet(
        max_requests=REQUESTS,
        max_buffered_bytes=BUFFERED,
        batch_window_ms=1000,
        inline_ms=1000,
        workers=1,
        drain_seconds=0,
    ) as server:
        yield server


async def test_more_requests_than_may_be_under_way_are_refused_at_once(
    small_house: QuintetServer, open_door: OpenDoor, digit_pngs: Pngs, alone: list[list[float]]
) -> None:
    async with open_door(small_house) as door:
        outcomes, arrived = await all_at_once([door.picture(picture) for picture, _ in digit_pngs[:32]])
    assert {outcome.status for outcome in outcomes} == {200, 429}
    assert arrived[0].status == 429
    assert sum(outcome.status == 200 for outcome in outcomes) >= REQUESTS
    if isinstance(door, HttpDoor):
        assert all(outcome.retry_after for outcome in outcomes if outcome.status == 429)
    check_each_has_its_own(outcomes, alone[:32])


async def test_a_full_house_still_answers_its_operators(small_house: QuintetServer, digit_pngs: Pngs) -> None:
    door = HttpDoor(small_house)
    asking = asyncio.gather(*(door.picture(picture) for picture, _ in digit_pngs[:REQUESTS]))
    async with httpx.AsyncClient(base_url=small_house.http_url, trust_env=False) as client:
        while metric((await client.get("/metrics")).text, "quintet_in_flight") < REQUESTS:
            assert not asking.done()
        for path in ("/livez", "/readyz"):
            assert (await client.get(path)).status_code == 200
    await asking
    await door.close()


def test_more_bytes_than_the_house_holds_are_refused_and_forgotten(
    small_house: QuintetServer, digit_png: bytes
) -> None:
    with http_client(small_house) as client:
        # More than once: what is refused must not stay counted.
        for _ in range(3):
            response = client.post("/digit", content=bytes(BUFFERED + 1))
            assert response.status_code == 429
            assert response.headers["retry-after"]
            assert client.post("/digit", content=bytes(BUFFERED - 1)).status_code == 400
        assert client.post("/digit", content=digit_png).status_code == 200


def test_nobody_works_for_callers_who_hung_up(small_house: QuintetServer, digit_png: bytes) -> None:
    with http_client(small_house) as client:

        def inferences() -> float:
            return sum_of(client.get("/metrics").text, 'quintet_inferences_total{model="digit"')

        assert client.post("/digit", content=digit_png).status_code == 200
        before = inferences()
        for _ in range(2):
            # Shorter than the window in which the batch waits for company.
            with pytest.raises(httpx.ReadTimeout):
                client.post("/digit", content=digit_png, timeout=0.2)
        give_up = time.monotonic() + 30
        while metric(client.get("/metrics").text, "quintet_in_flight"):
            assert time.monotonic() < give_up, "they still count as under way"
        assert client.post("/digit", content=digit_png).status_code == 200
        assert inferences() == before + 1


# ---- one bad one among good ones ----


@pytest.fixture(scope="module")
def brittle(start_quintet: StartQuintet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[QuintetServer]:
    """A service whose network fails on a white first pixel, and whose window puts requests together."""
    models = tmp_path_factory.mktemp("models")
    write_brittle_model(models)
    with start_quintet(models=models, batch_window_ms=300, workers=1, drain_seconds=0) as server:
        yield server


async def test_one_unreadable_picture_among_many_fails_alone(
    quintet_server: QuintetServer, open_door: OpenDoor, digit_pngs: Pngs, alone: list[list[float]]
) -> None:
    pictures = [picture for picture, _ in digit_pngs[:32]]
    pictures[17] = b"not a picture"
    async with open_door(quintet_server) as door:
        for _ in range(3):
            outcomes, _ = await all_at_once([door.picture(picture) for picture in pictures])
            assert [outcome.status for outcome in outcomes] == [200] * 17 + [400] + [200] * 14
            check_each_has_its_own(outcomes, alone[:32])


async def test_one_sample_that_the_network_fails_on_fails_alone_and_the_log_knows_it(
    brittle: QuintetServer, open_door: OpenDoor
) -> None:
    chance = np.random.default_rng(0)
    several = chance.integers(0, WHITE, (32, 28, 28), np.uint8)
    async with open_door(brittle) as door:
        expected = [(await all_at_once([door.pixels(pixels)]))[0][0].probabilities for pixels in several[:3]]
        poisoned = several.copy()
        poisoned[17, 0, 0] = WHITE
        outcomes, _ = await all_at_once([door.pixels(pixels) for pixels in poisoned])
    assert [outcome.status for outcome in outcomes] == [200] * 17 + [500] + [200] * 14
    for outcome, probabilities in zip(outcomes, expected, strict=False):
        assert outcome.probabilities == pytest.approx(probabilities, abs=TOLERANCE)
    found = re.search(r"id ([0-9a-f]+)", outcomes[17].sentence)
    assert found
    assert f'"id": "{found[1]}"' in brittle.log_text()
    assert "Gather" not in outcomes[17].sentence


def test_many_inputs_of_one_request_run_in_one_batch(brittle: QuintetServer) -> None:
    """Or the test before would not have shown that neighbours in a batch are spared."""
    pixels = np.zeros((32, 28, 28), np.uint8)
    with http_client(brittle) as client:
        before = metric(client.get("/metrics").text, 'quintet_batch_size_count{model="digit",version="1"}')
        assert client.post(INFER, json={"inputs": [json_pixels(pixels)]}).status_code == 200
        after = metric(client.get("/metrics").text, 'quintet_batch_size_count{model="digit",version="1"}')
    assert after - before == 1


def test_the_sample_at_fault_in_a_request_of_several_is_named(brittle: QuintetServer) -> None:
    pixels = np.zeros((5, 28, 28), np.uint8)
    pixels[3, 0, 0] = WHITE
    request = infer_request(pixels.tobytes(), shape=pixels.shape)
    with grpc.insecure_channel(brittle.grpc_address, [("grpc.enable_http_proxy", 0)]) as channel:
        infer = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelInferResponse.FromString,
        )
        with pytest.raises(grpc.RpcError) as raised:
            infer(request, timeout=30)
    assert raised.value.code() is grpc.StatusCode.INTERNAL
    assert dict(raised.value.trailing_metadata())["index"] == "3"


def test_a_burst_of_connections_is_spread_over_the_workers(quintet_server: QuintetServer) -> None:
    with contextlib.ExitStack() as open_connections:
        for _ in range(64):
            address = ("127.0.0.1", quintet_server.http_port)
            connection = open_connections.enter_context(socket.create_connection(address))
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: quintet\r\n\r\n")
            assert connection.recv(1024).startswith(b"HTTP/1.1 200")
        held = [
            sum(
                each.status == psutil.CONN_ESTABLISHED and each.laddr.port == quintet_server.http_port
                for each in worker.net_connections()
            )
            for worker in quintet_server.workers()
        ]
    assert sum(held) >= 64
    # The kernel throws a coin for each: fewer than 10 of 64 is a matter of one in a billion.
    assert min(held) >= 10
