"""A network in Triton's Python backend; `triton_server.py` puts this into the model repository as `model.py`.

https://docs.nvidia.com/deeplearning/triton-inference-server: `execute` is given the requests that
the dynamic batcher gathered, and answers each; here all of them run as one batch.
"""

import os
import sys

# The backend's own interpreter knows nothing of the environment that Triton came in.
sys.path[:0] = os.environ["PEER_PYTHONPATH"].split(os.pathsep)

import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402
import triton_python_backend_utils as triton  # noqa: E402


class TritonPythonModel:
    """Pixels in, probabilities out."""

    def initialize(self, args: dict[str, str]) -> None:
        """Once in each instance."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        path = os.environ["PEER_NETWORK"]
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def execute(self, requests: list) -> list:
        """One batch."""
        pixels = [triton.get_input_tensor_by_name(request, "pixels").as_numpy() for request in requests]
        batch = pixels[0] if len(pixels) == 1 else np.concatenate(pixels)
        (probabilities,) = self._session.run(["probabilities"], {"pixels": batch})
        responses, start = [], 0
        for one in pixels:
            rows = probabilities[start : start + len(one)]
            start += len(one)
            responses.append(triton.InferenceResponse([triton.Tensor("probabilities", rows)]))
        return responses
