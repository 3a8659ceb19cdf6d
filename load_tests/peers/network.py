"""What every peer in an environment of its own serves: a PNG in, the digit and its probabilities out.

The peers' scripts run outside of this project's environment and import nothing of it but this
file, which lies beside them. The network is the very file that the service takes, named by
`PEER_NETWORK`, in a session with the service's own options: what differs is the serving.
"""

import os

import numpy as np
import numpy.typing as npt
import onnxruntime
from kornia_rs.io import decode_image_png_u8

LABELS = tuple("0123456789")
MAX_BATCH = 64
PORT = int(os.environ.get("PEER_PORT", "8000"))
WORKERS = int(os.environ.get("PEER_WORKERS", "1"))


class Network:
    """The ONNX file in a session of one thread."""

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        path = os.environ["PEER_NETWORK"]
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(self, pixels: list[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
        """Pictures uint8 [28, 28] to their probabilities, float32 [n, 10]."""
        (probabilities,) = self._session.run(["probabilities"], {"pixels": np.stack(pixels)})
        return probabilities


def decode(picture: bytes | memoryview) -> npt.NDArray[np.uint8]:
    """A PNG that is like MNIST's already to uint8 [28, 28].

    With the service's own decoder, at once. The service also looks whether the file is one for it, and
    whether the digit is like MNIST's: a peer is spared that.
    """
    # Mosec hands over a view.
    pixels: npt.NDArray[np.uint8] = decode_image_png_u8(bytes(picture), (28, 28), "mono")
    return pixels.reshape(28, 28)


def answer(probabilities: npt.NDArray[np.float32]) -> dict[str, object]:
    """The answer that the service gives for one picture."""
    values = probabilities.tolist()
    confidence = max(values)
    by_label = dict(zip(LABELS, values, strict=True))
    return {"label": LABELS[values.index(confidence)], "confidence": confidence, "probabilities": by_label}
