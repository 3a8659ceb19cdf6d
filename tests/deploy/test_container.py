"""The image: what goes into it, and where one was built, how it runs.

    QUINTET_TEST_IMAGE=quintet:cpu pytest tests/deploy/test_container.py

`QUINTET_TEST_RUN` is how to run it, if not with `docker run`.
"""

import asyncio
import base64
import json
import os
import re
import shlex
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from quintet_client import AsyncClient

from load_tests.servers import free_ports
from service.models.spec import Room
from tests.conftest import ROOT, SHIPPED

from .conftest import Load

REQUIREMENTS = ROOT / "requirements"
IMAGE = os.environ.get("QUINTET_TEST_IMAGE", "")
RUN = shlex.split(os.environ.get("QUINTET_TEST_RUN", "docker run"))
ENGINE = RUN[: RUN.index("run")]
HARDENED = ["--read-only", "--cap-drop", "all", "--security-opt", "no-new-privileges", "--network", "host"]
START_SECONDS = 300.0

needs_image = pytest.mark.skipif(
    not IMAGE, reason="runs an image that was built: make image, then set QUINTET_TEST_IMAGE=quintet:cpu"
)


# ---- what goes in ----


def pins(path: Path) -> dict[str, str]:
    """Versions by name, as pip compares names."""
    found = re.findall(r"^([\w.-]+)(?:\[[\w,]+\])?==(\S+)", path.read_text(), re.MULTILINE)
    return {re.sub("[-_.]+", "-", name.lower()): version for name, version in found}


@pytest.mark.parametrize("variant", ["cpu", "gpu", "tools"])
def test_all_that_goes_into_the_image_is_named_by_its_hash(variant: str) -> None:
    text = (REQUIREMENTS / f"image-{variant}.txt").read_text()
    for requirement in re.split(r"\n(?=\S)", text.strip()):
        assert re.match(r"[\w.\[\],-]+==\S+ ", requirement)
        assert "--hash=sha256:" in requirement


@pytest.mark.parametrize(("variant", "runtime"), [("cpu", "onnxruntime"), ("gpu", "onnxruntime-gpu")])
def test_the_image_has_the_versions_that_are_served_elsewhere(variant: str, runtime: str) -> None:
    served, image = pins(REQUIREMENTS / "serve.txt"), pins(REQUIREMENTS / f"image-{variant}.txt")
    version = served.pop("onnxruntime")
    assert image.pop(runtime) == version
    libraries = {name for name in image if name.startswith(("nvidia-", "cuda-"))} - set(served)
    assert bool(libraries) == (variant == "gpu")
    assert {name: pin for name, pin in image.items() if name not in libraries} == served


def test_no_file_gets_in_that_is_not_served() -> None:
    """What Docker may read at all, and of that what the image takes."""
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(allowed) == [
        "clients/web", "deploy/container/health.py", "models", "requirements/image-*.txt", "service",
    ]  # fmt: skip
    dockerfile = (ROOT / "deploy" / "container" / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (?!--from)(\S+)", dockerfile, re.MULTILINE)
    assert {path.rstrip("/") for path in copied} == set(allowed)
    assert re.search(r"^USER 10001:10001$", dockerfile, re.MULTILINE)


# ---- how it runs ----


def example_of(room: Room) -> dict[str, Any]:
    """The room's example, as people send it."""
    if room.takes == "pictures":
        return {"images": [base64.b64encode(room.example["image"]).decode()]}
    if room.takes == "texts":
        return {"texts": [room.example["text"].decode()]}
    return {"digits": [int(room.example["digit"])], "seed": int(room.example["seed"])}


KILL_A_WORKER = """
import os, signal
for name in filter(str.isdigit, os.listdir("/proc")):
    parent = open(f"/proc/{name}/stat").read().rpartition(")")[2].split()[1]
    if parent == "1" and b"worker" in open(f"/proc/{name}/cmdline", "rb").read():
        os.kill(int(name), signal.SIGKILL)
        break
"""
"""Run inside: the first of the supervisor's children that answers requests ends at once."""


def start(
    name: str, *, memory: str = "64m", environment: dict[str, str] | None = None
) -> "subprocess.Popen[str]":
    settings = [f"--env={key}={value}" for key, value in (environment or {}).items()]
    command = [*RUN, "--rm", "--name", name, *HARDENED, "--tmpfs", f"/tmp:rw,size={memory}", *settings, IMAGE]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def inside(name: str, *command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*ENGINE, "exec", name, *command], capture_output=True, text=True)


class Container:
    """One that is ready."""

    def __init__(self, name: str, port: int, grpc_port: int) -> None:
        self.name = name
        self.url = f"http://127.0.0.1:{port}"
        self.grpc_url = f"grpc://127.0.0.1:{grpc_port}"


@contextmanager
def running(**environment: str) -> Iterator[Container]:
    port, grpc_port = free_ports(2)
    name = f"quintet-test-{port}"
    settings = {"BENTOML_PORT": str(port), "QUINTET_GRPC_PORT": str(grpc_port), "QUINTET_WORKERS": "2"}
    process = start(name, environment=settings | environment)
    container = Container(name, port, grpc_port)
    try:
        wait_until_ready(container, process)
        yield container
    finally:
        subprocess.run([*ENGINE, "stop", "--time", "40", name], capture_output=True)
        process.communicate(timeout=120)


def wait_until_ready(container: Container, process: "subprocess.Popen[str]", workers: int = 2) -> None:
    """Until so many workers are ready."""
    give_up = time.monotonic() + START_SECONDS
    while True:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < give_up, "the container does not become ready"
        try:
            text = httpx.get(f"{container.url}/metrics", trust_env=False).text
        except httpx.TransportError:
            text = ""
        if f'quintet_workers{{state="ready"}} {float(workers)}' in text:
            return
        time.sleep(0.2)


@pytest.fixture(scope="module")
def container() -> Iterator[Container]:
    with running() as one:
        yield one


@needs_image
def test_every_model_answers(container: Container) -> None:
    for name, room in SHIPPED.items():
        answer = httpx.post(f"{container.url}/{name}", json=example_of(room), trust_env=False, timeout=60)
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["predictions"]) == 1


@needs_image
def test_it_has_no_rights_and_writes_nowhere_but_in_tmp(container: Container) -> None:
    assert inside(container.name, "id", "-u").stdout.strip() == "10001"
    status = inside(container.name, "grep", "-E", "^(Cap|NoNewPrivs)", "/proc/1/status").stdout.split()
    assert set(status[1::2]) == {"0000000000000000", "1"}
    for folder in ("/", "/opt/quintet", "/opt/quintet/models", "/usr", "/etc"):
        assert inside(container.name, "touch", f"{folder}/x").returncode != 0
    assert inside(container.name, "python3", "/opt/quintet/health.py").returncode == 0


@needs_image
def test_it_holds_no_compiler_no_pip_and_no_torch_but_a_bill_of_materials(container: Container) -> None:
    for program in ("gcc", "cc", "g++", "make", "pip", "pip3"):
        assert inside(container.name, "sh", "-c", f"command -v {program}").returncode != 0
    assert inside(container.name, "python3", "-c", "import torch").returncode != 0
    bill = json.loads(inside(container.name, "cat", "/opt/quintet/sbom.cdx.json").stdout)
    assert bill["bomFormat"] == "CycloneDX"
    named = {re.sub("[-_.]+", "-", one["name"].lower()): one["version"] for one in bill["components"]}
    served = pins(REQUIREMENTS / "serve.txt")
    served.pop("onnxruntime")
    assert served.items() <= named.items()
    assert "libc6" in inside(container.name, "cat", "/opt/quintet/debian-packages.txt").stdout
    assert "SECRET" not in inside(container.name, "env").stdout


@needs_image
async def test_a_killed_worker_is_replaced_and_costs_only_what_it_had_under_way(
    container: Container, digit_pngs: list[tuple[bytes, str]]
) -> None:
    load = Load(container.url, digit_pngs[0][0])
    asking = asyncio.create_task(load.send(1000))
    while load.seen["ok"] < 200:
        await asyncio.sleep(0.01)
    assert inside(container.name, "python3", "-c", KILL_A_WORKER).returncode == 0
    await asking
    assert set(load.seen) <= {"ok", Load.LOST}
    assert load.seen[Load.LOST] <= 8
    pictures = [picture for picture, _ in digit_pngs]
    async with AsyncClient(container.grpc_url) as client:
        async for one in client.digit(iter(pictures)):
            assert one.model == "digit"
    give_up = time.monotonic() + START_SECONDS
    while (
        'quintet_workers{state="ready"} 2.0'
        not in httpx.get(f"{container.url}/metrics", trust_env=False).text
    ):
        assert time.monotonic() < give_up
        await asyncio.sleep(0.2)
    text = httpx.get(f"{container.url}/metrics", trust_env=False).text
    assert "quintet_worker_starts_total 3.0" in text


@needs_image
@pytest.mark.parametrize(
    ("memory", "environment", "says"),
    [
        pytest.param("64m", {"QUINTET_MODELS": "/not/there"}, "no model repository", id="no models"),
        pytest.param("64m", {"QUINTET_RUNTIME": "abacus"}, "QUINTET_RUNTIME", id="an unknown value"),
        pytest.param("64m", {"QUINTET_WROKERS": "2"}, "QUINTET_WORKERS?", id="an unknown setting"),
        pytest.param("64m", {"QUINTET_RUNTIME": "cuda"}, "QUINTET_RUNTIME (asks|is)", id="no GPU"),
        pytest.param("256k", {}, "No space left on device", id="a full disk"),
    ],
)
def test_it_refuses_to_start_in_a_sentence(memory: str, environment: dict[str, str], says: str) -> None:
    (port,) = free_ports(1)
    own = {"BENTOML_PORT": str(port), "QUINTET_GRPC_PORT": "0"}
    process = start(f"quintet-test-{port}", memory=memory, environment=own | environment)
    output, _ = process.communicate(timeout=START_SECONDS)
    assert process.returncode not in (0, None)
    sentences = [line for line in output.splitlines() if line.startswith("quintet: ")]
    assert len(sentences) == 1, output
    assert re.search(says.replace("?", r"\?"), sentences[0])
