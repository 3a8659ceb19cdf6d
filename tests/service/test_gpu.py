"""What only a GPU can show: `pytest -m gpu` where there is one, skipped with the reason elsewhere."""

import subprocess
from collections.abc import Iterator

import numpy as np
import onnxruntime
import pytest

from service.models import MODELS
from service.models.spec import Array, Room, Sample
from service.providers import NVIDIA_CARDS, RUNGS, Profile
from service.repository import ModelFiles, Repository
from service.runtime import Network
from tests.conftest import MODELS_FOLDER

THERE = onnxruntime.get_available_providers()

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("CUDAExecutionProvider" not in THERE, reason="this ONNX Runtime has no CUDA provider"),
    pytest.mark.skipif(not NVIDIA_CARDS.is_dir(), reason="this machine has no NVIDIA card"),
]

MOST_DIFFERENT = 0.02
"""Between a GPU's fp16 and the CPU's fp32, as a share of the largest number of that output."""


def shipped() -> list[str]:
    """The models that have a version."""
    repository = Repository(MODELS_FOLDER)
    return [name for name in MODELS if name in repository.models() and repository.versions(name)]


@pytest.fixture(params=shipped())
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["cuda", "tensorrt"])
def profile(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    if request.param == "tensorrt" and "TensorrtExecutionProvider" not in THERE:
        pytest.skip("this ONNX Runtime has no TensorRT provider")
    return Profile(request.param, engines=tmp_path_factory.mktemp("engines"))


def opened(model: str, profile: Profile) -> tuple[Room, ModelFiles, Network]:
    files = Repository(MODELS_FOLDER).open(model, None, profile.variants)
    room = files.furnish(MODELS[model])
    return room, files, Network(room, files.network, profile, files.variant, files.card)


@pytest.fixture
def samples(model: str) -> list[Sample]:
    """The room's example, several times: enough for three rungs."""
    files = Repository(MODELS_FOLDER).open(model)
    room = files.furnish(MODELS[model])
    return [room.to_tensor(room.example)] * 8


def outputs(network: Network, samples: list[Sample]) -> Iterator[Array]:
    """Each output of the network, [n, ...]."""
    for values in zip(*network.run(samples), strict=True):
        yield np.stack(values)


def test_a_gpu_answers_like_the_cpu(model: str, profile: Profile, samples: list[Sample]) -> None:
    _, _, on_gpu = opened(model, profile)
    _, _, on_cpu = opened(model, Profile())
    for found, right in zip(outputs(on_gpu, samples), outputs(on_cpu, samples), strict=True):
        # What a detector is unsure of may come in another order: its surest answer does not.
        surest = (found.reshape(len(found), -1)[:, 0], right.reshape(len(right), -1)[:, 0])
        np.testing.assert_allclose(*surest, atol=MOST_DIFFERENT * max(1.0, float(np.abs(right).max())))


def test_no_node_falls_back_to_the_cpu(model: str) -> None:
    files = Repository(MODELS_FOLDER).open(model, None, Profile("cuda").variants)
    room = files.furnish(MODELS[model])
    placement = files.card["export"]["gpu_placement"][files.variant]
    options = onnxruntime.SessionOptions()
    if not placement["shape_arithmetic"]:
        # ONNX Runtime itself then refuses a graph of which it would leave a node to the CPU.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    providers = Profile("cuda").providers(room, files.variant, graphs=False)
    session = onnxruntime.InferenceSession(files.network, options, providers=providers)
    assert session.get_providers()[0] == "CUDAExecutionProvider"


def test_a_replayed_run_equals_a_plain_one(model: str, samples: list[Sample]) -> None:
    _, _, replaying = opened(model, Profile("cuda"))
    _, _, plain = opened(model, Profile("cuda", graphs=False))
    for count in (1, 3, 8, 3, 1):
        few = samples[:count]
        for found, right in zip(outputs(replaying, few), outputs(plain, few), strict=True):
            np.testing.assert_allclose(found, right, atol=1e-3 * max(1.0, float(np.abs(right).max())))


def test_memory_stays_flat(model: str, profile: Profile, samples: list[Sample]) -> None:
    _, _, network = opened(model, profile)
    network.warm_up(samples[0], max_batch=8)
    before = memory_mb()
    for turn in range(300):
        network.run(samples[: 1 + turn % len(samples)])
    assert memory_mb() <= before + 16
    assert len(network._rungs) <= len(RUNGS)


def memory_mb() -> int:
    """What all processes together hold of the first GPU's memory, in mebibytes."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0])
