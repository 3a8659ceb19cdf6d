"""The digit network behind BentoML's own batching, the way its documentation says.

https://docs.bentoml.com/en/latest/get-started/adaptive-batching.html: a method marked
`batchable=True` takes one list or array whose first axis is the batch and gives one of
the same length. Pictures come as multipart files, arrays as JSON; both are measured, and
the better one counts. BentoML's metrics and access log are switched off.
"""

from typing import Annotated, Any

import bentoml
import numpy as np
from bentoml.validators import DType, Shape
from PIL.Image import Image

from load_tests.peers import served
from service.models.digit import DIGIT, SIDE, like_mnist
from service.models.spec import Array, Sample
from service.settings import Settings

Pictures = Annotated[np.ndarray, DType("uint8"), Shape((-1, SIDE, SIDE))]
Probabilities = Annotated[np.ndarray, DType("float32"), Shape((-1, len(DIGIT.labels)))]


@bentoml.service(
    workers=Settings().workers,
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
)
class Peer:
    """One network in every worker, asked by two batchable methods."""

    def __init__(self) -> None:
        _, _, self._network = served(DIGIT, Settings())

    def _run(self, pixels: list[Array]) -> Array:
        rows = self._network.run([Sample((one,)) for one in pixels])
        return np.stack([probabilities for (probabilities,) in rows])

    @bentoml.api(batchable=True, max_batch_size=64)
    def pictures(self, images: list[Image]) -> list[dict[str, Any]]:
        """Pictures of any size, as multipart files named `images`."""
        grey = [like_mnist(np.asarray(image.convert("L"))) for image in images]
        return [DIGIT.to_answer((row,), Sample(())).as_json() for row in self._run(grey)]

    @bentoml.api(batchable=True, max_batch_size=64)
    def arrays(self, pixels: Pictures) -> Probabilities:
        """Pictures that are like MNIST's already, as JSON lists of numbers."""
        return self._run(list(pixels))
