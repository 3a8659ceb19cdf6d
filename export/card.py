"""`card.json`: what a version is, what it was measured to do, and where it came from."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx
import onnxruntime

from export.placement import Placement
from export.proof import Proof
from service.models.spec import Room


@dataclass(frozen=True)
class Exported:
    """One variant of a model, proven.

    Attributes:
        path: The file's name inside its version's folder.
        network: The ONNX file.
        proof: What was found when it was compared with the network it was made from.
        facts: How its precision was reached.
        placement: Where its nodes run on a GPU; None for what is not for GPUs.
    """

    path: str
    network: bytes
    proof: Proof
    facts: Mapping[str, Any] = field(default_factory=dict)
    placement: Placement | None = None


def card(
    room: Room,
    version: int,
    source: Mapping[str, Any],
    variants: Mapping[str, Exported],
    *,
    made_from: Mapping[str, Any],
    cpu: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The card of a new version, as the contract lays it out.

    Args:
        room: The model.
        version: The version's number.
        source: The card of the training run, or of the older version, that this one was made
            from. What it says beyond the contract (`arch`, `seeds`) is kept.
        variants: The version's files, by precision.
        made_from: What the files were compared with.
        cpu: How fast each precision is, as `speed.measure` found; None where there is but one.
    """
    main = next(iter(variants.values())).proof
    weights = {"checkpoint_sha256": source["weights"]["sha256"]} if "weights" in source else {}
    ours: dict[str, Any] = {
        "model": room.name,
        "version": str(version),
        "arch": source["arch"],
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
        "data": source["data"],
        "training": {**source["training"], **weights},
        "export": {
            "opset": main.opset,
            "nodes": main.nodes,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
            "examples": main.examples,
            "largest_difference": main.largest_difference,
            "mean_difference": main.mean_difference,
            "largest_neighbour_difference": main.largest_neighbour_difference,
            "made_from": dict(made_from),
            "variants": {
                variant: {
                    "nodes": exported.proof.nodes,
                    "largest_difference": exported.proof.largest_difference,
                    "mean_difference": exported.proof.mean_difference,
                    "largest_neighbour_difference": exported.proof.largest_neighbour_difference,
                    "same_decisions": exported.proof.same_decisions,
                    "score_differences": exported.proof.score_differences,
                    **_known("largest_activation", exported.proof.largest_activation),
                    **exported.facts,
                }
                for variant, exported in variants.items()
            },
            "gpu_placement": {
                variant: exported.placement.facts()
                for variant, exported in variants.items()
                if exported.placement is not None
            },
            **_known("cpu", cpu),
        },
    }
    # The checkpoint's weights stay in the run's folder; their sha256 above says which they were.
    return ours | {name: fact for name, fact in source.items() if name not in (*ours, "weights")}


def _known(name: str, fact: Any) -> dict[str, Any]:
    """The fact under its name; nothing where there is none."""
    return {} if fact is None else {name: fact}
