"""When a client tries again, when it gives up, and what it raises then."""

import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
import quintet_client
from quintet_client import (
    BadInput,
    Client,
    DeadlineExceeded,
    Forbidden,
    NotFound,
    Overloaded,
    QuintetError,
    ServerError,
    TooLarge,
    Unauthenticated,
    Unavailable,
)

from load_tests.servers import free_ports

from .conftest import Ask
from .stand_in import BUSY, GOOD, STARTING, GrpcStandIn, HttpStandIn, Reply


@pytest.mark.parametrize("refusal", [BUSY, STARTING], ids=["busy", "starting"])
async def test_a_refusal_that_passes_is_tried_again(ask: Ask, stand_in: Any, refusal: Reply) -> None:
    with stand_in([refusal, refusal, GOOD]) as server:
        assert (await ask(server.url, "sentiment", "loved it")).label == "positive"
    assert len(server.requests) == 3


async def test_a_wait_is_no_shorter_than_the_service_asks(ask: Ask, stand_in: Any) -> None:
    patient = Reply(429, "RESOURCE_EXHAUSTED", "The queue is full.", retry_after="1")
    with stand_in([patient, GOOD]) as server:
        await ask(server.url, "sentiment", "loved it")
    first, second = server.requests
    assert 1.0 <= second.moment - first.moment < 2.0


async def test_a_wait_that_ends_too_late_is_not_begun(ask: Ask, stand_in: Any) -> None:
    far = Reply(503, "UNAVAILABLE", "The service is draining.", retry_after="30")
    started = time.monotonic()
    with stand_in([far, GOOD]) as server, pytest.raises(Unavailable, match="draining") as caught:
        await ask(server.url, "sentiment", "loved it", client={"timeout": 5})
    assert time.monotonic() - started < 4
    assert caught.value.retry_after == 30
    assert len(server.requests) == 1


async def test_patience_ends_with_the_retries(ask: Ask, stand_in: Any) -> None:
    with stand_in([BUSY]) as server, pytest.raises(Overloaded, match="The queue is full"):
        await ask(server.url, "sentiment", "loved it", client={"retries": 2})
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("refusal", "error"),
    [
        pytest.param(Reply(400, "INVALID_ARGUMENT", "No.", index=3), BadInput, id="bad-input"),
        pytest.param(Reply(401, "UNAUTHENTICATED", "No."), Unauthenticated, id="no-key"),
        pytest.param(Reply(403, "PERMISSION_DENIED", "No."), Forbidden, id="wrong-key"),
        pytest.param(Reply(404, "NOT_FOUND", "No."), NotFound, id="no-such-model"),
        pytest.param(Reply(413, "RESOURCE_EXHAUSTED", "No."), TooLarge, id="too-large"),
        pytest.param(Reply(500, "INTERNAL", "No."), ServerError, id="their-fault"),
        pytest.param(Reply(504, "DEADLINE_EXCEEDED", "No."), DeadlineExceeded, id="too-late"),
        pytest.param(Reply(418, "DATA_LOSS", "No."), ServerError, id="unheard-of"),
    ],
)
async def test_what_will_not_pass_is_raised_at_once(
    ask: Ask, stand_in: Any, refusal: Reply, error: type[QuintetError]
) -> None:
    with stand_in([refusal, GOOD]) as server, pytest.raises(QuintetError, match="No") as caught:
        await ask(server.url, "sentiment", "loved it")
    assert type(caught.value) is error
    assert caught.value.index == refusal.index
    assert len(server.requests) == 1


async def test_a_late_answer_is_not_waited_for(ask: Ask, stand_in: Any) -> None:
    with stand_in([Reply(delay=1.5)]) as server:
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            await ask(server.url, "sentiment", "loved it", client={"timeout": 0.3})
        assert time.monotonic() - started < 1.2
    assert len(server.requests) == 1


async def test_an_answer_that_comes_in_drops_is_not_waited_for_either(ask: Ask) -> None:
    with HttpStandIn([Reply(pause=0.1)]) as server:
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            await ask(server.url, "sentiment", "loved it", client={"timeout": 0.5})
        assert time.monotonic() - started < 1.5


async def test_a_wait_may_be_asked_for_by_date(ask: Ask) -> None:
    moment = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    busy = Reply(429, "RESOURCE_EXHAUSTED", "The queue is full.", retry_after=moment)
    with HttpStandIn([busy, GOOD]) as server, pytest.raises(Overloaded) as caught:
        await ask(server.url, "sentiment", "loved it")
    assert caught.value.retry_after == pytest.approx(60, abs=5)


async def test_the_service_is_told_how_long_the_caller_waits(ask: Ask) -> None:
    with HttpStandIn([GOOD]) as server:
        await ask(server.url, "sentiment", "loved it", client={"timeout": 2})
    assert 1000 < int(server.requests[0].headers["quintet-timeout-ms"]) <= 2000


@pytest.mark.parametrize("scheme", ["http", "grpc"])
async def test_nobody_there_is_unavailable(ask: Ask, scheme: str) -> None:
    (port,) = free_ports(1)
    url = f"{scheme}://127.0.0.1:{port}"
    with pytest.raises(Unavailable):
        await ask(url, "sentiment", "loved it", client={"retries": 1})
    assert await ask(url, "is_ready") is False


async def test_a_connection_that_breaks_off_is_made_again(ask: Ask) -> None:
    with HttpStandIn([Reply(is_lost=True), GOOD]) as server:
        assert (await ask(server.url, "sentiment", "loved it")).label == "positive"
    assert len(server.requests) == 2


async def test_a_service_that_is_starting_is_not_ready(ask: Ask, stand_in: Any) -> None:
    with stand_in([STARTING, GOOD]) as server:
        assert await ask(server.url, "is_ready") is False
        assert await ask(server.url, "is_ready") is True


async def test_the_key_and_the_headers_go_along(ask: Ask, stand_in: Any) -> None:
    with stand_in([GOOD]) as server:
        await ask(
            server.url, "sentiment", "loved it", client={"key": "secret", "headers": {"X-Team": "blue"}}
        )
    headers = server.requests[0].headers
    assert headers["authorization"] == "Bearer secret"
    assert headers["x-team"] == "blue"


@pytest.mark.parametrize(
    "body", [b"<html>", b"{}", b"[]", b'{"model": "m", "version": "1", "predictions": [{}]}', b'"text"']
)
async def test_an_answer_that_makes_no_sense_is_the_servers_fault(ask: Ask, body: bytes) -> None:
    with HttpStandIn([GOOD], body=body) as server, pytest.raises(ServerError):
        await ask(server.url, "sentiment", "loved it")


async def test_tensors_that_make_no_sense_are_the_servers_fault(ask: Ask) -> None:
    response = GrpcStandIn([GOOD]).response
    response.outputs[1].shape[:] = [1, 3]
    with GrpcStandIn([GOOD], response) as server, pytest.raises(ServerError):
        await ask(server.url, "sentiment", "loved it")


async def test_too_few_results_are_the_servers_fault(ask: Ask, stand_in: Any) -> None:
    with stand_in([GOOD]) as server, pytest.raises(ServerError, match="1 results for 2 inputs"):
        await ask(server.url, "sentiment", ["loved it", "hated it"])


async def test_a_proxys_page_is_named_by_its_status(ask: Ask) -> None:
    with HttpStandIn([Reply(502)]) as server, pytest.raises(ServerError, match="502"):
        await ask(server.url, "sentiment", "loved it")


def test_every_error_is_of_one_family() -> None:
    public = [
        value for name in quintet_client.__all__ if isinstance(value := getattr(quintet_client, name), type)
    ]
    errors = [value for value in public if issubclass(value, Exception)]
    assert len(errors) == 12
    assert all(issubclass(error, QuintetError) for error in errors)


@pytest.mark.parametrize("url", ["localhost:3000", "ftp://host", "http://", "", "grpc://host:notaport"])
def test_an_address_of_another_kind_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"address|[Pp]ort"):
        Client(url)
