"""A new version appears in the model repository whole, in one step, or not at all."""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from export.errors import ExportRefused
from service.repository import CARD, Repository

VARIANTS: Final = {"fp32": "model.onnx", "fp16": "model.fp16.onnx", "int8": "model.int8.onnx"}
"""What there is to export: precision to the name of its file."""


def publish(
    repository: Path,
    model: str,
    files: Mapping[str, bytes],
    card: Callable[[int], Mapping[str, Any]],
    version: int | None = None,
) -> Path:
    """Write one version beside the others.

    It is written into a hidden folder on the same file system, flushed to the disk, and
    renamed. Whoever reads the repository sees all of it or nothing, even where the machine
    stops half-way; a `.staging-` folder that such a stop leaves behind is no version, and
    may be deleted.

    Args:
        repository: The folder that holds `<model>/<version>/`; made where it is missing.
        model: The model's name.
        files: File name to content.
        card: Makes the card of a version, given its number.
        version: The number to write; the next one after the highest unless given.

    Returns:
        The new version's folder.

    Raises:
        ExportRefused: the version exists, or nothing can be written there.
    """
    shelf = repository / model
    refuse_taken(repository, model, version)
    try:
        shelf.mkdir(parents=True, exist_ok=True)
        number = version or max(Repository(repository).versions(model), default=0) + 1
        staging = shelf / f".staging-{secrets.token_hex(8)}"
        staging.mkdir()
        try:
            for name, content in files.items():
                _write(staging / name, content)
            while True:
                text = json.dumps(card(number), indent=2, ensure_ascii=False, allow_nan=False)
                _write(staging / CARD, f"{text}\n".encode())
                _flush_folder(staging)
                if _renamed(staging, shelf / str(number)):
                    break
                # Another export was faster.
                refuse_taken(repository, model, version)
                number += 1
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        _flush_folder(shelf)
    except OSError as error:
        raise ExportRefused(f"Nothing can be written to {shelf}: {error.strerror}.") from error
    return shelf / str(number)


def refuse_taken(repository: Path, model: str, version: int | None) -> None:
    """Refuse a version that is there already; None is always free.

    Raises:
        ExportRefused: it is there. Versions are never overwritten.
    """
    if version is not None and os.path.lexists(repository / model / str(version)):
        raise ExportRefused(
            f"Version {version} of {model} exists in {repository} and versions are never overwritten; "
            "choose another, or leave --version out for the next one."
        )


def _write(path: Path, content: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Wait until the disk has the folder's entries."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _renamed(staging: Path, target: Path) -> bool:
    """Give the folder its final name, unless that is taken."""
    # A rename refuses a folder with anything in it, but would silently replace an empty one.
    if os.path.lexists(target):
        return False
    try:
        staging.rename(target)
    except OSError:
        if os.path.lexists(target):
            return False
        raise
    return True
