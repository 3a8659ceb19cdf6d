"""Triton on a CPU, out of the package nvidia-pytriton: its own server, with a network in its Python backend.

`python triton_server.py FOLDER` writes the model repository into the folder and becomes Triton.
Run by the interpreter of the environment that the package is in.
"""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

SITE_PACKAGES = Path(sysconfig.get_path("purelib"))
HOME = SITE_PACKAGES / "pytriton" / "tritonserver"

SHAPES = {"digit": "28, 28", "image": "32, 32, 3"}

CONFIG = """
name: "{model}"
backend: "python"
max_batch_size: 64
input [ {{ name: "pixels" data_type: TYPE_UINT8 dims: [ {shape} ] }} ]
output [ {{ name: "probabilities" data_type: TYPE_FP32 dims: [ 10 ] }} ]
dynamic_batching {{ }}
instance_group [ {{ kind: KIND_CPU count: {instances} }} ]
"""


def write_repository(folder: Path, model: str, instances: int) -> None:
    """A model repository with one version of one model."""
    version = folder / model / "1"
    version.mkdir(parents=True, exist_ok=True)
    config = CONFIG.format(model=model, shape=SHAPES[model], instances=instances)
    (folder / model / "config.pbtxt").write_text(config)
    shutil.copy(Path(__file__).with_name("triton_network.py"), version / "model.py")


def lay_stub() -> None:
    """Put the Python backend's helper for this Python where Triton looks for it.

    PyTriton does the same for its own users at every start.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = HOME / "python_backend_stubs" / version / "triton_python_backend_stub"
    shutil.copy(stub, HOME / "backends" / "python" / stub.name)


def main() -> None:
    """Become Triton."""
    repository = Path(sys.argv[1])
    write_repository(repository, os.environ["PEER_MODEL"], int(os.environ["PEER_WORKERS"]))
    lay_stub()
    libraries = [str(SITE_PACKAGES / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR")]
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join(libraries)
    os.environ["PEER_PYTHONPATH"] = str(SITE_PACKAGES)
    server = HOME / "bin" / "tritonserver"
    os.execv(
        server,
        [
            str(server),
            f"--model-repository={repository}",
            f"--backend-directory={HOME / 'backends'}",
            f"--http-port={os.environ['PEER_PORT']}",
            f"--grpc-port={os.environ['PEER_GRPC_PORT']}",
            "--http-address=127.0.0.1",
            "--grpc-address=127.0.0.1",
            "--allow-metrics=false",
        ],
    )


if __name__ == "__main__":
    main()
