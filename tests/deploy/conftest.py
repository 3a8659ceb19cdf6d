"""A service with the smallest model only, for tests that start several, and load that counts what it sees."""

import asyncio
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import MODELS_FOLDER


@pytest.fixture(scope="session")
def digit_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of one model, which is ready within seconds."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(MODELS_FOLDER / "digit", folder / "digit")
    return folder


class Load:
    """Callers, each on a connection of their own, who keep count of what becomes of their requests."""

    LOST = "lost"
    """No answer: the connection broke while a request was under way."""

    def __init__(self, url: str, picture: bytes) -> None:
        self._url = url
        self._picture = picture
        self.seen: Counter[str] = Counter()

    async def send(self, count: int, callers: int = 8) -> None:
        """Ask `count` times in all."""
        await self.send_while(iter(range(count)), callers)

    async def send_while(self, left: Iterator[int], callers: int = 8) -> None:
        """Ask once for each that is `left`."""
        await asyncio.gather(*(self._ask(left) for _ in range(callers)))

    async def _ask(self, left: Iterator[int]) -> None:
        async with httpx.AsyncClient(base_url=self._url, trust_env=False, timeout=60) as client:
            for _ in left:
                try:
                    response = await client.post("/digit", content=self._picture)
                except httpx.TransportError:
                    self.seen[self.LOST] += 1
                else:
                    self.seen["ok" if response.status_code == 200 else str(response.status_code)] += 1
