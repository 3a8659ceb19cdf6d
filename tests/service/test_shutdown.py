"""How the service ends, and how it refuses to start."""

import asyncio
import hashlib
import json
import shutil
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.proto import grpc_service_pb2 as pb
from service.settings import _refuse_unknown
from tests.conftest import MODELS_FOLDER, LaunchQuintet, QuintetServer, StartQuintet

from .knocking import picture_request

GRACE_SECONDS = 20


def grpc_infer(server: QuintetServer) -> tuple[grpc.aio.Channel, Any]:
    channel = grpc.aio.insecure_channel(server.grpc_address, [("grpc.enable_http_proxy", 0)])
    return channel, channel.unary_unary(
        "/inference.GRPCInferenceService/ModelInfer",
        request_serializer=pb.ModelInferRequest.SerializeToString,
        response_deserializer=pb.ModelInferResponse.FromString,
    )


async def ask_over_http(server: QuintetServer, picture: bytes, outcomes: Counter[str]) -> None:
    """Ask on one connection until told that the service drains; who hears that looks elsewhere."""
    async with httpx.AsyncClient(base_url=server.http_url, trust_env=False, timeout=30) as client:
        while True:
            try:
                response = await client.post("/digit", content=picture)
            except httpx.TransportError as error:
                outcomes[f"http {error!r}"] += 1
                return
            outcomes[f"http {response.status_code}"] += 1
            if response.status_code != 200:
                assert response.headers["retry-after"]
                assert response.headers["connection"] == "close"
                assert "draining" in response.json()["detail"]
                return


async def ask_over_grpc(server: QuintetServer, picture: bytes, outcomes: Counter[str]) -> None:
    """The same on one channel."""
    channel, infer = grpc_infer(server)
    async with channel:
        while True:
            try:
                await infer(picture_request(picture), timeout=30)
                outcomes["grpc OK"] += 1
            except grpc.aio.AioRpcError as error:
                metadata = dict(error.trailing_metadata() or ())
                if "draining" in (error.details() or ""):
                    assert metadata["retry-after"]
                    outcomes["grpc UNAVAILABLE, draining"] += 1
                else:
                    outcomes[f"grpc {error.code().name}: {error.details()}"] += 1
                return


async def watch_health(server: QuintetServer, seen: list[tuple[int, int]]) -> None:
    """What /readyz and /livez say, one after the other, until no connection can be had."""
    async with httpx.AsyncClient(base_url=server.http_url, trust_env=False, timeout=30) as client:
        while True:
            try:
                ready, alive = [await client.get(path) for path in ("/readyz", "/livez")]
            except httpx.TransportError:
                return
            seen.append((ready.status_code, alive.status_code))
            if ready.status_code == 503:
                assert ready.headers["retry-after"]
            await asyncio.sleep(0.02)


async def test_stopped_under_load_it_answers_all_that_it_accepted(
    start_quintet: StartQuintet, digit_png: bytes
) -> None:
    outcomes: Counter[str] = Counter()
    health: list[tuple[int, int]] = []
    with start_quintet() as server:
        tasks = [
            *(asyncio.create_task(ask_over_http(server, digit_png, outcomes)) for _ in range(8)),
            *(asyncio.create_task(ask_over_grpc(server, digit_png, outcomes)) for _ in range(4)),
            asyncio.create_task(watch_health(server, health)),
        ]
        while outcomes["http 200"] < 100 or outcomes["grpc OK"] < 100 or not health:
            await asyncio.sleep(0.05)
        asked_to_stop = time.monotonic()
        server.terminate()
        exit_code = await asyncio.to_thread(server.wait)
        assert time.monotonic() - asked_to_stop < GRACE_SECONDS
        await asyncio.wait_for(asyncio.gather(*tasks), 60)
    assert exit_code == 0
    assert set(outcomes) == {"http 200", "http 503", "grpc OK", "grpc UNAVAILABLE, draining"}, outcomes
    assert {alive for _, alive in health} == {200}
    assert {ready for ready, _ in health} == {200, 503}
    assert health[0][0] == 200
    assert health[-1][0] == 503
    assert "Traceback" not in server.log_text()


async def test_work_that_takes_longer_than_the_drain_is_still_answered_and_the_health_service_hears_of_it(
    start_quintet: StartQuintet, digit_png: bytes
) -> None:
    with start_quintet(batch_window_ms=1000, drain_seconds=0, workers=1) as server:
        channel, infer = grpc_infer(server)
        async with (
            channel,
            httpx.AsyncClient(base_url=server.http_url, trust_env=False, timeout=30) as client,
        ):
            asking = asyncio.gather(
                client.post("/digit", content=digit_png), infer(picture_request(digit_png), timeout=30)
            )
            watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=30)
            heard = [(await watching.read()).status]
            while metric(await in_flight(server)) < 2:
                assert not asking.done()
            server.terminate()
            heard.append((await watching.read()).status)
            watching.cancel()
            over_http, over_grpc = await asking
        assert await asyncio.to_thread(server.wait) == 0
    assert over_http.status_code == 200
    assert over_http.headers["connection"] == "close"
    assert over_grpc.model_name == "digit"
    serving = health_pb2.HealthCheckResponse.ServingStatus
    assert heard == [serving.SERVING, serving.NOT_SERVING]


async def in_flight(server: QuintetServer) -> str:
    async with httpx.AsyncClient(base_url=server.http_url, trust_env=False) as client:
        return (await client.get("/metrics")).text


def metric(text: str) -> float:
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("quintet_in_flight "))


# ---- refusals to start ----


@pytest.fixture
def copied_models(tmp_path: Path) -> Path:
    """A repository of one's own, to spoil."""
    shutil.copytree(MODELS_FOLDER / "digit", tmp_path / "models" / "digit")
    return tmp_path / "models"


def check_refusal(server: QuintetServer, says: str) -> None:
    """It ended by itself, not well, with one sentence for whoever started it."""
    assert server.wait() > 0
    (sentence,) = [line for line in server.log_text().splitlines() if line.startswith("quintet: ")]
    assert says in sentence
    assert sentence.endswith((".", "?"))
    assert "Traceback" not in server.log_text()


def test_it_refuses_to_start_with_an_altered_network(
    launch_quintet: LaunchQuintet, copied_models: Path
) -> None:
    # In every version: with a good one left, it would serve that.
    for network in copied_models.glob("*/*/*.onnx"):
        content = bytearray(network.read_bytes())
        content[len(content) // 2] ^= 1
        network.write_bytes(content)
    check_refusal(launch_quintet(models=copied_models), "sha256")


def test_it_refuses_to_start_without_a_repository(launch_quintet: LaunchQuintet, tmp_path: Path) -> None:
    check_refusal(launch_quintet(models=tmp_path / "not there"), "no model repository")


def test_it_refuses_to_start_where_the_grpc_port_is_taken(launch_quintet: LaunchQuintet) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        check_refusal(launch_quintet(grpc_port=port), str(port))


def test_it_refuses_to_start_where_the_rest_port_is_taken(launch_quintet: LaunchQuintet) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        check_refusal(launch_quintet(http_port=port), f"port {port} for REST is not free")


def test_it_ends_badly_where_a_worker_finds_that_a_file_is_another_network(
    launch_quintet: LaunchQuintet, copied_models: Path
) -> None:
    # Its checksum is right, so only loading it can show that.
    stranger = next((MODELS_FOLDER / "generator").glob("*/model.fp16.onnx")).read_bytes()
    for path in copied_models.glob("*/*/card.json"):
        card = json.loads(path.read_text())
        for file in card["files"].values():
            (path.parent / file["path"]).write_bytes(stranger)
            file |= {"bytes": len(stranger), "sha256": hashlib.sha256(stranger).hexdigest()}
        path.write_text(json.dumps(card))
    server = launch_quintet(models=copied_models)
    assert server.wait() > 0
    assert "the graph's inputs are" in server.log_text()
    assert '"event": "ready"' not in server.log_text()


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own with no room left but a few kilobytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("only root, and not every root, may mount a small disk to fill")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_it_refuses_to_start_where_the_disk_is_full(
    launch_quintet: LaunchQuintet, full_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(full_disk))
    check_refusal(launch_quintet(), f"{full_disk} (No space left on device)")


def test_what_others_call_quintet_too_is_no_setting() -> None:
    # Kubernetes' for a Service of our name, and the client's: refusing these would be a nuisance.
    service = {"SERVICE_HOST": "10.0.0.1", "SERVICE_PORT_REST": "3000", "PORT": "tcp://10.0.0.1:3000"}
    strangers = {f"QUINTET_{name}": value for name, value in service.items()}
    strangers |= {"QUINTET_PORT_3000_TCP_ADDR": "10.0.0.1", "QUINTET_URL": "http://localhost:3000"}
    _refuse_unknown(strangers)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        pytest.param({"workrs": 3}, "did you mean QUINTET_WORKERS?", id="a misspelt setting"),
        pytest.param({"flavour": "mint"}, "QUINTET_FLAVOUR", id="a setting that there is not"),
        pytest.param({"runtime": "abacus"}, "QUINTET_RUNTIME", id="a value that there is not"),
        pytest.param({"runtime": "cuda"}, "QUINTET_RUNTIME", id="a GPU where there is none"),
        pytest.param({"queue_size": 0}, "QUINTET_QUEUE_SIZE", id="no queue at all"),
        pytest.param({"api_keys": "secret"}, "api_keys", id="keys that are no list"),
    ],
)
def test_it_refuses_settings_that_make_no_sense(
    launch_quintet: LaunchQuintet, settings: dict[str, Any], says: str
) -> None:
    server = launch_quintet(**settings)
    check_refusal(server, says)
    assert "secret" not in server.log_text()
