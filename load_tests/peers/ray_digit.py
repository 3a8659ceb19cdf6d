"""The digit network in Ray Serve, as https://docs.ray.io/en/latest/serve says: replicas that batch."""

import os
import shutil
import signal
import sys
import tempfile
import time

# One machine, one caller: no tokens to be kept, and no reports to anybody.
os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")
# Few cores start its dozen processes slowly; it would give up the proxy before that has begun.
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")

import ray
from network import MAX_BATCH, PORT, WORKERS, Network, answer, decode
from ray import serve
from starlette.requests import Request

WAIT_SECONDS = 0.001
"""How long a batch waits for company."""


@serve.deployment(
    num_replicas=WORKERS, max_ongoing_requests=2 * MAX_BATCH, ray_actor_options={"num_cpus": 0.5}
)
class Digit:
    """Pictures in, digits out."""

    def __init__(self) -> None:
        self._network = Network()

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=WAIT_SECONDS)
    async def run(self, pixels: list) -> list:
        """One batch."""
        return [answer(row) for row in self._network.run(pixels)]

    async def __call__(self, request: Request) -> dict:
        """One request."""
        return await self.run(decode(await request.body()))


def main() -> None:
    """Serve until told to stop, and leave nothing behind."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit())
    # Ray's sockets lie in it, whose paths may not be long.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    try:
        ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False, _temp_dir=folder)
        serve.start(http_options={"host": "127.0.0.1", "port": PORT, "access_log": False})
        quiet = Digit.options(logging_config={"enable_access_log": False})
        serve.run(quiet.bind(), route_prefix="/digit")
        while True:
            time.sleep(1)
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
