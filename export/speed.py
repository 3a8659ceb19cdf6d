"""How fast each precision of a model is on this processor, measured side by side."""

import platform
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from export.graphs import quiet_session
from service.matrix_units import suited
from service.models.spec import Array
from service.providers import eight_bit_instructions
from service.runtime import CPU
from service.settings import cores

BATCHES: Final = (1, 2, 8, 32)
ROUNDS: Final = 2
SECONDS: Final = 0.1
"""Of one core's time: how long one setting is measured in one round."""

NEARLY_AS_FAST: Final = 0.97
"""Of batches whose speeds differ by less than this, the smallest: it needs less memory and less company."""

CLEARLY_FASTER: Final = 1.05
"""A precision that loses digits must be this much faster before it is preferred."""


def processor() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def measure(networks: Mapping[str, bytes], batches: Mapping[int, Sequence[Array]]) -> dict[str, Any]:
    """Items per second of each network at its best setting, in rounds that take turns.

    A setting is a batch size, and the cores either as lanes (runs at the same time, a thread
    each) or as threads inside one run. What is measured is processor time, so that whatever
    else runs on the machine does not count; the best of the rounds, because it only slows.

    Args:
        networks: ONNX files by precision, fp32 among them.
        batches: Real inputs of each batch size, by size.

    Returns:
        What the card says as `export.cpu`.
    """
    ways = sorted({(1, 1), (cores(), 1), (1, cores())})
    sessions = {
        (name, threads): quiet_session(network, threads=threads)
        for name, network in ((name, suited(network, CPU)) for name, network in networks.items())
        for threads in {threads for _, threads in ways}
    }
    rates: dict[tuple[str, int, int, int], float] = {}
    for _ in range(ROUNDS):
        for (lanes, threads), size, name in (
            (way, size, name) for way in ways for size in batches for name in networks
        ):
            session = sessions[name, threads]
            feed = dict(zip((one.name for one in session.get_inputs()), batches[size], strict=True))
            rate = size * _runs_per_second(session, feed, lanes, threads)
            key = (name, size, lanes, threads)
            rates[key] = max(rates.get(key, 0.0), rate)
    best = {}
    for name in networks:
        fastest = max(rate for key, rate in rates.items() if key[0] == name)
        good = [key for key, rate in rates.items() if key[0] == name and rate >= NEARLY_AS_FAST * fastest]
        _, size, lanes, threads = min(good, key=lambda key: (key[1], -rates[key]))
        rate = rates[name, size, lanes, threads]
        best[name] = {"items_per_second": round(rate, 1), "batch": size, "lanes": lanes, "threads": threads}
    chosen = "fp32"
    for name in networks:
        if best[name]["items_per_second"] > CLEARLY_FASTER * best[chosen]["items_per_second"]:
            chosen = name
    return {
        "processor": processor(),
        "instructions": eight_bit_instructions(),
        "cores": cores(),
        "best": best,
        "fastest": chosen,
    }


def _runs_per_second(session: Any, feed: Mapping[str, Array], lanes: int, threads: int) -> float:
    """How often a session runs in a second of all the cores that it uses, in so many lanes at a time."""

    def run(_: int) -> int:
        count = 0
        while time.process_time() < end:
            session.run(None, feed)
            count += 1
        return count

    session.run(None, feed)
    used = lanes * threads
    started = time.process_time()
    end = started + SECONDS * used
    if lanes == 1:
        count = run(0)
    else:
        with ThreadPoolExecutor(lanes) as pool:
            count = sum(pool.map(run, range(lanes)))
    return count * used / (time.process_time() - started)
