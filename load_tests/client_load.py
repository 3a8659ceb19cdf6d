"""Load through our own Python client: so many callers in one process, each waiting for its answer.

python -m load_tests.client_load http://127.0.0.1:3000 5 32 seven.png
"""

import asyncio
import json
import sys
import time
from pathlib import Path

import numpy as np
import uvloop
from quintet_client import AsyncClient, QuintetError


async def run(url: str, pictures: list[bytes], seconds: float, callers: int) -> dict[str, float]:
    """Ask about digits for a while; what came of it."""
    latencies: list[float] = []
    errors = 0
    async with AsyncClient(url, retries=0) as quintet:
        began = time.perf_counter()

        async def call() -> None:
            nonlocal errors
            while (asked := time.perf_counter()) < began + seconds:
                try:
                    await quintet.digit(pictures[len(latencies) % len(pictures)])
                except QuintetError:
                    errors += 1
                else:
                    latencies.append(time.perf_counter() - asked)

        await asyncio.gather(*(call() for _ in range(callers)))
        took = time.perf_counter() - began
    p50, p95, p99 = (float(share) * 1000 for share in np.percentile(latencies or [0.0], (50, 95, 99)))
    return {
        "requests": len(latencies), "seconds": took, "p50_ms": p50, "p95_ms": p95, "p99_ms": p99,
        "not_ok": errors, "socket_errors": 0,
    }  # fmt: skip


def main() -> None:
    """Ask, and say in one line of JSON what came of it."""
    url, seconds, callers, *files = sys.argv[1:]
    pictures = [Path(file).read_bytes() for file in files]
    print(json.dumps(uvloop.run(run(url, pictures, float(seconds), int(callers)))))


if __name__ == "__main__":
    main()
