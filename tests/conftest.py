"""The real service, started as an operator starts it, and real handwriting to send to it."""

import contextlib
import json
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import cv2
import httpx
import numpy as np
import psutil
import pytest
from sklearn.datasets import load_digits

from load_tests.servers import free_ports
from service.models import MODELS

ROOT = Path(__file__).resolve().parents[1]

MODELS_FOLDER = Path(os.environ.get("QUINTET_MODELS", ROOT / "models"))
"""The repository that ships, or one that is about to."""

SHIPPED = {name: room for name, room in MODELS.items() if (MODELS_FOLDER / name).is_dir()}
"""The models that can be asked; a room may be there before its first version ships."""

START_SECONDS = 120.0
STOP_SECONDS = 60.0
"""Both are long: the machine may be busy with something else."""


def pytest_configure(config: pytest.Config) -> None:
    """Know the mark of what needs a GPU."""
    config.addinivalue_line("markers", "gpu: needs an NVIDIA card and onnxruntime-gpu; skipped elsewhere")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A test that asks the service for one model waits, uncollected, until there is that model.

    Its room is in `MODELS`, and a version of it in the repository.
    """
    waiting = {item for item in items for mark in item.iter_markers("room") if mark.args[0] not in SHIPPED}
    if waiting:
        config.hook.pytest_deselected(items=list(waiting))
        items[:] = [item for item in items if item not in waiting]


class QuintetServer:
    """One `bentoml serve` with its workers, on ports of its own; `what` may be a Bento."""

    def __init__(
        self, folder: Path, what: str = "service:Quintet", http_port: int | None = None, **settings: Any
    ) -> None:
        self.settings = {"models": MODELS_FOLDER, "workers": 2, **settings}
        self._log = folder / "log"
        free_http_port, free_grpc_port = free_ports(2)
        self.http_port: int = http_port or free_http_port
        self.grpc_port: int = int(settings.get("grpc_port", free_grpc_port))
        self.settings["grpc_port"] = self.grpc_port
        environment = {name: value for name, value in os.environ.items() if not name.startswith("QUINTET_")}
        environment |= {f"QUINTET_{name.upper()}": _as_text(value) for name, value in self.settings.items()}
        # BentoML empties a folder in its home at every start: two servers must not share one.
        environment |= {"BENTOML_HOME": str(folder / "bentoml"), "BENTOML_DO_NOT_TRACK": "True"}
        # What was tuned for this machine must not change what is tested.
        environment.setdefault("QUINTET_SETTINGS", "")
        self._command = [
            sys.executable, "-m", "bentoml", "serve", what, "--port", str(self.http_port)
        ]  # fmt: skip
        self._folder = ROOT if what == "service:Quintet" else folder
        self._environment = environment
        self.process = self._launch()

    def _launch(self) -> subprocess.Popen[bytes]:
        with self._log.open("wb") as log:
            return subprocess.Popen(
                self._command, cwd=self._folder, env=self._environment, stdout=log, stderr=log
            )

    def kill(self) -> None:
        """End it with all its processes at once, as a machine that loses its power does."""
        for process in (*psutil.Process(self.pid).children(recursive=True), self.process):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def launch_again(self) -> None:
        """Start it once more, on the same ports."""
        self.process = self._launch()

    @property
    def http_url(self) -> str:
        scheme = "https" if "tls_certificate" in self.settings else "http"
        return f"{scheme}://127.0.0.1:{self.http_port}"

    @property
    def verify(self) -> ssl.SSLContext | bool:
        """What httpx needs to trust it: its own certificate, where it has one."""
        certificate = self.settings.get("tls_certificate")
        return ssl.create_default_context(cafile=certificate) if certificate else True

    @property
    def http_address(self) -> str:
        return f"127.0.0.1:{self.http_port}"

    @property
    def grpc_url(self) -> str:
        return f"grpc://127.0.0.1:{self.grpc_port}"

    @property
    def grpc_address(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def pid(self) -> int:
        return self.process.pid

    def workers(self) -> list[psutil.Process]:
        """The processes that answer requests."""
        found = []
        for child in psutil.Process(self.pid).children():
            # One that was killed stays in the list until its parent has looked.
            with contextlib.suppress(psutil.NoSuchProcess):
                if any("worker" in word for word in child.cmdline()):
                    found.append(child)
        return found

    def log_text(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_until_ready(self) -> Self:
        """Wait until every worker has loaded its models; /readyz speaks for one of them only."""
        give_up = time.monotonic() + START_SECONDS
        while self.log_text().count('"event": "ready"') < int(self.settings["workers"]):
            assert self.process.poll() is None, f"the service ended:\n{self.log_text()}"
            assert time.monotonic() < give_up, f"the service does not become ready:\n{self.log_text()}"
            time.sleep(0.05)
        ready = httpx.get(f"{self.http_url}/readyz", trust_env=False, verify=self.verify)
        assert ready.status_code == 200
        return self

    def terminate(self) -> None:
        """Ask it to stop, as an operator does; `wait` waits for the end."""
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        try:
            return self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the service does not end:\n{self.log_text()}") from None

    def stop(self) -> None:
        """End it, gently if it can be."""
        if self.process.poll() is None:
            self.terminate()
        try:
            self.wait()
        except AssertionError:
            self.kill()
            raise


def _as_text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list | tuple) else str(value)


LaunchQuintet = Callable[..., QuintetServer]
StartQuintet = Callable[..., contextlib.AbstractContextManager[QuintetServer]]


@pytest.fixture(scope="session")
def launch_quintet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchQuintet]:
    """A service that may refuse to start, so it is not waited for; keyword arguments are settings."""
    launched: list[QuintetServer] = []

    def launch(**settings: Any) -> QuintetServer:
        launched.append(QuintetServer(tmp_path_factory.mktemp("quintet"), **settings))
        return launched[-1]

    yield launch
    for quintet in launched:
        quintet.stop()


@pytest.fixture(scope="session")
def start_quintet(launch_quintet: LaunchQuintet) -> StartQuintet:
    """A ready service of one's own, for as long as its `with` lasts; keyword arguments are settings."""

    @contextlib.contextmanager
    def start(**settings: Any) -> Iterator[QuintetServer]:
        quintet = launch_quintet(**settings)
        try:
            yield quintet.wait_until_ready()
        finally:
            quintet.stop()

    return start


@pytest.fixture(scope="session")
def quintet_server(start_quintet: StartQuintet) -> Iterator[QuintetServer]:
    """The service that most tests share."""
    with start_quintet() as quintet:
        yield quintet


@pytest.fixture(scope="session")
def digit_pngs() -> list[tuple[bytes, str]]:
    """A hundred digits that people wrote, and what they meant: PNGs of 28x28, light ink on black."""
    digits = load_digits()
    small = np.rint(digits.images[:100] * (255 / 16)).astype(np.uint8)
    pictures = [np.pad(cv2.resize(one, (20, 20), interpolation=cv2.INTER_CUBIC), 4) for one in small]
    return [
        (cv2.imencode(".png", picture)[1].tobytes(), str(label))
        for picture, label in zip(pictures, digits.target[:100], strict=True)
    ]


@pytest.fixture(scope="session")
def digit_png(digit_pngs: list[tuple[bytes, str]]) -> bytes:
    """One of them."""
    return digit_pngs[0][0]
