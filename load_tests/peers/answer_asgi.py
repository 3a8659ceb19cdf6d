"""The barest ASGI server without a network: it decodes, and gives everybody the example's answer.

What serving costs when nothing is computed; with the bare network's own cost it makes the limit.
Run by `uvicorn --factory`.
"""

import numpy as np
import orjson

from load_tests.peers import room_to_serve, served
from service.http import Receive, Scope, Send
from service.models.spec import Room
from service.settings import Settings


class Answering:
    """An ASGI application for one model: takes what people send, or a raw tensor, and answers at once."""

    def __init__(self, room: Room, settings: Settings) -> None:
        self._room, files, network = served(room, settings)
        self._version = str(files.version)
        sample = self._room.to_tensor(room.example)
        (self._row,) = network.run([sample])
        self._dtype = room.network_inputs[0].dtype

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read one request, whose bytes come in one piece, and answer."""
        body = (await receive())["body"]
        if scope["path"].startswith("/v2"):
            answer, headers = self._tensors(scope, body)
        else:
            answer, headers = self._prediction(body), [(b"content-type", b"application/json")]
        headers.append((b"content-length", b"%d" % len(answer)))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    def _prediction(self, body: bytes) -> bytes:
        if self._room.takes == "texts":
            (text,) = orjson.loads(body)["texts"]
            sample = self._room.to_tensor({"text": text.encode()})
        else:
            sample = self._room.to_tensor({"image": body})
        prediction = self._room.to_answer(self._row, sample).as_json()
        return orjson.dumps({"model": self._room.name, "version": self._version, "predictions": [prediction]})

    def _tensors(self, scope: Scope, body: bytes) -> tuple[bytes, list[tuple[bytes, bytes]]]:
        length = int(dict(scope["headers"])[b"inference-header-content-length"])
        (described,) = orjson.loads(body[:length])["inputs"]
        pixels = np.frombuffer(body, self._dtype, offset=length).reshape(described["shape"])
        sample = self._room.to_tensor({"pixels": pixels[0]})
        probabilities = self._room.to_answer(self._row, sample).as_tensor("probabilities")
        output = {
            "name": "probabilities",
            "datatype": "FP32",
            "shape": [1, *probabilities.shape],
            "parameters": {"binary_data_size": probabilities.nbytes},
        }
        head = orjson.dumps(
            {"model_name": self._room.name, "model_version": self._version, "outputs": [output]}
        )
        headers = [
            (b"content-type", b"application/octet-stream"),
            (b"inference-header-content-length", b"%d" % len(head)),
        ]
        return head + probabilities.tobytes(), headers


def application() -> Answering:
    """The application, for `uvicorn --factory load_tests.peers.answer_asgi:application`."""
    return Answering(room_to_serve(), Settings())
