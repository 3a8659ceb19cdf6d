"""The digit network in MLServer, as https://docs.seldon.ai/mlserver says: a custom runtime, batched.

`python mlserver_digit.py FOLDER` writes the folder's settings and becomes `mlserver start FOLDER`.
"""

import json
import os
import sys
from pathlib import Path

from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse
from network import MAX_BATCH, PORT, WORKERS, Network

WAIT_SECONDS = 0.001
"""How long a batch waits for company."""


class Digit(MLModel):
    """Pixels in, probabilities out."""

    async def load(self) -> bool:
        """Once in each worker."""
        self._network = Network()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """One batch, uint8 [n, 28, 28]."""
        pixels = NumpyCodec.decode_input(payload.inputs[0]).astype("uint8", copy=False)
        probabilities = self._network.run(list(pixels))
        output = NumpyCodec.encode_output("probabilities", probabilities)
        return InferenceResponse(model_name=self.name, id=payload.id, outputs=[output])


def write_settings(folder: Path) -> None:
    """The folder that `mlserver start` reads."""
    server = {
        "host": "127.0.0.1",
        "http_port": PORT,
        "grpc_port": PORT + 1,
        "metrics_endpoint": None,
        "parallel_workers": WORKERS if WORKERS > 1 else 0,
        "debug": False,
        "use_structured_logging": False,
    }
    model = {
        "name": "digit",
        "implementation": "mlserver_digit.Digit",
        "max_batch_size": MAX_BATCH,
        "max_batch_time": WAIT_SECONDS,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.json").write_text(json.dumps(server))
    (folder / "model-settings.json").write_text(json.dumps(model))


def main() -> None:
    """Become MLServer."""
    folder = Path(sys.argv[1])
    write_settings(folder)
    # Its workers import this file by its name.
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    program = Path(sys.executable).with_name("mlserver")
    os.execv(program, [str(program), "start", str(folder)])


if __name__ == "__main__":
    main()
