"""Where networks run and in which precision: the operator's wish, made exact or refused.

`cpu`, `cuda` and `tensorrt` are ONNX Runtime's execution providers; `auto` is `cuda`
where there are a card and an ONNX Runtime for it, and `cpu` elsewhere.
"""

import contextlib
import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import onnxruntime

from service import gpu
from service.models.spec import Room
from service.settings import MEBIBYTE, Settings, cores

PROVIDERS: Final = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}

RUNGS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Batch sizes that a GPU is warmed for; each other size would cost its first caller a slow run."""

EIGHT_BIT_INSTRUCTIONS: Final = ("amx_int8", "asimddp", "avx512_vnni", "avx_vnni")
"""What processors call the instructions that multiply bytes and add up four products at a time."""

NVIDIA_CARDS: Final = Path("/proc/driver/nvidia/gpus")


class ProviderRefused(Exception):
    """The networks cannot run where the operator wants them to. For operators."""


@dataclass(frozen=True)
class Profile:
    """Where networks run.

    Attributes:
        name: `cpu`, `cuda` or `tensorrt`.
        precision: The precision that the operator wants; `auto` for the best there is.
        threads: Threads inside a run on the CPU; 0 for what the card found best.
        cores: How many cores this worker has to itself.
        device_id: Which GPU.
        memory_limit_bytes: What ONNX Runtime may take of the GPU's memory; 0 for all.
        engines: The folder that TensorRT's engines are kept in.
        graphs: Whether a GPU may replay a whole run (CUDA graphs).
    """

    name: str = "cpu"
    precision: str = "auto"
    threads: int = 1
    cores: int = 1
    device_id: int = 0
    memory_limit_bytes: int = 0
    engines: Path = Path("engines")
    graphs: bool = True

    @property
    def is_gpu(self) -> bool:
        """Whether batches are padded to a rung and their places bound."""
        return self.name != "cpu"

    def variants(self, card: Mapping[str, Any]) -> Sequence[str]:
        """The precisions of a version that will do here, best first."""
        if self.precision != "auto":
            return (self.precision,)
        if self.is_gpu:
            return ("fp16", "fp32")
        return ("int8", "fp32", "fp16") if _is_int8_faster(card) else ("fp32", "int8", "fp16")

    def threads_for(self, card: Mapping[str, Any], variant: str) -> int:
        """Threads inside a run of this file on the CPU."""
        if self.threads:
            return self.threads
        best = _measured(card).get("best", {}).get(variant, {})
        return self.cores if self.cores > 1 and best.get("threads", 1) > 1 else 1

    def piece_for(self, card: Mapping[str, Any], variant: str) -> int:
        """How many inputs of a batch run at a time: as many as the card found fastest on a CPU; 0 for all.

        What a larger batch works on no longer fits into a core's cache, and texts would be padded.
        """
        return 0 if self.is_gpu else int(_measured(card).get("best", {}).get(variant, {}).get("batch", 0))

    def providers(self, room: Room, variant: str, *, graphs: bool) -> list[tuple[str, dict[str, str]]]:
        """ONNX Runtime's providers with their options, in the order of preference.

        Args:
            room: The model.
            variant: The file's precision.
            graphs: Whether runs are captured and replayed.
        """
        if self.name == "cpu":
            return [("CPUExecutionProvider", {})]
        cuda = {
            "device_id": str(self.device_id),
            # An exhaustive search takes hundreds of milliseconds for every new shape.
            "cudnn_conv_algo_search": "HEURISTIC",
            "arena_extend_strategy": "kSameAsRequested",
            "use_tf32": "1",
            "enable_cuda_graph": "1" if graphs and self.name == "cuda" else "0",
        }
        if self.memory_limit_bytes:
            cuda["gpu_mem_limit"] = str(self.memory_limit_bytes)
        if self.name == "cuda":
            return [("CUDAExecutionProvider", cuda)]
        cache = str(engine_folder(self.engines, gpu_name(), tensorrt_version(), onnxruntime.__version__))
        shapes = {
            size: ",".join(
                f"{tensor.name}:{'x'.join(str(axis) for axis in (batch, *_lengths(tensor.shape, size)))}"
                for tensor in room.network_inputs
            )
            for size, batch in (("min", 1), ("opt", 8), ("max", 64))
        }
        tensorrt = {
            "device_id": str(self.device_id),
            "trt_fp16_enable": "1" if variant == "fp16" else "0",
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": cache,
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": cache,
            "trt_cuda_graph_enable": "1" if graphs else "0",
            **{f"trt_profile_{size}_shapes": shape for size, shape in shapes.items()},
        }
        return [("TensorrtExecutionProvider", tensorrt), ("CUDAExecutionProvider", cuda)]


def profile_of(settings: Settings) -> Profile:
    """The profile that the settings ask for.

    Raises:
        ProviderRefused: this ONNX Runtime has no such provider.
    """
    there = onnxruntime.get_available_providers()
    name = settings.runtime
    if name == "auto":
        name = "cuda" if PROVIDERS["cuda"] in there and NVIDIA_CARDS.is_dir() else "cpu"
    if PROVIDERS[name] not in there:
        listed = ", ".join(known for known, provider in PROVIDERS.items() if provider in there)
        raise ProviderRefused(
            f"QUINTET_RUNTIME is {settings.runtime}, and the installed ONNX Runtime has {listed} only; "
            "install the `gpu` extra in the place of onnxruntime, or set QUINTET_RUNTIME=cpu."
        )
    return Profile(
        name=name,
        precision=settings.precision,
        threads=settings.threads,
        cores=max(1, cores() // settings.workers),
        device_id=settings.gpu,
        memory_limit_bytes=settings.gpu_memory_mb * MEBIBYTE,
        engines=settings.engines,
        graphs=settings.gpu_graphs,
    )


def refuse_without_gpu(profile: Profile) -> None:
    """What is to run on a GPU needs one: found out here, in a sentence, before ONNX Runtime tries to load.

    Raises:
        ProviderRefused: NVIDIA's library finds none of that number.
    """
    if profile.is_gpu:
        handles, reason = gpu.find()
        if not handles:
            raise ProviderRefused(
                f"QUINTET_RUNTIME asks for {profile.name}, and there is no NVIDIA GPU here ({reason}); "
                "give the container one (docker run --gpus all), or set QUINTET_RUNTIME=cpu."
            )
        if profile.device_id >= len(handles):
            raise ProviderRefused(
                f"QUINTET_GPU is {profile.device_id}, and there are {len(handles)} here, from 0 on."
            )


def refuse_other_provider(name: str, found: Sequence[str]) -> None:
    """What a session runs on must be what was asked for; ONNX Runtime itself would quietly take the CPU.

    Raises:
        ProviderRefused: it is something else.
    """
    if found[0] != PROVIDERS[name]:
        raise ProviderRefused(
            f"QUINTET_RUNTIME asks for {name}, and ONNX Runtime gave {', '.join(found)}: its log says which "
            "library of the GPU it could not load. Install it, or set QUINTET_RUNTIME=cpu."
        )


def rung_of(size: int) -> int:
    """The smallest of `RUNGS` that a batch fits on; beyond the last, the batch's own size."""
    return next((rung for rung in RUNGS if rung >= size), size)


def allows_graphs(card: Mapping[str, Any], variant: str) -> bool:
    """Whether a whole run of this file may be captured: every node on the GPU, and no lengths to work out."""
    placement = card.get("export", {}).get("gpu_placement", {}).get(variant, {})
    return bool(
        placement
        and placement.get("nodes") == placement.get("on_cuda")
        and placement.get("shape_arithmetic", 0) == 0
    )


def engine_folder(root: Path, gpu: str, tensorrt: str, runtime: str) -> Path:
    """Where TensorRT's engines are kept: one built for another GPU or version would not load, or be wrong."""
    key = f"{gpu}-tensorrt{tensorrt}-onnxruntime{runtime}"
    return root / "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in key)


def gpu_name() -> str:
    """What the first NVIDIA card calls itself; `unknown` where none says."""
    with contextlib.suppress(OSError):
        for card in sorted(NVIDIA_CARDS.iterdir()):
            for line in (card / "information").read_text().splitlines():
                if line.startswith("Model:"):
                    return line.partition(":")[2].strip()
    return "unknown"


def tensorrt_version() -> str:
    """The version of the TensorRT library that this process would load; `unknown` where there is none."""
    for name in ("libnvinfer.so.10", "libnvinfer.so"):
        with contextlib.suppress(OSError, AttributeError):
            return str(ctypes.CDLL(name).getInferLibVersion())
    return "unknown"


def eight_bit_instructions() -> list[str]:
    """Which of `EIGHT_BIT_INSTRUCTIONS` this processor has; none where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return sorted(set(EIGHT_BIT_INSTRUCTIONS).intersection(flags.split()))


def _measured(card: Mapping[str, Any]) -> Mapping[str, Any]:
    """What export measured on a CPU; empty where it did not."""
    found: Mapping[str, Any] = card.get("export", {}).get("cpu", {})
    return found


def _is_int8_faster(card: Mapping[str, Any]) -> bool:
    """Whether int8 was faster where it was measured, and this processor has what made it so."""
    measured = _measured(card)
    return measured.get("fastest") == "int8" and bool(
        set(measured.get("instructions", ())) & set(eight_bit_instructions())
    )


def _lengths(shape: Sequence[int], size: str) -> list[int]:
    """A shape with a number for each free length."""
    return [{"min": 1, "opt": 64, "max": 512}[size] if axis < 0 else axis for axis in shape]
