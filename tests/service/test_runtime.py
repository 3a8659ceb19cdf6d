"""Where networks run: the best verified file, the provider that was asked for, and places made beforehand."""

import json
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from service.models.digit import DIGIT
from service.models.spec import Room, Sample, Tensor
from service.providers import (
    RUNGS,
    Profile,
    ProviderRefused,
    allows_graphs,
    eight_bit_instructions,
    engine_folder,
    profile_of,
    refuse_other_provider,
    rung_of,
)
from service.repository import Repository
from service.runtime import Network, NetworkMismatch
from service.settings import Settings
from tests.conftest import MODELS_FOLDER

CPU = Profile()


def card(fastest: str = "int8", instructions: list[str] | None = None, **best: Any) -> dict[str, Any]:
    """A card as export writes it, as far as the runtime reads it."""
    here = eight_bit_instructions() if instructions is None else instructions
    return {"export": {"cpu": {"fastest": fastest, "instructions": here, "best": best}}}


@pytest.mark.parametrize(
    ("profile", "facts", "first"),
    [
        pytest.param(CPU, {}, "fp32", id="cpu-without-a-measurement"),
        pytest.param(CPU, card("fp32"), "fp32", id="cpu-where-int8-is-not-faster"),
        pytest.param(CPU, card("int8", ["other"]), "fp32", id="cpu-without-the-instructions"),
        pytest.param(Profile("cuda"), card(), "fp16", id="cuda"),
        pytest.param(Profile("tensorrt"), {}, "fp16", id="tensorrt"),
        pytest.param(Profile(precision="fp16"), card(), "fp16", id="the-operator-s-word"),
    ],
)
def test_the_best_file_for_where_it_runs(profile: Profile, facts: Mapping[str, Any], first: str) -> None:
    assert profile.variants(facts)[0] == first


@pytest.mark.skipif(not eight_bit_instructions(), reason="this processor multiplies no bytes")
def test_int8_is_taken_where_it_was_faster_and_the_processor_is_alike() -> None:
    assert CPU.variants(card())[0] == "int8"


def test_a_model_without_the_wanted_precision_is_refused_and_auto_takes_what_there_is(tmp_path: Path) -> None:
    shutil.copytree(MODELS_FOLDER / "digit" / "2", tmp_path / "digit" / "2")
    path = tmp_path / "digit" / "2" / "card.json"
    facts = json.loads(path.read_text())
    facts["files"] = {"int8": facts["files"]["fp32"]}
    path.write_text(json.dumps(facts))
    assert Repository(tmp_path).open("digit", None, CPU.variants).variant == "int8"
    with pytest.raises(Exception, match="holds int8, and none of fp16; export one of them"):
        Repository(tmp_path).open("digit", None, Profile(precision="fp16").variants)


def test_auto_is_the_cpu_where_there_is_no_card() -> None:
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        assert profile_of(Settings()).name == "cpu"


@pytest.mark.parametrize("runtime", ["cuda", "tensorrt"])
def test_a_provider_that_is_not_installed_is_refused_in_a_sentence(runtime: str) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has GPU providers")
    with pytest.raises(
        ProviderRefused,
        match=rf"QUINTET_RUNTIME is {runtime}, and the installed ONNX Runtime has cpu only; install the",
    ):
        profile_of(Settings(runtime=runtime))


def test_a_session_that_quietly_took_the_cpu_is_refused() -> None:
    with pytest.raises(ProviderRefused, match="asks for cuda, and ONNX Runtime gave CPUExecutionProvider"):
        refuse_other_provider("cuda", ["CPUExecutionProvider"])
    refuse_other_provider("cuda", ["CUDAExecutionProvider", "CPUExecutionProvider"])


def test_threads_are_what_the_card_found_best_and_the_worker_has() -> None:
    found = card(fp32={"threads": 2}, int8={"threads": 1})
    assert Profile(threads=0, cores=4).threads_for(found, "fp32") == 4
    assert Profile(threads=0, cores=1).threads_for(found, "fp32") == 1
    assert Profile(threads=0, cores=4).threads_for(found, "int8") == 1
    assert Profile(threads=3, cores=1).threads_for({}, "fp32") == 3


def test_graphs_are_captured_only_where_every_node_is_on_the_gpu() -> None:
    def placed(**facts: int) -> dict[str, Any]:
        return {"export": {"gpu_placement": {"fp16": facts}}}

    assert allows_graphs(placed(nodes=28, on_cuda=28, shape_arithmetic=0), "fp16")
    assert not allows_graphs(placed(nodes=28, on_cuda=27, shape_arithmetic=0), "fp16")
    assert not allows_graphs(placed(nodes=28, on_cuda=28, shape_arithmetic=3), "fp16")
    assert not allows_graphs({}, "fp16")


def test_engines_of_another_gpu_or_version_lie_elsewhere() -> None:
    one = engine_folder(Path("engines"), "NVIDIA L4", "10.9", "1.31.1")
    others = [
        engine_folder(Path("engines"), "NVIDIA H100", "10.9", "1.31.1"),
        engine_folder(Path("engines"), "NVIDIA L4", "10.8", "1.31.1"),
        engine_folder(Path("engines"), "NVIDIA L4", "10.9", "1.31.0"),
    ]
    assert len({one, *others}) == 4
    assert one.name == "NVIDIA_L4-tensorrt10.9-onnxruntime1.31.1"


def test_gpu_options_are_those_that_spare_the_first_caller() -> None:
    ((name, options),) = Profile("cuda", memory_limit_bytes=2**30).providers(DIGIT, "fp16", graphs=True)
    assert name == "CUDAExecutionProvider"
    assert options["cudnn_conv_algo_search"] == "HEURISTIC"
    assert options["arena_extend_strategy"] == "kSameAsRequested"
    assert options["enable_cuda_graph"] == "1"
    assert options["gpu_mem_limit"] == str(2**30)
    first, second = Profile("tensorrt").providers(DIGIT, "fp16", graphs=False)
    assert (first[0], second[0]) == ("TensorrtExecutionProvider", "CUDAExecutionProvider")
    assert first[1]["trt_profile_max_shapes"] == "pixels:64x28x28"
    assert first[1]["trt_fp16_enable"] == "1"


# ---------------------------------------------------------------- rungs, on the CPU


@pytest.mark.parametrize(
    ("size", "rung"), [(1, 1), (2, 2), (3, 4), (5, 8), (64, 64), (65, 128), (5000, 5000)]
)
def test_a_batch_goes_on_the_smallest_rung_that_holds_it(size: int, rung: int) -> None:
    assert rung_of(size) == rung


@pytest.fixture(scope="module")
def networks() -> tuple[Network, Network]:
    """The shipped digit network, plain and on rungs."""
    files = Repository(MODELS_FOLDER).open("digit", None, ("fp32",))
    return (
        Network(DIGIT, files.network),
        Network(DIGIT, files.network, CPU, "fp32", files.card, is_bound=True),
    )


def pictures(count: int, seed: int = 0) -> list[Sample]:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 28, 28), np.uint8)
    return [Sample((one,)) for one in pixels]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 33])
def test_rungs_answer_like_the_plain_run(networks: tuple[Network, Network], count: int) -> None:
    plain, bound = networks
    samples = pictures(count)
    right, found = plain.run(samples), bound.run(samples)
    assert len(found) == count
    for (one,), (other,) in zip(right, found, strict=True):
        np.testing.assert_allclose(other, one, atol=1e-6)


def test_a_batch_does_not_see_what_an_earlier_one_left_in_its_place(
    networks: tuple[Network, Network],
) -> None:
    _, bound = networks
    full, few = pictures(8, 1), pictures(5, 2)
    alone = bound.run(few)
    bound.run(full)
    kept = bound.run(few)
    bound.run(full)
    for (one,), (other,) in zip(alone, kept, strict=True):
        np.testing.assert_array_equal(one, other)


def test_every_rung_is_warm_before_anyone_asks() -> None:
    files = Repository(MODELS_FOLDER).open("digit", None, ("fp32",))
    network = Network(DIGIT, files.network, CPU, is_bound=True)
    network.warm_up(pictures(1)[0], max_batch=10)
    assert [key[0] for key in network._rungs] == [rung for rung in RUNGS if rung <= 16]
    assert network.seconds_per_input > 0


def test_threads_may_share_the_rungs(networks: tuple[Network, Network]) -> None:
    plain, bound = networks
    batches = [pictures(1 + seed % 5, seed) for seed in range(24)]
    right = [plain.run(batch) for batch in batches]
    found: dict[int, list[tuple[Any, ...]]] = {}

    def run(numbers: range) -> None:
        for number in numbers:
            found[number] = bound.run(batches[number])

    threads = [threading.Thread(target=run, args=(range(start, 24, 4),)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, rows in enumerate(right):
        for (one,), (other,) in zip(rows, found[number], strict=True):
            np.testing.assert_allclose(other, one, atol=1e-6)


def test_inputs_of_any_length_get_places_of_their_own() -> None:
    room = Room(
        name="sum",
        task="Adds up.",
        takes="texts",
        labels=(),
        inputs=(),
        outputs=(),
        network_inputs=(Tensor("tokens", "INT64", (-1,)),),
        network_outputs=(Tensor("sums", "INT64"),),
        to_tensor=lambda inputs: Sample(()),
        to_answer=lambda row, sample: row[0],
        example={},
    )
    graph = helper.make_graph(
        [helper.make_node("ReduceSum", ["tokens", "axis"], ["sums"], keepdims=0)],
        "sum",
        [helper.make_tensor_value_info("tokens", TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor_value_info("sums", TensorProto.INT64, ["batch"])],
        [helper.make_tensor("axis", TensorProto.INT64, [1], [1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    network = Network(room, model.SerializeToString(), CPU, is_bound=True)
    for lengths in ((3,), (1, 5, 2), (7, 7), *((length,) for length in range(1, 80))):
        samples = [Sample((np.arange(1, length + 1),)) for length in lengths]
        assert [int(row[0]) for row in network.run(samples)] == [
            length * (length + 1) // 2 for length in lengths
        ]
    assert len(network._rungs) <= 64


# ---------------------------------------------------------------- files that do not belong


def test_an_operator_set_newer_than_the_runtime_is_refused_in_a_sentence() -> None:
    model = onnx.load_model_from_string(Repository(MODELS_FOLDER).open("digit", None, ("fp32",)).network)
    model.opset_import[0].version = 99
    with pytest.raises(NetworkMismatch, match="digit: ONNX Runtime cannot open the model"):
        Network(DIGIT, model.SerializeToString())
