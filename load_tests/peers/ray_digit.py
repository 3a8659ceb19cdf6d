"""The digit network in Ray Serve, as https://docs.ray.io/en/latest/serve says: replicas that batch."""

import time

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


if __name__ == "__main__":
    ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT, "access_log": False})
    serve.run(Digit.options(logging_config={"enable_access_log": False}).bind(), route_prefix="/digit")
    while True:
        time.sleep(1)
