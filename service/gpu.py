"""What NVIDIA's library (NVML) says of the GPUs: whether there are any, and how busy they are.

The numbers are the device's, not a worker's, so they are asked for when Prometheus asks and are
never added up.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any, Final

import pynvml
from prometheus_client.core import GaugeMetricFamily, Metric

FAMILIES: Final = {
    "quintet_gpu_busy_ratio": "Share of the last moments in which the GPU ran something.",
    "quintet_gpu_memory_used_bytes": "Memory of the GPU that is taken, by whomever.",
    "quintet_gpu_memory_bytes": "Memory that the GPU has.",
    "quintet_gpu_celsius": "How warm it is.",
    "quintet_gpu_watts": "What it draws.",
}
"""By name; each is labelled by `gpu`, its number."""


@cache
def find() -> tuple[list[Any], str]:
    """NVML's handles of the GPUs, in their order; where there are none, why."""
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as error:
        return [], str(error)
    return handles, "" if handles else "No devices"


def families() -> Iterator[Metric]:
    """The numbers of this moment; nothing where there is no GPU."""
    handles, _ = find()
    if not handles:
        return
    metrics = {name: GaugeMetricFamily(name, words, labels=("gpu",)) for name, words in FAMILIES.items()}
    for number, handle in enumerate(handles):
        for name, value in _numbers(handle).items():
            metrics[name].add_metric((str(number),), value)
    yield from metrics.values()


def _numbers(handle: Any) -> dict[str, float]:
    """By family; without those that this GPU does not say."""
    numbers: dict[str, float] = {}
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        numbers["quintet_gpu_memory_used_bytes"] = memory.used
        numbers["quintet_gpu_memory_bytes"] = memory.total
        numbers["quintet_gpu_busy_ratio"] = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
        numbers["quintet_gpu_celsius"] = pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)
        numbers["quintet_gpu_watts"] = pynvml.nvmlDeviceGetPowerUsage(handle) / 1000
    except pynvml.NVMLError:
        # Cards differ in what they tell; what came before the refusal is right.
        pass
    return numbers
