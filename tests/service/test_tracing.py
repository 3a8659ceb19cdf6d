"""Traces as an OTLP receiver gets them: each request's parts, its batch, and the caller's own trace."""

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from service.proto import grpc_service_pb2 as pb
from tests.conftest import MODELS_FOLDER, ROOT, StartQuintet

from .knocking import GrpcClient, picture_request

PARTS = ["read", "queue", "decode", "run", "answer"]


class Receiver(ThreadingHTTPServer):
    """Takes spans as a collector does: OTLP over HTTP, in protobuf."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.spans: list[Any] = []
        self.services: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def named(self, name: str) -> list[Any]:
        return [span for span in self.spans if span.name == name]

    def parts_of(self, span: Any) -> list[Any]:
        """A span's children, as they began."""
        parts = [one for one in self.spans if one.parent_span_id == span.span_id]
        return sorted(parts, key=lambda one: (one.start_time_unix_nano, one.end_time_unix_nano))


class Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        assert self.path == "/v1/traces"
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            import gzip

            body = gzip.decompress(body)
        request = ExportTraceServiceRequest.FromString(body)
        for resource in request.resource_spans:
            attributes = {one.key: one.value.string_value for one in resource.resource.attributes}
            self.server.services.add(attributes["service.name"])
            for scope in resource.scope_spans:
                self.server.spans += scope.spans
        answer = ExportTraceServiceResponse().SerializeToString()
        self.send_response(200)
        self.send_header("content-type", "application/x-protobuf")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def receiving() -> Iterator[Receiver]:
    with Receiver() as receiver:
        thread = Thread(target=receiver.serve_forever, daemon=True)
        thread.start()
        try:
            yield receiver
        finally:
            receiver.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def digit_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(MODELS_FOLDER / "digit", folder / "digit")
    return folder


def attributes(span: Any) -> dict[str, Any]:
    return {one.key: one.value.string_value or one.value.int_value for one in span.attributes}


def trace_id(number: int) -> str:
    return f"{number:032x}"


def check_parts(receiver: Receiver, span: Any) -> Any:
    """Its parts follow each other and fill it; the batch that it ran in."""
    parts = receiver.parts_of(span)
    assert [part.name for part in parts] == PARTS
    moments = [span.start_time_unix_nano]
    for part in parts:
        assert part.trace_id == span.trace_id
        assert abs(part.start_time_unix_nano - moments[-1]) <= 1000
        moments.append(part.end_time_unix_nano)
    assert abs(moments[-1] - span.end_time_unix_nano) <= 1000
    assert moments == sorted(moments)
    (link,) = next(part for part in parts if part.name == "run").links
    (batch,) = [one for one in receiver.named("batch") if one.span_id == link.span_id]
    return batch


async def test_requests_that_share_a_batch_are_traced_apart_and_linked_to_it(
    start_quintet: StartQuintet, digit_only: Path, digit_png: bytes
) -> None:
    with receiving() as receiver:
        settings = {"trace_url": receiver.url, "batch_window_ms": 500, "workers": 1, "access_log_share": 1}
        with start_quintet(models=digit_only, **settings) as server:
            async with httpx.AsyncClient(base_url=server.http_url, trust_env=False, timeout=30) as client:
                asked = [
                    client.post(
                        "/digit",
                        content=digit_png,
                        headers={"traceparent": f"00-{trace_id(number)}-{number:016x}-01"},
                    )
                    for number in range(1, 5)
                ]
                answers = await asyncio.gather(*asked)
        # It sends what is left as it ends.
    assert receiver.services == {"quintet"}
    spans = receiver.named("POST /digit")
    assert sorted(span.trace_id.hex() for span in spans) == [trace_id(number) for number in range(1, 5)]
    batches = []
    for span in spans:
        # The caller's span is the parent.
        assert int(span.parent_span_id.hex(), 16) == int(span.trace_id.hex(), 16)
        assert attributes(span)["quintet.model"] == "digit"
        assert attributes(span)["quintet.outcome"] == "ok"
        batches.append(check_parts(receiver, span))
    (batch,) = {one.span_id: one for one in batches}.values()
    assert attributes(batch)["quintet.batch_size"] == 4
    assert {link.trace_id for link in batch.links} == {span.trace_id for span in spans}
    assert batch.trace_id not in {span.trace_id for span in spans}
    told = {answer.headers["traceresponse"] for answer in answers}
    assert told == {f"00-{span.trace_id.hex()}-{span.span_id.hex()}-01" for span in spans}
    # The log's lines name the trace that they belong to.
    lines = [json.loads(line) for line in server.log_text().splitlines() if '"event": "request"' in line]
    assert {line["trace_id"] for line in lines} == {span.trace_id.hex() for span in spans}
    assert not any(digit_png[:8].hex() in str(span) or "base64" in str(span) for span in receiver.spans)


def test_grpc_calls_are_traced_as_well(
    start_quintet: StartQuintet, digit_only: Path, digit_png: bytes
) -> None:
    heard: list[str] = []
    with (
        receiving() as receiver,
        start_quintet(models=digit_only, trace_url=receiver.url, workers=1) as server,
        GrpcClient(server.grpc_address) as client,
    ):
        metadata = (("traceparent", f"00-{trace_id(9)}-{9:016x}-01"),)
        infer = client.channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelInferResponse.FromString,
        )
        for request in (picture_request(digit_png), picture_request(b"no picture")):
            call = infer.future(request, timeout=30, metadata=metadata)
            call.exception()
            heard += [value for name, value in call.trailing_metadata() if name == "traceresponse"]
    right, wrong = receiver.named("ModelInfer")
    check_parts(receiver, right)
    assert attributes(right)["quintet.model"] == "digit"
    assert attributes(wrong)["quintet.outcome"] == "400"
    for span in (right, wrong):
        assert span.trace_id.hex() == trace_id(9)
        assert int(span.parent_span_id.hex(), 16) == 9
    assert heard == [f"00-{trace_id(9)}-{span.span_id.hex()}-01" for span in (right, wrong)]


async def test_what_goes_wrong_is_traced_too_under_names_of_our_own(
    start_quintet: StartQuintet, digit_only: Path, digit_png: bytes
) -> None:
    with (
        receiving() as receiver,
        start_quintet(models=digit_only, trace_url=receiver.url, workers=1) as server,
    ):
        async with httpx.AsyncClient(base_url=server.http_url, trust_env=False, timeout=30) as client:
            refused = await client.post("/digit", content=b"no picture")
            late = await client.post("/digit", content=digit_png, headers={"Quintet-Timeout-Ms": "0.001"})
            await client.post("/v2/models/strange-name/infer", json={})
            await client.get("/readyz")
            unwanted = {"traceparent": f"00-{trace_id(7)}-{7:016x}-00"}
            not_traced = await client.post("/digit", content=digit_png, headers=unwanted)
            nonsense = {"traceparent": "nonsense", "tracestate": b"\xff,,=,"}
            still = await client.post("/digit", content=digit_png, headers=nonsense)
    assert [answer.status_code for answer in (refused, late, not_traced, still)] == [400, 504, 200, 200]
    roots = [span for span in receiver.spans if span.name not in (*PARTS, "batch")]
    found = [(span.name, attributes(span)["quintet.outcome"], span.status.code) for span in roots]
    # 2 is OTLP's word for an error: only what is our fault.
    assert sorted(found) == [
        ("POST /digit", "400", 0),
        ("POST /digit", "504", 2),
        ("POST /digit", "ok", 0),
        ("POST /v2", "404", 0),
    ]
    assert "strange-name" not in str(receiver.spans)
    # Its caller did not want it, and hears that it was not.
    assert not_traced.headers["traceresponse"].split("-")[1::2] == [trace_id(7), "00"]


async def test_of_requests_that_nobody_decided_on_a_share_is_traced(
    start_quintet: StartQuintet, digit_only: Path, digit_png: bytes
) -> None:
    with (
        receiving() as receiver,
        start_quintet(models=digit_only, trace_url=receiver.url, trace_share=0, workers=1) as server,
    ):
        async with httpx.AsyncClient(base_url=server.http_url, trust_env=False, timeout=30) as client:
            for _ in range(20):
                await client.post("/digit", content=digit_png)
    assert receiver.spans == []


async def test_a_receiver_that_is_away_harms_nobody(
    start_quintet: StartQuintet, digit_only: Path, digit_png: bytes
) -> None:
    with receiving() as receiver:
        url = receiver.url
    with start_quintet(models=digit_only, trace_url=url, workers=1) as server:
        async with httpx.AsyncClient(base_url=server.http_url, trust_env=False, timeout=30) as client:
            answer = await client.post("/digit", content=digit_png)
            assert answer.status_code == 200
        server.terminate()
        assert await asyncio.to_thread(server.wait) == 0


def test_who_traces_nothing_loads_nothing_for_it() -> None:
    code = (
        "import sys, service.app; from service.settings import Settings; from service.app import House; "
        "house = House(Settings()); "
        "print('service.tracing' in sys.modules, type(house.rest).__name__, type(house._grpc).__name__)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout.strip()) == (0, "False RestDoor GrpcDoor"), ran.stderr
