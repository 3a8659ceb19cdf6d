"""The digit network in LitServe, as https://lightning.ai/docs/litserve says: six verbs, batched.

The picture comes as base64 in JSON: the body is read in one process and goes to another, which a
file of a form does not survive.
"""

import base64

import litserve
from network import MAX_BATCH, PORT, WORKERS, Network, answer, decode

BATCH_SECONDS = 0.001
"""How long a batch waits for company."""


class Digit(litserve.LitAPI):
    """Pictures in, digits out."""

    def setup(self, device: str) -> None:
        """Once in each worker."""
        self._network = Network()

    def decode_request(self, request: dict):  # noqa: ANN201
        """One body."""
        return decode(base64.b64decode(request["image"]))

    def batch(self, inputs: list) -> list:
        """Many inputs to one batch, which `predict` stacks."""
        return inputs

    def predict(self, x: list):  # noqa: ANN201
        """One batch."""
        return self._network.run(list(x))

    def unbatch(self, output):  # noqa: ANN001, ANN201
        """A batch to its rows."""
        return list(output)

    def encode_response(self, output) -> dict:  # noqa: ANN001
        """One answer."""
        return answer(output)


if __name__ == "__main__":
    server = litserve.LitServer(
        Digit(max_batch_size=MAX_BATCH, batch_timeout=BATCH_SECONDS),
        accelerator="cpu",
        workers_per_device=WORKERS,
    )
    server.run(host="127.0.0.1", port=PORT, generate_client_file=False, log_level="warning")
