"""The barest server of the digit network: how fast the same decode, batches and session can be.

No routes, no limits, no deadlines, no errors, no metrics: what the service takes beyond
this is the price of being a service. Run by `uvicorn --factory`.
"""

import orjson

from load_tests.peers import served
from service.batcher import Batcher
from service.http import Receive, Scope, Send
from service.lanes import Lanes
from service.loaded_model import runs_inline
from service.models.digit import DIGIT
from service.settings import Settings


class Bare:
    """An ASGI application that answers every request as if it were `POST /digit` with one picture."""

    def __init__(self, settings: Settings) -> None:
        _, files, network = served(DIGIT, settings)
        # On the event loop or in a lane, by the rule that the service goes by.
        milliseconds = network.seconds_per_input * 1000
        inline = runs_inline(network, settings.inline_ms)
        fits_inline = max(1, int(settings.inline_ms / milliseconds))
        self._version = str(files.version)
        self._batcher = Batcher(
            network.run,
            make_samples=DIGIT.samples,
            queue_size=settings.queue_size,
            max_batch=min(settings.max_batch, fits_inline) if inline else settings.max_batch,
            lanes=None if inline else Lanes(settings.lanes),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read one picture, whose bytes come in one piece, and answer."""
        body = (await receive())["body"]
        self._batcher.admit(1)
        job = await self._batcher.run([{"image": body}], None, None)
        prediction = DIGIT.to_answer(job.rows[0], job.samples[0]).as_json()
        answer = orjson.dumps({"model": DIGIT.name, "version": self._version, "predictions": [prediction]})
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(answer))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})


def application() -> Bare:
    """The application, for `uvicorn --factory load_tests.peers.bare_asgi:application`."""
    return Bare(Settings())
