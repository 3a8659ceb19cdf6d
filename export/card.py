"""`card.json`: what a version is, what it was measured to do, and where it came from."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx
import onnxruntime

from export.proof import Proof
from service.models.spec import Room


@dataclass(frozen=True)
class Exported:
    """One variant of a model, proven.

    Attributes:
        path: The file's name inside its version's folder.
        network: The ONNX file.
        proof: What was found when it was compared with the trained network.
    """

    path: str
    network: bytes
    proof: Proof


def card(
    room: Room, version: int, checkpoint: Mapping[str, Any], variants: Mapping[str, Exported]
) -> dict[str, Any]:
    """The card of a new version, as the contract lays it out.

    Args:
        room: The model.
        version: The version's number.
        checkpoint: The card of the training run that the version was made from. What it
            says beyond the contract (`arch`, `seeds`) is kept.
        variants: The version's files, by precision.
    """
    main = next(iter(variants.values())).proof
    ours: dict[str, Any] = {
        "model": room.name,
        "version": str(version),
        "arch": checkpoint["arch"],
        "task": room.task,
        "labels": list(room.labels),
        "files": {
            variant: {
                "path": exported.path,
                "bytes": len(exported.network),
                "sha256": hashlib.sha256(exported.network).hexdigest(),
            }
            for variant, exported in variants.items()
        },
        "scores": {variant: exported.proof.scores for variant, exported in variants.items()},
        "data": checkpoint["data"],
        "training": {**checkpoint["training"], "checkpoint_sha256": checkpoint["weights"]["sha256"]},
        "export": {
            "opset": main.opset,
            "nodes": main.nodes,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
            "examples": main.examples,
            "largest_difference": main.largest_difference,
            "mean_difference": main.mean_difference,
            "largest_neighbour_difference": main.largest_neighbour_difference,
        },
    }
    # The checkpoint's weights stay in the run's folder; their sha256 above says which they were.
    return ours | {name: fact for name, fact in checkpoint.items() if name not in (*ours, "weights")}
