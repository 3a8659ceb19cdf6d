"""The digit network in mosec, as https://mosecorg.github.io/mosec/ says.

One stage that reads the body itself (`deserialize`) and runs batches; the Rust front end gathers them.
"""

from mosec import Server, Worker
from network import MAX_BATCH, WORKERS, Network, answer, decode

WAIT_MS = 1
"""How long a batch waits for company: mosec's default of 10 ms only slows it down here."""


class Digit(Worker):
    """Pictures in, digits out."""

    def __init__(self) -> None:
        super().__init__()
        self._network = Network()

    def deserialize(self, data: bytes):  # noqa: ANN201
        """One body."""
        return decode(data)

    def forward(self, data: list) -> list:
        """One batch."""
        return [answer(row) for row in self._network.run(data)]


if __name__ == "__main__":
    server = Server()
    server.append_worker(Digit, num=WORKERS, max_batch_size=MAX_BATCH, max_wait_time=WAIT_MS)
    server.run()
