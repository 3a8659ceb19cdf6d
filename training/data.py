"""Find a data set, or download it; verify it either way.

Data sets stay in their publishers' own files. What is verified is the content, not
its gzip wrapping: mirrors compress the same bytes differently.
"""

import gzip
import hashlib
import logging
import os
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pooch  # type: ignore[import-untyped]
import requests
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from training.errors import TrainingError

LARGEST_UNKNOWN_BYTES = 512 * 2**20
"""Where no published size is known, more than this is not unpacked into memory."""


@dataclass(frozen=True)
class Published:
    """One gzipped file as its publisher made it.

    Attributes:
        name: The file's name, as the publisher spells it.
        unpacked_bytes: How long it is, once unpacked.
        sha256: The checksum of the unpacked bytes.
    """

    name: str
    unpacked_bytes: int
    sha256: str


def data_folder(folder: Path | None = None) -> Path:
    """Where data sets live: `folder`, else `$QUINTET_DATA`, else `~/.cache/quintet/data`."""
    if folder is not None:
        return folder
    return Path(os.environ.get("QUINTET_DATA") or "~/.cache/quintet/data").expanduser()


def sha256_of(data: bytes) -> str:
    """The SHA-256 checksum of some bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def find(file: Published, folder: Path, mirrors: Sequence[str], *, verify: bool = True) -> bytes:
    """Read a published file from `folder`; download it there first where it is missing.

    Args:
        file: What to find.
        folder: The data set's own folder, say `~/.cache/quintet/data/mnist`.
        mirrors: Addresses of folders that hold the file, best first.
        verify: Whether the content must be the published one. False is for people's
            own data in the same format; those are never downloaded.

    Returns:
        The unpacked bytes.

    Raises:
        TrainingError: the file is damaged or another one, or cannot be had.
    """
    path = folder / file.name
    if not path.exists():
        if not verify:
            raise TrainingError(
                f"There is no {file.name} in {folder}; put your own data there under that name."
            )
        _download(file, path, mirrors)
    largest = file.unpacked_bytes if verify else LARGEST_UNKNOWN_BYTES
    content = _unpack(path, largest)
    if verify and sha256_of(content) != file.sha256:
        raise TrainingError(
            f"{path} is not the published file (its checksum differs); move it away and run again to "
            "download it, or say --own-data if these are your own digits."
        )
    return content


def _unpack(path: Path, largest: int) -> bytes:
    """Unpack a gzip file into memory, up to `largest` bytes."""
    try:
        with gzip.open(path) as packed:
            content = packed.read(largest + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise TrainingError(
            f"{path} is damaged or cut short ({error}); move it away and run again to download it."
        ) from error
    if len(content) > largest:
        raise TrainingError(f"{path} unpacks to more than the {largest} bytes that belong in it.")
    return content


def _download(file: Published, path: Path, mirrors: Sequence[str]) -> None:
    """Try each mirror in turn; the file appears under its name only when it is whole and right."""
    logging.getLogger("pooch").setLevel(logging.WARNING)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download-") as waiting_room:
            for mirror in mirrors:
                candidate = _download_from(mirror, file, Path(waiting_room))
                if candidate is not None:
                    candidate.replace(path)
                    return
    except OSError as error:
        raise TrainingError(f"Nothing can be written to {path.parent}: {error.strerror}.") from error
    raise TrainingError(
        f"{file.name} is not in {path.parent} and no mirror gave it; fetch it from "
        f"{mirrors[0]}{file.name} elsewhere, put it there, and run again."
    )


def _download_from(mirror: str, file: Published, folder: Path) -> Path | None:
    """The verified download, or None where this mirror does not have it."""
    with Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    ) as progress:
        downloader = pooch.HTTPDownloader(progressbar=_Bar(progress, file), timeout=20)
        try:
            candidate = Path(
                pooch.retrieve(mirror + file.name, None, fname=file.name, path=folder, downloader=downloader)
            )
            if sha256_of(_unpack(candidate, file.unpacked_bytes)) == file.sha256:
                return candidate
            reason = "its file is not the published one"
        except (requests.RequestException, ValueError, TrainingError) as error:
            reason = type(error).__name__
        progress.console.print(f"No {file.name} from {mirror}: {reason}.")
    (folder / file.name).unlink(missing_ok=True)
    return None


class _Bar:
    """Shows pooch's progress on a rich bar; the four members are what pooch asks for.

    It also ends a download that grows past any honest size: gzip adds next to
    nothing to what it cannot compress, and pooch counts in chunks of 64 KiB.
    """

    def __init__(self, progress: Progress, file: Published) -> None:
        self._progress = progress
        self._largest = file.unpacked_bytes + 2**17
        self._task = progress.add_task(file.name, total=None)
        self._done = 0

    @property
    def total(self) -> int:
        """The most that may come, in bytes."""
        return self._largest

    @total.setter
    def total(self, total_bytes: int) -> None:
        # A server that does not say how long its answer is makes pooch say 0.
        self._progress.update(self._task, total=total_bytes or None)

    def update(self, more_bytes: int) -> None:
        """Count what has come."""
        self._done += more_bytes
        if self._done > self._largest:
            raise ValueError("the download is longer than the published file")
        self._progress.update(self._task, completed=self._done)

    def reset(self) -> None:
        """Count from nothing again."""
        self._done = 0

    def close(self) -> None:
        """Nothing more will come."""
        self._progress.stop_task(self._task)
