"""Little real servers that answer as they are told: what no healthy service does on demand.

One list of replies serves for both protocols, so each test of patience is told once.
"""

import json
import ssl
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import grpc
from quintet_client import grpc_service_pb2 as messages


@dataclass(frozen=True)
class Reply:
    """What to answer; a refusal where `status` is not 200. The default: a text is positive."""

    status: int = 200
    code: str = "OK"
    detail: str = ""
    retry_after: str | None = None
    index: int | None = None
    delay: float = 0.0
    is_lost: bool = False  # HTTP: hang up instead of answering
    pause: float = 0.0  # HTTP: seconds between one byte of the body and the next


BUSY = Reply(429, "RESOURCE_EXHAUSTED", "The queue is full.", retry_after="0")
STARTING = Reply(503, "UNAVAILABLE", "The service is starting.", retry_after="0")
GOOD = Reply()


@dataclass(frozen=True)
class Request:
    """What arrived: `place` is a path or a method, `headers` have lower-case names."""

    place: str
    headers: dict[str, str]
    body: Any
    moment: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Certificate:
    """PEM files of a certificate for `localhost`, signed by itself, and of its key."""

    path: Path
    key_path: Path


class StandIn:
    """Gives `replies` one after the other, the last one for ever; keeps the requests."""

    def __init__(self, replies: Sequence[Reply], certificate: Certificate | None = None) -> None:
        self._replies = list(replies)
        self._certificate = certificate
        self.requests: list[Request] = []
        self.most_at_once = 0
        self.url = ""
        self._at_once = 0
        self._lock = threading.Lock()

    def next_reply(self, request: Request) -> Reply:
        with self._lock:
            self.requests.append(request)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            reply = self._replies.pop(0) if len(self._replies) > 1 else self._replies[0]
        time.sleep(reply.delay)
        with self._lock:
            self._at_once -= 1
        return reply

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...


class HttpStandIn(StandIn):
    """Speaks the REST for people; `body` answers a success with other bytes than usual."""

    def __init__(
        self, replies: Sequence[Reply], body: bytes | None = None, certificate: Certificate | None = None
    ) -> None:
        super().__init__(replies, certificate)
        prediction = {
            "label": "positive",
            "confidence": 0.75,
            "probabilities": {"negative": 0.25, "positive": 0.75},
        }
        answer = {"model": "sentiment", "version": "1", "predictions": [prediction]}
        self.body = json.dumps(answer).encode() if body is None else body

    def __enter__(self) -> Self:
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                headers = {name.lower(): value for name, value in self.headers.items()}
                reply = stand_in.next_reply(Request(self.path, headers, body))
                try:
                    self._answer(reply)
                except ConnectionError:  # the caller has left, as some tests want
                    self.close_connection = True

            do_GET = do_POST

            def _answer(self, reply: Reply) -> None:
                if reply.is_lost:
                    raise ConnectionAbortedError
                body = stand_in.body
                self.send_response(reply.status)
                if reply.status != 200:
                    problem = {"status": reply.status, "detail": reply.detail, "index": reply.index}
                    given = {name: value for name, value in problem.items() if value is not None}
                    body = json.dumps(given).encode() if reply.detail else b"<html>Bad gateway</html>"
                if reply.retry_after is not None:
                    self.send_header("Retry-After", reply.retry_after)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                for start in range(0, len(body), 1 if reply.pause else len(body)):
                    self.wfile.write(body[start : start + 1] if reply.pause else body)
                    time.sleep(reply.pause)

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        if self._certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self._certificate.path, self._certificate.key_path)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
            self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
            self.url = f"https://localhost:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class GrpcStandIn(StandIn):
    """Speaks the Open Inference Protocol; `response` answers a success with another tensor than usual."""

    def __init__(
        self,
        replies: Sequence[Reply],
        response: Any = None,
        labels: Sequence[str] = (),
        certificate: Certificate | None = None,
    ) -> None:
        super().__init__(replies, certificate)
        self.response = response
        self.labels = list(labels or ("negative", "positive"))
        if response is None:
            # Values in typed fields: the protocol allows it, and our own service sends them raw.
            self.response = messages.ModelInferResponse(model_name="sentiment", model_version="1")
            label = self.response.outputs.add(name="label", datatype="BYTES", shape=[1])
            label.contents.bytes_contents.append(b"positive")
            probabilities = self.response.outputs.add(name="probabilities", datatype="FP32", shape=[1, 2])
            probabilities.contents.fp32_contents.extend([0.25, 0.75])

    def __enter__(self) -> Self:
        handlers = {
            "ModelInfer": (self._infer, messages.ModelInferRequest),
            "ModelConfig": (self._config, messages.ModelConfigRequest),
            "ServerReady": (self._ready, messages.ServerReadyRequest),
            "ServerMetadata": (self._metadata, messages.ServerMetadataRequest),
        }
        methods = {
            name: grpc.unary_unary_rpc_method_handler(
                call, request.FromString, lambda response: response.SerializeToString()
            )
            for name, (call, request) in handlers.items()
        }
        self._server = grpc.server(ThreadPoolExecutor(4))
        self._server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler("inference.GRPCInferenceService", methods)]
        )
        if self._certificate is None:
            self.url = f"grpc://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        else:
            pair = (self._certificate.key_path.read_bytes(), self._certificate.path.read_bytes())
            credentials = grpc.ssl_server_credentials([pair])
            self.url = f"grpcs://localhost:{self._server.add_secure_port('127.0.0.1:0', credentials)}"
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait()

    def _take(self, request: Any, context: grpc.ServicerContext) -> None:
        headers = dict(context.invocation_metadata())
        reply = self.next_reply(Request("ModelInfer", headers, request))
        trailers = []
        if reply.retry_after is not None:
            trailers.append(("retry-after", reply.retry_after))
        if reply.index is not None:
            trailers.append(("index", str(reply.index)))
        context.set_trailing_metadata(trailers)
        if reply.code != "OK":
            context.abort(getattr(grpc.StatusCode, reply.code), reply.detail)

    def _infer(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._take(request, context)
        return self.response

    def _ready(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._take(request, context)
        return messages.ServerReadyResponse(ready=True)

    def _metadata(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._take(request, context)
        return messages.ServerMetadataResponse(name="quintet", version="0")

    def _config(self, request: Any, context: grpc.ServicerContext) -> Any:
        response = messages.ModelConfigResponse()
        response.config.name = request.name
        response.config.parameters["labels"].string_value = json.dumps(self.labels)
        return response
