"""What callers notice of deaths and restarts: nothing that a retry does not mend."""

import asyncio
import itertools
import os
import shutil
import subprocess
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from quintet_client import AsyncClient

from load_tests.servers import free_ports
from tests.conftest import ROOT, QuintetServer, StartQuintet

from .conftest import Load

REQUESTS = 10_000

needs_haproxy = pytest.mark.skipif(
    shutil.which("haproxy") is None and not Path("/usr/sbin/haproxy").exists(),
    reason="HAProxy is not installed here: Debian's package is called haproxy",
)


@pytest.mark.parametrize("door", ["http_url", "grpc_url"])
async def test_the_clients_retries_recover_all_that_a_killed_worker_had_under_way(
    start_quintet: StartQuintet, digit_only: Path, digit_pngs: list[tuple[bytes, str]], door: str
) -> None:
    pictures = [picture for picture, _ in digit_pngs]
    with start_quintet(models=digit_only) as server:
        async with AsyncClient(getattr(server, door)) as client:
            alone = [answer.label for answer in await client.digit(pictures)]
            answers = []
            async for answer in client.digit(iter(pictures * 10)):
                answers.append(answer.label)
                if len(answers) in (200, 600):
                    server.workers()[0].kill()
    assert answers == alone * 10


class Balancer:
    """HAProxy before two instances, as `deploy/haproxy` sets it up."""

    def __init__(self, folder: Path, first: QuintetServer, second: QuintetServer) -> None:
        (self._port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{self._port}"
        program = shutil.which("haproxy") or "/usr/sbin/haproxy"
        environment = os.environ | {
            "REST_ADDRESS": f"127.0.0.1:{self._port}",
            "FIRST_INSTANCE": first.http_address,
            "SECOND_INSTANCE": second.http_address,
        }
        with (folder / "haproxy.log").open("wb") as log:
            self._process = subprocess.Popen(
                [program, "-f", str(ROOT / "deploy" / "haproxy" / "haproxy.cfg"), "-db"],
                env=environment,
                stdout=log,
                stderr=log,
            )

    async def wait_until_ready(self) -> None:
        """Until it listens, and has found both instances ready."""
        async with httpx.AsyncClient(base_url=self.url, trust_env=False) as client:
            for _ in range(600):
                try:
                    if (await client.get("/readyz")).status_code == 200:
                        return
                except httpx.TransportError:
                    assert self._process.poll() is None
                await asyncio.sleep(0.1)
        raise AssertionError("the balancer finds no instance ready")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


@needs_haproxy
async def test_a_rolling_restart_behind_a_balancer_loses_none_of_ten_thousand_requests(
    start_quintet: StartQuintet, digit_only: Path, digit_png: bytes, tmp_path: Path
) -> None:
    with (
        start_quintet(models=digit_only, workers=1) as first,
        start_quintet(models=digit_only, workers=1) as second,
        closing(Balancer(tmp_path, first, second)) as balancer,
    ):
        await balancer.wait_until_ready()
        load = Load(balancer.url, digit_png)
        are_restarted = False
        # At the least ten thousand, and in any case until both have been restarted.
        asked = itertools.takewhile(
            lambda _: not are_restarted or load.seen.total() < REQUESTS, itertools.count()
        )
        asking = asyncio.create_task(load.send_while(asked))
        for server in (first, second):
            before = load.seen.total()
            while load.seen.total() < before + 500:
                await asyncio.sleep(0.02)
            server.terminate()
            assert await asyncio.to_thread(server.wait) == 0
            server.launch_again()
            await asyncio.to_thread(server.wait_until_ready)
        are_restarted = True
        await asking
    assert set(load.seen) == {"ok"}, load.seen
    assert load.seen["ok"] >= REQUESTS


def test_instances_of_one_machine_share_nothing(
    start_quintet: StartQuintet, digit_only: Path, digit_png: bytes
) -> None:
    """Or the counts of one would be in the other's metrics."""

    def requests(server: QuintetServer) -> float:
        text = httpx.get(f"{server.http_url}/metrics", trust_env=False).text
        lines = (line for line in text.splitlines() if line.startswith("quintet_requests_total"))
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    with (
        start_quintet(models=digit_only, workers=1) as one,
        start_quintet(models=digit_only, workers=1) as other,
    ):
        answer = httpx.post(f"{one.http_url}/digit", content=digit_png, trust_env=False)
        assert answer.status_code == 200
        assert requests(one) == 1
        assert requests(other) == 0
