"""Find a data set, or download it; verify it either way.

Data sets stay in their publishers' own files. What is verified is the content, not
its packing: mirrors compress the same bytes differently. A download that breaks off,
even by `kill -9`, goes on where it stopped; its folder appears when it is whole.
"""

import contextlib
import fnmatch
import functools
import gzip
import hashlib
import logging
import os
import shutil
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

import pooch  # type: ignore[import-untyped]
import requests
from filelock import FileLock
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from training.errors import TrainingError

LARGEST_UNKNOWN_BYTES: Final = 512 * 2**20
"""Where no published size is known, more than this is not unpacked into memory."""

LARGEST_ARCHIVE_BYTES: Final = 2**30
"""No archive of ours is larger, packed or unpacked."""

FRUITLESS_ATTEMPTS: Final = 3
"""So many times in a row an address may break off without having sent anything more."""

LOCK: Final = "lock"

WAIT_SECONDS = 0.5
"""Before the first of them is repeated; the next waits are longer."""


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


def _as_it_is(content: bytes) -> bytes:
    return content


@dataclass(frozen=True)
class Archive:
    """A data set as its publisher packed it, and what we read of it.

    Attributes:
        name: For messages: `CIFAR-10`.
        folder: Where it lies, unpacked, in the data folder.
        mirrors: Addresses of the archive (`.tar.gz` or `.zip`), best first. One that ends in
            `/` holds `files` themselves.
        files: What we read, and so what is unpacked: paths in the folder, where `*` stands for
            any part of a name.
        file_count: How many files are verified.
        content_bytes: How long they are together, in their canonical form.
        content_sha256: `content_digest` of them.
        checksum: Of the archive itself, where its publisher names one: `md5:…` or `sha256:…`.
        inside: The folder in the archive that becomes `folder`, where it has another name there.
        chosen: Which of `files` are verified, given the folder; None for all.
        canonical: A file's content to the form that is verified, where copies of one data set
            differ in ways that do not matter, such as blanks at the ends of lines.
    """

    name: str
    folder: str
    mirrors: tuple[str, ...]
    files: tuple[str, ...]
    file_count: int
    content_bytes: int
    content_sha256: str
    checksum: str | None = None
    inside: str | None = None
    chosen: Callable[[Path], Collection[str]] | None = None
    canonical: Callable[[bytes], bytes] = _as_it_is


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


def find_archive(archive: Archive, folder: Path | None = None, *, verify: bool = True) -> Path:
    """Find a data set's folder; download and unpack it first where it is missing.

    Args:
        archive: What to find.
        folder: The data folder; None for `$QUINTET_DATA` or the cache.
        verify: Whether the content must be the published one. False is for people's
            own data in the same layout; those are never downloaded.

    Returns:
        The data set's folder: `<data folder>/<archive.folder>`.

    Raises:
        TrainingError: it is damaged or another one, or cannot be had. What is there stays as it is.
    """
    home = data_folder(folder)
    place = home / archive.folder
    if not place.exists():
        if not verify:
            raise TrainingError(
                f"There is no {archive.folder} in {home}; put your own data there in the layout of "
                f"{archive.name}."
            )
        _download_archive(archive, place)
    elif verify:
        fault = _fault(archive, place)
        if fault:
            raise TrainingError(
                f"{place} is not the published {archive.name} ({fault}); move it away and run again to "
                "download it, or say --own-data if these are your own data."
            )
    return place


def content_digest(archive: Archive, place: Path) -> tuple[int, int, str]:
    """What is read of a data set: how many files, how many bytes, and their checksum.

    The checksum is a SHA-256 over each file's path, length and canonical content, in the
    order of the paths.
    """
    digest, total = hashlib.sha256(), 0
    names = sorted(_names(archive, place))
    for name in names:
        content = archive.canonical((place / name).read_bytes())
        total += len(content)
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return len(names), total, digest.hexdigest()


def _names(archive: Archive, place: Path) -> Collection[str]:
    """The files to verify, as paths in the folder."""
    if archive.chosen is not None:
        return archive.chosen(place)
    found = (path for pattern in archive.files for path in place.glob(pattern) if path.is_file())
    return {path.relative_to(place).as_posix() for path in found}


def _fault(archive: Archive, place: Path) -> str:
    """What is wrong with a data set's folder, in a few words; empty where nothing is."""
    missing = [pattern for pattern in archive.files if not any(place.glob(pattern))]
    if missing:
        return f"{' and '.join(missing)} missing"
    try:
        count, total, digest = content_digest(archive, place)
    except (OSError, ValueError) as error:
        return f"a file cannot be read: {_reason(error)}"
    if (count, total) != (archive.file_count, archive.content_bytes):
        return (
            f"{count:,} files of {total:,} bytes in all, "
            f"where {archive.file_count:,} of {archive.content_bytes:,} would be right"
        )
    return "" if digest == archive.content_sha256 else "its checksum differs"


def _download_archive(archive: Archive, place: Path) -> None:
    """Try each mirror in turn; the folder appears under its name only when it is whole and right."""
    with _waiting_room(place) as room:
        for mirror in archive.mirrors if not place.exists() else ():
            unpacked = _archive_from(mirror, archive, room)
            if unpacked is not None:
                unpacked.replace(place)
                break
    if place.exists():
        return
    how = "put its files there" if archive.mirrors[0].endswith("/") else "unpack it there"
    example = place / archive.files[0].replace("*", "…")
    raise TrainingError(
        f"{archive.name} is not in {place.parent} and no mirror gave it; fetch {archive.mirrors[0]} "
        f"elsewhere, {how} so that there is {example}, and run again."
    )


def _archive_from(mirror: str, archive: Archive, room: Path) -> Path | None:
    """The unpacked and verified folder, or None where this mirror does not have it."""
    unpacked = room / "unpacked"
    shutil.rmtree(unpacked, ignore_errors=True)
    with _progress() as progress:
        try:
            if mirror.endswith("/"):
                whole = [_fetch(mirror + name, room, progress) for name in archive.files]
                for path, name in zip(whole, archive.files, strict=True):
                    (unpacked / name).parent.mkdir(parents=True, exist_ok=True)
                    path.replace(unpacked / name)
            else:
                _unpack_archive(_fetch(mirror, room, progress, archive.checksum), archive, unpacked)
            fault = _fault(archive, unpacked)
            if not fault:
                return unpacked
            reason = f"it is not the published one ({fault})"
        except (requests.RequestException, ValueError, TrainingError) as error:
            reason = _reason(error)
        progress.console.print(f"No {archive.name} from {mirror}: {reason}.")
    shutil.rmtree(unpacked, ignore_errors=True)
    return None


def _unpack_archive(packed: Path, archive: Archive, unpacked: Path) -> None:
    """Unpack what we read of an archive, and nothing else, to `unpacked`; then the archive goes.

    Raises:
        TrainingError: it is damaged, or holds more than any of ours.
    """
    inside = PurePosixPath(archive.inside or archive.folder)
    wanted = [(inside / pattern).parts for pattern in archive.files]

    def is_wanted(name: str) -> bool:
        path = PurePosixPath(name)
        parts = path.parts
        return not (path.is_absolute() or ".." in parts) and any(
            len(parts) == len(pattern) and all(map(fnmatch.fnmatchcase, parts, pattern)) for pattern in wanted
        )

    scratch = packed.with_name("scratch")
    shutil.rmtree(scratch, ignore_errors=True)
    left = LARGEST_ARCHIVE_BYTES
    try:
        for name, size, extract in _members(packed):
            if not is_wanted(name):
                continue
            left -= size
            if left < 0:
                raise TrainingError(f"it unpacks to more than {LARGEST_ARCHIVE_BYTES:,} bytes")
            extract(scratch)
        (scratch / inside).mkdir(parents=True, exist_ok=True)
        (scratch / inside).replace(unpacked)
    except (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError) as error:
        packed.unlink()
        raise TrainingError(f"it is damaged or cut short ({error})") from error
    except TrainingError:
        packed.unlink()
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    packed.unlink()


def _members(packed: Path) -> Iterator[tuple[str, int, Callable[[Path], object]]]:
    """The files in an archive: path, unpacked bytes, and what unpacks it below a folder."""
    if packed.suffix == ".zip":
        with zipfile.ZipFile(packed) as archive:
            for entry in archive.infolist():
                if not entry.is_dir():
                    # zipfile itself takes the root and `..` out of names.
                    yield entry.filename, entry.file_size, functools.partial(archive.extract, entry)
    else:
        with tarfile.open(packed) as archive:
            for member in archive:
                if member.isreg():
                    yield member.name, member.size, functools.partial(_copy_out, archive, member)


def _copy_out(archive: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    """Write one plain file of an archive below a folder: its bytes, and nothing else that it claims.

    As tarfile's filter `data` does, which Python has since 3.11.4, and Debian's 3.11 has not.
    """
    place = folder / member.name
    place.parent.mkdir(parents=True, exist_ok=True)
    source = archive.extractfile(member)
    assert source is not None, "a plain file has content"
    with source, place.open("wb") as file:
        shutil.copyfileobj(source, file)


def _download(file: Published, path: Path, mirrors: Sequence[str]) -> None:
    """Try each mirror in turn; the file appears under its name only when it is whole and right."""
    with _waiting_room(path) as room:
        for mirror in mirrors if not path.exists() else ():
            candidate = _file_from(mirror, file, room)
            if candidate is not None:
                candidate.replace(path)
                break
    if not path.exists():
        raise TrainingError(
            f"{file.name} is not in {path.parent} and no mirror gave it; fetch it from "
            f"{mirrors[0]}{file.name} elsewhere, put it there, and run again."
        )


def _file_from(mirror: str, file: Published, room: Path) -> Path | None:
    """The verified download, or None where this mirror does not have it."""
    with _progress() as progress:
        try:
            # gzip adds next to nothing to what it cannot compress.
            candidate = _fetch(mirror + file.name, room, progress, largest=file.unpacked_bytes + 2**16)
            if _is_published(candidate, file):
                return candidate
            candidate.unlink()
            reason = "its file is not the published one"
        except (requests.RequestException, ValueError) as error:
            reason = _reason(error)
        progress.console.print(f"No {file.name} from {mirror}: {reason}.")
    return None


def _is_published(path: Path, file: Published) -> bool:
    """Whether a gzip file holds what was published, whole."""
    try:
        return sha256_of(_unpack(path, file.unpacked_bytes)) == file.sha256
    except TrainingError:
        return False


@contextlib.contextmanager
def _waiting_room(place: Path) -> Iterator[Path]:
    """A folder beside `place` for what is on its way there, kept while there is something to go on with.

    Of several processes that want the same, one downloads; the others wait here, and find it.

    Raises:
        TrainingError: nothing can be written there.
    """
    room = place.with_name(f".download-{place.name}")
    try:
        with _locked(room):
            try:
                yield room
            finally:
                if place.exists() or {path.name for path in room.iterdir()} <= {LOCK}:
                    shutil.rmtree(room, ignore_errors=True)
    except OSError as error:
        raise TrainingError(f"Nothing can be written to {place.parent}: {error.strerror}.") from error


def _locked(room: Path) -> contextlib.AbstractContextManager[object]:
    """Make a folder and wait until it is nobody else's; to be left by `with`."""
    while True:
        room.mkdir(parents=True, exist_ok=True)
        # Whoever had it may take the folder away at this very moment.
        with contextlib.suppress(FileNotFoundError):
            return FileLock(room / LOCK).acquire()


def _reason(error: Exception) -> str:
    """Why a mirror did not help, in a few words without its address."""
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"it answers {error.response.status_code} {error.response.reason}"
    return type(error).__name__ if isinstance(error, requests.RequestException) else str(error).rstrip(".")


def _progress() -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())


def _fetch(
    address: str,
    room: Path,
    progress: Progress,
    checksum: str | None = None,
    largest: int | None = None,
) -> Path:
    """Download a file into the waiting room, unless an earlier run has.

    Raises:
        ValueError: it has another checksum, or more than `largest` bytes (None: than any of ours).
        requests.RequestException: the address does not give it.
    """
    logging.getLogger("pooch").setLevel(logging.WARNING)
    # Named after the whole address: parts from two mirrors must never be put together.
    name = f"{sha256_of(address.encode())[:16]}-{PurePosixPath(address).name}"
    downloader = _ResumingDownloader(room / f"{name}.part", largest or LARGEST_ARCHIVE_BYTES, progress)
    return Path(pooch.retrieve(address, checksum, fname=name, path=room, downloader=downloader))


class _ResumingDownloader:
    """Downloads for pooch (which calls it), and goes on where an earlier download broke off.

    Args:
        part: Keeps what has come so far, from one run to the next.
        largest: More bytes than these are refused.
        progress: Shows how far it is.
    """

    def __init__(self, part: Path, largest: int, progress: Progress) -> None:
        self.part = part
        self.largest = largest
        self.progress = progress

    def __call__(self, url: str, output_file: str, _: object) -> None:
        """Download `url` to `output_file`."""
        task = self.progress.add_task(PurePosixPath(url).name, total=None)
        fruitless = 0
        while True:
            before = self._bytes_so_far()
            try:
                self._continue(url, task)
                break
            except requests.RequestException as error:
                fruitless = 0 if self._bytes_so_far() > before else fruitless + 1
                if fruitless == FRUITLESS_ATTEMPTS or not _may_pass(error):
                    raise
                time.sleep(WAIT_SECONDS * 2**fruitless)
        self.progress.stop_task(task)
        self.part.replace(output_file)

    def _bytes_so_far(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _continue(self, url: str, task: TaskID) -> None:
        """Ask for what is missing (RFC 9110, section 14) and add it to the part."""
        done = self._bytes_so_far()
        headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={done}-"} if done else {})}
        with requests.get(url, headers=headers, stream=True, timeout=20) as response:
            if response.status_code == requests.codes.requested_range_not_satisfiable:
                # Nothing is left to send: the part is whole, or longer than the file is now.
                if response.headers.get("Content-Range") == f"bytes */{done}":
                    return
                self.part.unlink()
                raise requests.ConnectionError("the file has become shorter")
            response.raise_for_status()
            sends_rest = response.headers.get("Content-Range", "").startswith(f"bytes {done}-")
            if response.status_code != requests.codes.partial_content or not sends_rest:
                done = 0
            length = int(response.headers.get("Content-Length") or 0)
            self.progress.update(task, completed=done, total=done + length if length else None)
            with self.part.open("ab" if done else "wb") as file:
                for chunk in response.iter_content(2**14):
                    done += len(chunk)
                    if done > self.largest:
                        file.close()
                        self.part.unlink()
                        raise ValueError(
                            f"it sends more than the {self.largest:,} bytes that may belong to it"
                        )
                    file.write(chunk)
                    self.progress.update(task, completed=done)


def _may_pass(error: requests.RequestException) -> bool:
    """Whether it may be better in a moment: a broken connection, or a server in trouble."""
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return error.response.status_code in (429, 500, 502, 503, 504)
    return isinstance(
        error, requests.ConnectionError | requests.Timeout | requests.exceptions.ChunkedEncodingError
    )
