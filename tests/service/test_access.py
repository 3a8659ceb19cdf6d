"""Who gets in and what is told of them: keys as digests, TLS, other origins, request ids, the access log."""

import contextlib
import hashlib
import json
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from service.keys import Keys
from service.proto import grpc_service_pb2 as pb
from tests.conftest import LaunchQuintet, QuintetServer, StartQuintet

from .knocking import INFER, GrpcClient, http_client, picture_request, tensor
from .refusals import check_grpc_error, check_problem, check_v2_error
from .wire import GREETING

SECRET = "a key that a machine made up"
DIGEST = f"sha256:{hashlib.sha256(SECRET.encode()).hexdigest()}"


# ---- keys ----


@pytest.mark.parametrize("given", [SECRET, DIGEST], ids=["itself", "its digest"])
def test_a_key_opens_however_it_was_given(given: str) -> None:
    keys = Keys(["another", given])
    assert keys.open_for(b"Bearer " + SECRET.encode())
    assert keys.open_for(b"bearer " + SECRET.encode())
    assert not keys.open_for(b"Bearer " + SECRET.encode()[:-1])
    assert not keys.open_for(b"Basic " + SECRET.encode())
    assert not keys.open_for(b"Bearer " + DIGEST.encode())
    assert not keys.open_for(b"")


def test_no_keys_open_nothing() -> None:
    assert not Keys([])
    assert not Keys([]).open_for(b"Bearer ")


# ---- a server with keys, an allowed origin, and a log of all requests ----

ORIGIN = "https://page.example"


@pytest.fixture(scope="module")
def server(start_quintet: StartQuintet) -> Iterator[QuintetServer]:
    settings: dict[str, Any] = {
        "api_keys": [DIGEST, "sécond"],
        "cors_origins": [ORIGIN],
        "access_log_share": 1,
    }
    with start_quintet(workers=1, drain_seconds=0, **settings) as quintet:
        yield quintet


@pytest.fixture
def client(server: QuintetServer) -> Iterator[httpx.Client]:
    with http_client(server, headers={"Authorization": f"Bearer {SECRET}"}) as client:
        yield client


def test_the_key_opens_and_its_digest_does_not(server: QuintetServer, digit_png: bytes) -> None:
    with http_client(server) as client:
        for word, status in [(SECRET, 200), (DIGEST, 401), (DIGEST.removeprefix("sha256:"), 401)]:
            headers = {"Authorization": f"Bearer {word}"}
            assert client.post("/digit", content=digit_png, headers=headers).status_code == status


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(None, id="no key"),
        pytest.param("Bearer wrong", id="a wrong key"),
        pytest.param(f"Bearer {SECRET[:-1]}", id="a key cut short"),
        pytest.param("Bearer", id="an empty key"),
        pytest.param(SECRET, id="a key without its scheme"),
        pytest.param(f"Basic {SECRET}", id="another scheme"),
    ],
)
def test_without_a_key_nobody_learns_even_what_there_is(
    server: QuintetServer, digit_png: bytes, given: str | None
) -> None:
    with http_client(server, headers={} if given is None else {"Authorization": given}) as client:
        for response in (client.post("/digit", content=digit_png), client.get("/nothing")):
            check_problem(response, 401)
        for path in ("/v2/models/digit", "/v2/nothing"):
            check_v2_error(client.get(path), 401)
        check_v2_error(client.post("/v2/repository/models/digit/unload"), 401)
    metadata = () if given is None else (("authorization", given),)
    with GrpcClient(server.grpc_address) as grpc_client:
        for method in ("ModelInfer", "ModelMetadata", "ServerMetadata", "RepositoryModelUnload"):
            check_grpc_error(grpc_client.refusal(method, metadata=metadata), 401)


@pytest.mark.parametrize("given", [f"bearer {SECRET}", "Bearer sécond"])
def test_every_right_key_opens_the_http_door(server: QuintetServer, digit_png: bytes, given: str) -> None:
    with http_client(server, headers={"Authorization": given.encode()}) as client:
        assert client.post("/digit", content=digit_png).status_code == 200
        assert client.get("/v2/models/digit").status_code == 200


def test_the_right_key_opens_the_grpc_door(server: QuintetServer, digit_png: bytes) -> None:
    with GrpcClient(server.grpc_address) as client:
        metadata = (("authorization", f"Bearer {SECRET}"),)
        assert client.call("ModelInfer", picture_request(digit_png), metadata=metadata).model_name == "digit"


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics"])
def test_operators_need_no_key(server: QuintetServer, path: str) -> None:
    with http_client(server) as client:
        assert client.get(path).status_code == 200


def test_whether_it_lives_is_told_over_grpc_without_a_key(server: QuintetServer) -> None:
    with GrpcClient(server.grpc_address) as client:
        assert client.call("ServerLive").live
        assert client.call("ServerReady").ready


def test_a_stream_without_a_key_ends_at_once(server: QuintetServer, digit_png: bytes) -> None:
    with grpc.insecure_channel(server.grpc_address) as channel:
        stream = channel.stream_stream(
            "/inference.GRPCInferenceService/ModelStreamInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelStreamInferResponse.FromString,
        )
        with pytest.raises(grpc.RpcError) as refused:
            list(stream(iter([picture_request(digit_png)]), timeout=30))
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_an_allowed_origin_may_ask_and_read(client: httpx.Client, digit_png: bytes) -> None:
    asked = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    preflight = client.options("/digit", headers=asked)
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] == ORIGIN
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    for response in (
        client.post("/digit", content=digit_png, headers={"Origin": ORIGIN}),
        client.post("/digit", content=b"no picture", headers={"Origin": ORIGIN}),
        client.get("/readyz", headers={"Origin": ORIGIN}),
    ):
        assert response.headers["access-control-allow-origin"] == ORIGIN
        assert "origin" in response.headers["vary"]


@pytest.mark.parametrize("origin", ["https://other.example", f"{ORIGIN}.evil.example", "null", "é"])
def test_another_origin_may_not(client: httpx.Client, digit_png: bytes, origin: str) -> None:
    headers = {"Origin": origin.encode(), "Access-Control-Request-Method": b"POST"}
    for response in (
        client.options("/digit", headers=headers),
        client.post("/digit", content=digit_png, headers=headers),
    ):
        assert "access-control-allow-origin" not in response.headers


def test_without_allowed_origins_nothing_is_said_of_them(http: httpx.Client, digit_png: bytes) -> None:
    headers = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    assert http.options("/digit", headers=headers).status_code == 405
    response = http.post("/digit", content=digit_png, headers=headers)
    assert not [name for name in response.headers if name.startswith("access-control")]


def lines_of(server: QuintetServer, request_id: str) -> list[dict[str, Any]]:
    """The log's lines of one request, once they are there."""
    for _ in range(100):
        lines = [json.loads(line) for line in server.log_text().splitlines() if f'"{request_id}"' in line]
        if lines:
            return lines
        time.sleep(0.05)
    raise AssertionError(f"no line for {request_id}")


def test_the_log_tells_of_a_request_by_its_id_and_not_what_it_held(
    server: QuintetServer, client: httpx.Client, digit_png: bytes
) -> None:
    response = client.post("/digit", content=digit_png, headers={"X-Request-Id": "from-a-test"})
    assert response.headers["x-request-id"] == "from-a-test"
    (line,) = lines_of(server, "from-a-test")
    assert {"model": "digit", "protocol": "rest", "outcome": "ok", "event": "request"}.items() <= line.items()
    assert line["milliseconds"] > 0
    refused = client.post("/digit", content=b"my secret words", headers={"X-Request-Id": "refused-one"})
    assert refused.headers["x-request-id"] == "refused-one"
    assert lines_of(server, "refused-one")[0]["outcome"] == "400"
    with GrpcClient(server.grpc_address) as grpc_client:
        metadata = (("authorization", f"Bearer {SECRET}"),)
        grpc_client.call("ModelInfer", picture_request(digit_png, request_id="over-grpc"), metadata=metadata)
    assert lines_of(server, "over-grpc")[0]["protocol"] == "open-inference-grpc"
    assert "my secret words" not in server.log_text()
    assert SECRET not in server.log_text()


@pytest.mark.parametrize("name", [b"two\xc3\xa9", b"x" * 129, b"a\tb"], ids=["not ASCII", "endless", "a tab"])
def test_a_request_id_that_no_log_could_hold_is_left_out(
    client: httpx.Client, digit_png: bytes, name: bytes
) -> None:
    response = client.post("/digit", content=digit_png, headers={"X-Request-Id": name})
    assert response.status_code == 200
    assert "x-request-id" not in response.headers


def test_a_started_service_says_so(http: httpx.Client) -> None:
    assert http.get("/startupz").text == "started\n"


# ---- TLS ----


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A certificate for this machine, signed by itself, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate, and it is not installed")
    folder = tmp_path_factory.mktemp("tls")
    files = {"tls_certificate": folder / "certificate.pem", "tls_key": folder / "key.pem"}
    command = [
        "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
        "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
        "-out", str(files["tls_certificate"]), "-keyout", str(files["tls_key"]),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return files


def test_both_doors_speak_tls_and_nothing_else(
    start_quintet: StartQuintet, pair: dict[str, Path], digit_png: bytes
) -> None:
    with start_quintet(workers=1, drain_seconds=0, **pair) as server:
        with http_client(server) as client:
            assert client.post("/digit", content=digit_png).json()["model"] == "digit"
            body = {"inputs": [tensor(data=[0] * 784)]}
            assert client.post(INFER, json=body).status_code == 200
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://{server.http_address}/livez", trust_env=False)
        credentials = grpc.ssl_channel_credentials(pair["tls_certificate"].read_bytes())
        address = server.grpc_address.replace("127.0.0.1", "localhost")
        with grpc.secure_channel(address, credentials, [("grpc.enable_http_proxy", 0)]) as channel:
            live = channel.unary_unary(
                "/inference.GRPCInferenceService/ServerLive",
                request_serializer=pb.ServerLiveRequest.SerializeToString,
                response_deserializer=pb.ServerLiveResponse.FromString,
            )
            assert live(pb.ServerLiveRequest(), timeout=30).live
        with GrpcClient(server.grpc_address) as client:
            assert client.refusal("ServerLive", timeout=5).code() is grpc.StatusCode.UNAVAILABLE
        # Over TLS both sides say beforehand that they mean HTTP/2 (RFC 9113, section 3.2).
        context = ssl.create_default_context(cafile=pair["tls_certificate"])
        with (
            socket.create_connection(("127.0.0.1", server.grpc_port), timeout=30) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as encrypted,
            contextlib.suppress(ConnectionError),
        ):
            encrypted.sendall(GREETING)
            assert encrypted.recv(1024) == b""


@pytest.mark.parametrize("missing", ["tls_certificate", "tls_key"])
def test_half_a_pair_is_refused(launch_quintet: LaunchQuintet, pair: dict[str, Path], missing: str) -> None:
    server = launch_quintet(**{name: path for name, path in pair.items() if name != missing})
    assert server.wait() != 0
    assert "TLS takes both" in server.log_text()


def test_a_key_of_another_certificate_is_refused(
    launch_quintet: LaunchQuintet, pair: dict[str, Path], tmp_path: Path
) -> None:
    other = tmp_path / "key.pem"
    command = [
        "openssl",
        "genpkey",
        "-algorithm",
        "EC",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-out",
        str(other),
    ]
    subprocess.run(command, check=True, capture_output=True)
    server = launch_quintet(tls_certificate=pair["tls_certificate"], tls_key=other)
    assert server.wait() != 0
    assert "cannot be used" in server.log_text()
