"""Servers under test: started on free ports, watched, and gone at the end whatever happens."""

import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import psutil

from load_tests.measurement import MEBIBYTE
from load_tests.peers import environments
from load_tests.scenarios import HOST, Server

ROOT: Final = Path(__file__).resolve().parents[1]

LOG: Final = "server.log"

LOWEST_PORT: Final = 10_000
"""Below are those that known services have, ours among them."""

START_SECONDS: Final = 120
"""How long a server may take until it answers."""

STOP_SECONDS: Final = 15
"""How long a server may take to end by itself."""

QUIET_SHARE: Final = 0.1
"""A server that uses less of a core than this has finished starting."""

SETTLE_SECONDS: Final = 20
"""How long a server that answers may take to become quiet; some never do."""


class ServerFailed(Exception):
    """A server ended, or never answered; the message has the last lines that it wrote."""


class NotInstalled(ServerFailed):
    """A peer has no environment; the message has the command that makes it."""


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, outside those that the kernel gives to outgoing connections.

    A server binds its port only once it has loaded its models: any client on the machine could be
    given one of the kernel's by then.
    """
    kernels = Path("/proc/sys/net/ipv4/ip_local_port_range")
    below = int(kernels.read_text().split()[0]) if kernels.exists() else LOWEST_PORT
    # Where the kernel takes nearly all ports for itself, it is asked for some.
    ports = range(LOWEST_PORT, below) or [0]
    found: list[int] = []
    # All are open before one is closed, or one might be found twice.
    with ExitStack() as sockets:
        while len(found) < count:
            one = sockets.enter_context(socket.socket())
            with suppress(OSError):
                one.bind(("", secrets.choice(ports)))
                found.append(one.getsockname()[1])
    return found


class Running:
    """A server that runs, for as long as the `with` block does.

    It has a process group of its own, so that Ctrl-C reaches us alone and we stop it in order.
    """

    def __init__(self, server: Server, models: Path, scratch: Path, network: Path | None = None) -> None:
        """Prepare to start `server`.

        Args:
            server: What to start.
            models: The model repository.
            scratch: Where it may put files.
            network: The ONNX file, for a server that is given one.
        """
        self.server = server
        self.port, self.grpc_port = free_ports(2)
        self._scratch = scratch
        self._environment = os.environ | {
            "QUINTET_MODELS": str(models),
            "QUINTET_WORKERS": str(server.workers),
            "QUINTET_GRPC_PORT": str(self.grpc_port),
            "QUINTET_GRPC_HOST": HOST,
            "QUINTET_DRAIN_SECONDS": "0",
            "BENTOML_HOME": str(scratch / "bentoml"),
            "BENTOML_DO_NOT_TRACK": "True",
            "PEER_PORT": str(self.port),
            "PEER_GRPC_PORT": str(self.grpc_port),
            "PEER_WORKERS": str(server.workers),
            "PEER_NETWORK": str(network or ""),
            **server.environment,
        }
        self._log = scratch / LOG
        self._family: set[psutil.Process] = set()

    def __enter__(self) -> Self:
        """Start it.

        Raises:
            NotInstalled: it is a peer without its environment.
        """
        peer = self.server.peer
        if peer and not environments.is_installed(peer):
            raise NotInstalled(f"not installed; {environments.COMMAND} {peer}")
        places = {"port": self.port, "grpc_port": self.grpc_port, "scratch": self._scratch}
        command = [part.format(**places) for part in self.server.command]
        # A Ctrl-C in the middle of starting would leave behind a server that nobody knows.
        pressed: list[int] = []
        interrupt = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
        try:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        finally:
            signal.signal(signal.SIGINT, interrupt)
        if pressed:
            self.__exit__(None, None, None)
            raise KeyboardInterrupt
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop it and all it started, by asking and then by force."""
        self._meet_family()
        try:
            self._process.send_signal(signal.SIGTERM)
            psutil.wait_procs(self._family, timeout=STOP_SECONDS)
        finally:
            for process in self._family:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self._process.wait()

    def _meet_family(self) -> None:
        """Note the server's processes; workers may have process groups of their own."""
        with suppress(psutil.NoSuchProcess):
            head = psutil.Process(self._process.pid)
            self._family |= {head, *head.children(recursive=True)}

    def wait_until(self, answers: Callable[[], bool]) -> None:
        """Wait until the server answers and all its workers have finished starting.

        Raises:
            ServerFailed: it ended, or took too long.
        """
        give_up = time.monotonic() + START_SECONDS
        while not answers():
            self.check(give_up)
            time.sleep(0.1)
        quiet_since, before = time.monotonic(), sum(self.cpu_seconds().values())
        settled = quiet_since + SETTLE_SECONDS
        while time.monotonic() - quiet_since < 1 and time.monotonic() < settled:
            self.check(give_up)
            time.sleep(0.25)
            now = sum(self.cpu_seconds().values())
            if now - before > QUIET_SHARE * 0.25:
                quiet_since = time.monotonic()
            before = now

    def check(self, give_up: float) -> None:
        """See that the server runs.

        Raises:
            ServerFailed: it has ended, or it is later than `give_up` (`time.monotonic`).
        """
        if self._process.poll() is not None:
            raise ServerFailed(f"{self.server.name} ended while it started:\n{self._last_lines()}")
        if time.monotonic() > give_up:
            raise ServerFailed(
                f"{self.server.name} did not answer within {START_SECONDS} s:\n{self._last_lines()}"
            )

    def is_alive(self) -> bool:
        """Whether its first process runs."""
        return self._process.poll() is None

    def _last_lines(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])

    def cpu_seconds(self) -> dict[int, float]:
        """Processor time that each process of the server has used so far, in seconds."""
        self._meet_family()
        used = {}
        for process in self._family:
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                used[process.pid] = times.user + times.system
        return used

    def resident_mib(self) -> float:
        """Memory of all its processes, what they share counted for each: no other program changes it."""
        total = 0
        for process in self._family:
            with suppress(psutil.Error):
                total += process.memory_info().rss
        return total / MEBIBYTE

    def memory_mib(self) -> float:
        """Memory of all its processes, what they share counted once."""
        total = 0.0
        for process in self._family:
            with suppress(psutil.Error):
                told = process.memory_full_info()
                total += getattr(told, "pss", told.uss)
        return total / MEBIBYTE
