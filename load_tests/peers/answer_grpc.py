"""The barest gRPC server without a network: it decodes, and gives everybody the example's answer.

`grpc.aio` on uvloop, a process per worker on one port (SO_REUSEPORT).
"""

import multiprocessing
from typing import Any

import grpc
import numpy as np
import uvloop

from load_tests.peers import room_to_serve, served
from service.models.spec import Room
from service.proto import grpc_service_pb2 as pb
from service.settings import Settings


class Answering:
    """Answers `ModelInfer` for one model, whose input is one raw tensor."""

    def __init__(self, room: Room, settings: Settings) -> None:
        self._room, files, network = served(room, settings)
        self._version = str(files.version)
        (self._row,) = network.run([self._room.to_tensor(room.example)])
        self._dtype = room.network_inputs[0].dtype

    async def infer(self, request: Any, context: Any) -> Any:
        """Read one request and answer."""
        pixels = np.frombuffer(request.raw_input_contents[0], self._dtype).reshape(request.inputs[0].shape)
        sample = self._room.to_tensor({"pixels": pixels[0]})
        probabilities = self._room.to_answer(self._row, sample).as_tensor("probabilities")
        response = pb.ModelInferResponse(
            model_name=self._room.name, model_version=self._version, id=request.id
        )
        response.outputs.add(name="probabilities", datatype="FP32", shape=[1, *probabilities.shape])
        response.raw_output_contents.append(probabilities.tobytes())
        return response


async def serve(address: str) -> None:
    """Answer for ever."""
    call = grpc.unary_unary_rpc_method_handler(
        Answering(room_to_serve(), Settings()).infer,
        request_deserializer=pb.ModelInferRequest.FromString,
        response_serializer=pb.ModelInferResponse.SerializeToString,
    )
    server = grpc.aio.server(options=[("grpc.so_reuseport", 1)])
    service = "inference.GRPCInferenceService"
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {"ModelInfer": call})])
    server.add_insecure_port(address)
    await server.start()
    await server.wait_for_termination()


def work(address: str) -> None:
    """One worker."""
    uvloop.run(serve(address))


def main() -> None:
    """Start the workers that the settings say."""
    address = f"127.0.0.1:{Settings().grpc_port}"
    # A fork would inherit threads of grpc's that do not run in it.
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=(address,)) for _ in range(Settings().workers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


if __name__ == "__main__":
    main()
