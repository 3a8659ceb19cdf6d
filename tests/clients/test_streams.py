"""Many inputs: in order, a bounded number at a time, and through the service's end and return."""

import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from quintet_client import AsyncClient, BadInput, Client, Unavailable

from tests.conftest import StartQuintet

from .stand_in import BUSY, GOOD, STARTING, HttpStandIn, Reply

KINDS = pytest.mark.parametrize("kind", [Client, AsyncClient], ids=["blocking", "async"])


async def stream(kind: type, url: str, verb: str, inputs: Any, **options: Any) -> list[Any]:
    """All answers of a stream; `client` holds the client's own options."""
    own = options.pop("client", {})
    if kind is Client:
        with Client(url, **own) as quintet:
            return list(getattr(quintet, verb)(inputs, **options))
    async with AsyncClient(url, **own) as quintet:
        return [answer async for answer in getattr(quintet, verb)(inputs, **options)]


@KINDS
async def test_a_stream_answers_in_order(kind: type, url: str, digit_pngs: Any) -> None:
    pictures = [picture for picture, _ in digit_pngs]
    with Client(url) as quintet:
        listed = quintet.digit(pictures)
    assert len(listed) == 100  # more than go into one request
    assert await stream(kind, url, "digit", iter(pictures)) == listed
    assert sum(answer.label == label for answer, (_, label) in zip(listed, digit_pngs, strict=True)) >= 95


@pytest.mark.parametrize(("kind", "door"), [(Client, "http"), (AsyncClient, "grpc")])
async def test_a_thousand_inputs_survive_a_killed_service(
    kind: type, door: str, start_quintet: StartQuintet, digit_pngs: Any
) -> None:
    pictures = [picture for picture, _ in digit_pngs]
    with start_quintet(workers=1) as server:
        url = server.http_url if door == "http" else server.grpc_url
        with Client(url) as quintet:
            right = [answer.label for answer in quintet.digit(pictures)] * 10

        def inputs() -> Iterator[bytes]:
            for index, picture in enumerate(pictures * 10):
                if index == 500:
                    server.kill()
                    threading.Timer(1.0, server.launch_again).start()
                yield picture

        answers = await stream(kind, url, "digit", inputs(), client={"outage": 120})
        assert [answer.label for answer in answers] == right
        server.wait_until_ready()


@KINDS
async def test_no_more_are_under_way_than_allowed(kind: type) -> None:
    taken = 0

    def texts() -> Iterator[str]:
        nonlocal taken
        for number in range(20):
            taken += 1
            yield str(number)

    with HttpStandIn([Reply(delay=0.05)]) as server:
        if kind is Client:
            with Client(server.url, in_flight=3) as quintet:
                answers = quintet.sentiment(texts())
                next(answers)
                assert taken <= 4
                assert len(list(answers)) == 19
        else:
            async with AsyncClient(server.url, in_flight=3) as quintet:
                coming = quintet.sentiment(texts())
                await anext(coming)
                assert taken <= 4
                assert len([answer async for answer in coming]) == 19
        assert server.most_at_once <= 3


@KINDS
async def test_a_stream_waits_out_refusals(kind: type) -> None:
    refusals = [BUSY, STARTING] * 2  # more than a single question would bear
    with HttpStandIn([*refusals, GOOD]) as server:
        answers = await stream(kind, server.url, "sentiment", iter(["loved it"]), client={"retries": 0})
    assert [answer.label for answer in answers] == ["positive"]


@KINDS
async def test_a_stream_gives_up_when_the_outage_is_long(kind: type) -> None:
    started = time.monotonic()
    with HttpStandIn([STARTING]) as server, pytest.raises(Unavailable, match="starting"):
        await stream(
            kind, server.url, "sentiment", iter(["loved it"] * 50), client={"outage": 0.5, "timeout": 0.5}
        )
    assert time.monotonic() - started < 3


@KINDS
async def test_a_silent_service_is_asked_again(kind: type) -> None:
    with HttpStandIn([Reply(delay=1.0), GOOD]) as server:
        answers = await stream(kind, server.url, "sentiment", iter(["loved it"]), client={"timeout": 0.3})
        assert len(answers) == 1


@KINDS
async def test_a_bad_input_is_named_by_its_place(kind: type, url: str, digit_png: bytes) -> None:
    seen = []

    async def listen() -> None:
        given = iter([digit_png] * 5 + [b"no picture" * 20] + [digit_png] * 5)
        if kind is Client:
            with Client(url) as quintet:
                seen.extend(answer.label for answer in quintet.digit(given))
        else:
            async with AsyncClient(url) as quintet:
                async for answer in quintet.digit(given):
                    seen.append(answer.label)  # noqa: PERF401 - what was seen before the error counts

    with pytest.raises(BadInput, match="picture") as caught:
        await listen()
    assert caught.value.index == len(seen) == 5


async def test_a_bad_input_of_a_long_list_is_named_by_its_place(ask: Any, url: str, digit_png: bytes) -> None:
    with pytest.raises(BadInput) as caught:
        await ask(url, "digit", [digit_png] * 70 + [b"no picture" * 20])
    assert caught.value.index == 70


@KINDS
async def test_a_missing_file_ends_the_stream(kind: type, url: str, digit_png: bytes, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await stream(kind, url, "digit", iter([digit_png, tmp_path / "missing.png"]))


@KINDS
async def test_what_the_iterator_raises_is_raised(kind: type) -> None:
    def texts() -> Iterator[str]:
        yield "loved it"
        raise LookupError("the film is lost")

    with HttpStandIn([GOOD]) as server, pytest.raises(LookupError, match="lost"):
        await stream(kind, server.url, "sentiment", texts())


async def test_an_asynchronous_iterator_is_streamed_too() -> None:
    async def texts() -> AsyncIterator[str]:
        for text in ("loved it", "adored it"):
            yield text

    with HttpStandIn([GOOD]) as server:
        assert len(await stream(AsyncClient, server.url, "sentiment", texts())) == 2


async def test_who_has_enough_may_leave() -> None:
    endless = iter(lambda: "loved it", None)
    with HttpStandIn([GOOD]) as server:
        with Client(server.url) as quintet:
            for _, _ in zip(range(3), quintet.sentiment(endless), strict=False):
                pass
        async with AsyncClient(server.url) as patient:
            seen = 0
            async for _ in patient.sentiment(endless):
                seen += 1
                if seen == 3:
                    break


@KINDS
async def test_a_bar_shows_how_far_it_is(kind: type, capfd: pytest.CaptureFixture[str]) -> None:
    with HttpStandIn([GOOD]) as server:
        await stream(kind, server.url, "sentiment", iter(["loved it"] * 3), progress=True)
    out, bar = capfd.readouterr()
    assert out == ""
    assert "sentiment" in bar
    assert "3/" in bar


async def test_every_answer_knows_how_long_it_took(ask: Any) -> None:
    with HttpStandIn([Reply(delay=0.2)]) as server:
        answer = await ask(server.url, "sentiment", "loved it")
    assert 0.2 <= answer.seconds < 2


async def test_a_call_may_have_its_own_time_limit(ask: Any, stand_in: Any) -> None:
    with stand_in([Reply(delay=0.6)]) as server:
        assert (await ask(server.url, "sentiment", "loved it", timeout=5, client={"timeout": 0.1})).label
