"""A model on two nodes of a real Ray cluster, one of which is lost under load."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
from quintet_client import AsyncClient

from load_tests.servers import free_ports
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(
    find_spec("ray") is None, reason="Ray is not installed here: pip install 'ray[serve]', or the extra `ray`"
)


@contextmanager
def cluster(models: Path, port: int) -> Iterator["subprocess.Popen[str]"]:
    """Two nodes that serve these models; in a process of their own, which Ray fills with threads."""
    # Ray's sockets want a short path.
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "RAY_TMPDIR": folder,
            "RAY_USAGE_STATS_ENABLED": "0",
            # The machine may be busy with something else.
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "240",
        }
        running = subprocess.Popen(
            [sys.executable, "-m", "tests.deploy.ray_cluster", str(models), str(port)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            yield running
        finally:
            running.communicate(timeout=120)


def wait_for(running: "subprocess.Popen[str]", word: str) -> None:
    assert running.stdout is not None
    for line in running.stdout:
        if line.strip() == word:
            return
    raise AssertionError(f"the cluster ended before it was {word}")


async def test_a_lost_node_costs_nothing_that_retries_do_not_recover(
    digit_only: Path, digit_pngs: list[tuple[bytes, str]]
) -> None:
    (port,) = free_ports(1)
    pictures = [picture for picture, _ in digit_pngs]
    with cluster(digit_only, port) as running:
        wait_for(running, "ready")
        url = f"http://127.0.0.1:{port}"
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=60) as http:
            answer = await http.post("/digit", content=pictures[0])
            assert answer.status_code == 200
            assert answer.json()["model"] == "digit"
            assert "queue;dur=" in answer.headers["server-timing"]
            # The door is our own, down to its problems and the protocol for machines.
            assert (await http.post("/digit", content=b"no picture")).status_code == 400
            assert (await http.get("/v2/models/digit")).json()["name"] == "digit"
        async with AsyncClient(url) as client:
            alone = [one.label for one in await client.digit(pictures)]
            labels = []
            async for one in client.digit(iter(pictures * 10)):
                labels.append(one.label)
                if len(labels) == 300:
                    assert running.stdin is not None
                    running.stdin.write("kill\n")
                    running.stdin.flush()
        assert labels == alone * 10
        wait_for(running, "killed")
