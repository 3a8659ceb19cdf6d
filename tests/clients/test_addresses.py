"""Addresses that are wrong, secure or not yet awake: one sentence each, with the cause and the cure."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from quintet_client import Client, QuintetError, ServerError, Unavailable, Untrusted

from load_tests.servers import free_ports

from .conftest import Ask
from .stand_in import GOOD, STARTING, Certificate


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    """A fresh one, as an operator without an authority makes it."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl, to make a certificate")
    folder = tmp_path_factory.mktemp("certificate")
    made = Certificate(folder / "certificate.pem", folder / "key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command += ["-out", str(made.path), "-keyout", str(made.key_path)]
    subprocess.run(command, check=True, capture_output=True)
    return made


async def test_a_certificate_signed_by_itself_is_refused(
    ask: Ask, stand_in: Any, certificate: Certificate
) -> None:
    with (
        stand_in([GOOD], certificate=certificate) as server,
        pytest.raises(Untrusted, match=r"certificate .* ca_file"),
    ):
        await ask(server.url, "sentiment", "loved it")


async def test_a_certificate_that_was_named_is_trusted(
    ask: Ask, stand_in: Any, certificate: Certificate
) -> None:
    with stand_in([GOOD], certificate=certificate) as server:
        answer = await ask(server.url, "sentiment", "loved it", client={"ca_file": certificate.path})
    assert answer.label == "positive"


@pytest.mark.parametrize("scheme", ["https", "grpcs"])
def test_a_file_of_certificates_that_is_none_is_refused(scheme: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Client(f"{scheme}://localhost", ca_file=tmp_path / "missing.pem")
    (tmp_path / "notes.pem").write_text("no certificate")
    if scheme == "https":
        with pytest.raises(ValueError, match="certificate"):
            Client(f"{scheme}://localhost", ca_file=tmp_path / "notes.pem")


@pytest.mark.parametrize("scheme", ["http", "https", "grpc", "grpcs"])
async def test_where_nothing_listens_the_cure_is_named(ask: Ask, scheme: str) -> None:
    (port,) = free_ports(1)
    url = f"{scheme}://127.0.0.1:{port}"
    with pytest.raises(Unavailable, match=r"No service answers at .*: nothing listens there; start one"):
        await ask(url, "sentiment", "loved it", client={"retries": 0})


@pytest.mark.parametrize("scheme", ["http", "grpc"])
async def test_a_machine_that_does_not_exist_is_named_as_such(ask: Ask, scheme: str) -> None:
    with pytest.raises(QuintetError, match="No service answers") as caught:
        await ask(f"{scheme}://quintet.invalid:3000", "sentiment", "loved it", client={"retries": 0})
    assert "no machine of that name" in str(caught.value)


async def test_the_wrong_door_is_named_as_such(ask: Ask, quintet_server: Any) -> None:
    for url in (f"http://{quintet_server.grpc_address}", f"grpc://{quintet_server.http_address}"):
        with pytest.raises(ServerError, match="another protocol"):
            await ask(url, "digit", b"anything", client={"retries": 0})


async def test_a_door_without_tls_is_named_as_such(ask: Ask, quintet_server: Any) -> None:
    with pytest.raises(ServerError, match="no TLS"):
        await ask(f"https://{quintet_server.http_address}", "digit", b"anything", client={"retries": 0})


async def test_the_status_tells_what_is_served(ask: Ask, url: str) -> None:
    status = await ask(url, "status")
    assert status.is_ready
    assert status.server.startswith("quintet ")
    assert list(status.models) == ["digit", "image", "sentiment", "generator", "detection"]
    assert "2" in status.models["digit"]
    assert status.seconds > 0
    assert "digit 2" in str(status)


async def test_the_status_of_a_service_that_is_starting(ask: Ask, stand_in: Any) -> None:
    with stand_in([STARTING]) as server, pytest.raises(Unavailable, match="starting"):
        await ask(server.url, "status")
