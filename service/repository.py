"""The model repository on disk: which versions there are, and their files, verified.

    models/<model>/<version>/card.json and the files that it names

A file is read once; the bytes that were hashed are the bytes that are served, so
nobody can swap the file between the check and the use. A file whose size or
sha256 is not its card's is not loaded.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from service.errors import NotFound
from service.models.spec import Room

CARD: Final = "card.json"

MAX_CARD_BYTES: Final = 1 << 20
"""A card is a page of text; a larger one is not a card."""

MAX_FILE_BYTES: Final = 1 << 31
"""An ONNX file is one protobuf message, and those end at two gibibytes."""

_VERSION = re.compile(r"[1-9][0-9]{0,8}", re.ASCII)
_MODEL = re.compile(r"[a-z][a-z0-9_]{0,63}", re.ASCII)
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)

# Key "location" of a tensor's `external_data`, as protobuf writes it: field 1, eight bytes.
_EXTERNAL_DATA: Final = b"\x0a\x08location"


Fingerprint = tuple[tuple[str, int, int], ...]
"""What a version's files look like from outside: name, bytes and time of change (ns) of each."""


class RepositoryError(Exception):
    """The repository is not as it should be. For operators: the message may name files."""


@dataclass(frozen=True)
class ModelFiles:
    """One version of one model, its network verified against its card.

    Attributes:
        model: The model's name.
        version: Its version, 1 or more.
        labels: What an output's index means, in order.
        card: The whole card, as `card.json` has it.
        variant: Which of the card's files this is: `fp32`.
        path: Where the network was read from, for messages; load `network`, not this.
        network: The ONNX file's bytes, those that were hashed.
        assets: The other files that the card names, by name: what the room needs beside the
            network. Their bytes, those that were hashed.
    """

    model: str
    version: int
    labels: tuple[str, ...]
    card: dict[str, Any]
    variant: str
    path: Path
    network: bytes
    assets: dict[str, bytes] = field(default_factory=dict)

    def furnish(self, room: Room) -> Room:
        """The room with this version's assets in it.

        Raises:
            RepositoryError: the card does not name all that the room needs, or the room can make
                nothing of one.
        """
        missing = [name for name in room.assets if name not in self.assets]
        if missing:
            raise RepositoryError(
                f'{self.path.parent}: the card names no {_listed(missing)} under "assets"; '
                "export the model anew."
            )
        try:
            return room.furnish(self.assets)
        except ValueError as error:
            raise RepositoryError(f"{self.path.parent}: {error}; export the model anew.") from error


@dataclass(frozen=True)
class Repository:
    """The models under one folder.

    Nothing is remembered: a version that was exported a moment ago is seen by the next call.
    Entries that are no version (`01`, `-1`, `latest`, hidden folders) are passed over.

    Raises:
        RepositoryError: the folder is not there.
    """

    folder: Path

    def __post_init__(self) -> None:
        """Refuse a folder that is not there, at start rather than at the first question."""
        if not self.folder.is_dir():
            raise RepositoryError(
                f"There is no model repository at {self.folder}; "
                "name the folder that holds <model>/<version>/."
            )

    def models(self) -> list[str]:
        """The names of the models that have a folder, sorted."""
        return sorted(
            entry.name for entry in self.folder.iterdir() if _MODEL.fullmatch(entry.name) and entry.is_dir()
        )

    def versions(self, model: str) -> list[int]:
        """The versions of `model`, ascending; an empty list where it has none yet.

        Raises:
            NotFound: there is no such model.
            RepositoryError: its folder cannot be read.
        """
        # The name comes from a caller: only a plain word may become part of a path.
        if not _MODEL.fullmatch(model):
            raise NotFound(f"There is no such model; there are: {_listed(self.models())}.")
        try:
            entries = [entry.name for entry in (self.folder / model).iterdir() if entry.is_dir()]
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound(f"There is no model {model}; there are: {_listed(self.models())}.") from None
        except OSError as error:
            raise RepositoryError(f"{self.folder / model} cannot be read: {error.strerror}.") from error
        return sorted(int(name) for name in entries if _VERSION.fullmatch(name))

    def latest(self, model: str) -> int:
        """The highest version of `model`.

        Raises:
            NotFound: there is no such model, or it has no versions.
        """
        return self._chosen(model, None)

    def fingerprint(self, model: str, version: str | int) -> Fingerprint:
        """What changes whenever a version's files do; empty where they cannot be seen."""
        folder = self.folder / model / str(version)
        try:
            with os.scandir(folder) as entries:
                seen = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
        except OSError:
            return ()
        return tuple(sorted((name, status.st_size, status.st_mtime_ns) for name, status in seen))

    def open(
        self,
        model: str,
        version: str | int | None = None,
        variants: Sequence[str] | Callable[[Mapping[str, Any]], Sequence[str]] = ("fp32", "int8", "fp16"),
    ) -> ModelFiles:
        """Read and verify one version: the highest, unless `version` names another.

        Args:
            model: The model's name, as the caller gave it.
            version: A whole number without sign or leading zeros, as the caller gave it.
            variants: The precisions that will do, best first, or what says so of a card; the
                first one on the card is read.

        Raises:
            NotFound: there is no such model or version.
            RepositoryError: the version is there, but its card or its file is not as it should be.
        """
        number = self._chosen(model, version)
        folder = self.folder / model / str(number)
        card = _read_card(folder / CARD, model, number)
        wanted = variants(card) if callable(variants) else variants
        variant = next((variant for variant in wanted if variant in card["files"]), None)
        if variant is None:
            raise RepositoryError(
                f"{folder} holds {_listed(card['files'])}, and none of {_listed(wanted)}; export one of them."
            )
        path = folder / card["files"][variant]["path"]
        network = _read_listed(path, card["files"][variant])
        # Given bytes, ONNX Runtime looks for external data in the working directory: weights nobody hashed.
        if _EXTERNAL_DATA in network:
            raise RepositoryError(
                f"{path} keeps tensors in other files, which the card's sha256 does not cover; "
                "save the network as one file."
            )
        assets = {name: _read_listed(folder / name, entry) for name, entry in card.get("assets", {}).items()}
        return ModelFiles(model, number, tuple(card["labels"]), card, variant, path, network, assets)

    def _chosen(self, model: str, version: str | int | None) -> int:
        """The version asked for, or the highest."""
        versions = self.versions(model)
        if not versions:
            raise NotFound(f"Model {model} has no versions.")
        if version is None:
            return versions[-1]
        held = _listed(str(number) for number in versions)
        if not _VERSION.fullmatch(str(version)):
            raise NotFound(f"A version is a whole number from 1 up; model {model} has {held}.")
        if int(version) not in versions:
            raise NotFound(f"Model {model} has no version {version}; it has {held}.")
        return int(version)


def _listed(names: Iterable[str]) -> str:
    """`a, b, c`, or `none`."""
    return ", ".join(names) or "none"


def _open_without_following(path: str, flags: int) -> int:
    """Open for `open`: a link could lead out of the version's folder, a pipe would make us wait."""
    # Windows knows neither flag; there the sha256 stands guard alone.
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def _read_file(path: Path, *, limit: int, expected: int | None = None) -> bytes:
    """The bytes of a plain file of at most `limit` bytes, and of exactly `expected` where given.

    Raises:
        RepositoryError: it is missing, unreadable, a link, no plain file, or of another size.
    """
    try:
        with open(path, "rb", opener=_open_without_following) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise RepositoryError(f"{path} is not a plain file; put the file itself there.")
            if expected is not None and status.st_size != expected:
                raise RepositoryError(
                    f"{path} has {status.st_size} bytes, its card says {expected}: the file was altered or "
                    "cut short. Restore it, or export the model anew."
                )
            if status.st_size > limit:
                raise RepositoryError(f"{path} has {status.st_size} bytes; at most {limit} are read.")
            return file.read(limit)
    except FileNotFoundError:
        raise RepositoryError(f"{path} is missing; restore it, or export the model anew.") from None
    except OSError as error:
        if path.is_symlink():
            raise RepositoryError(f"{path} is a link; put the file itself there.") from None
        raise RepositoryError(f"{path} cannot be read: {error.strerror}.") from error


def _read_listed(path: Path, entry: Mapping[str, Any]) -> bytes:
    """The bytes of a file, if they are those that the card's `entry` describes.

    Raises:
        RepositoryError: they are not, or the file cannot be read.
    """
    content = _read_file(path, limit=MAX_FILE_BYTES, expected=entry["bytes"])
    found = hashlib.sha256(content).hexdigest()
    if found != entry["sha256"]:
        raise RepositoryError(
            f"{path} has the sha256 {found}, its card says {entry['sha256']}: the file was altered. "
            "Restore it, or export the model anew."
        )
    return content


def _read_card(path: Path, model: str, version: int) -> dict[str, Any]:
    """The card at `path`, once it is known to be the card of this model and version.

    Raises:
        RepositoryError: it is not; the message names the first field at fault.
    """
    try:
        card: Any = json.loads(_read_file(path, limit=MAX_CARD_BYTES))
    except (ValueError, RecursionError):
        raise RepositoryError(f"{path} is not JSON; restore it, or export the model anew.") from None

    def require(holds: bool, complaint: str) -> None:
        if not holds:
            raise RepositoryError(f"{path}: {complaint}.")

    require(isinstance(card, dict), "the card is not a JSON object")
    require(card.get("model") == model, f'"model" is {card.get("model")!r}, and the folder is {model!r}')
    require(
        card.get("version") == str(version),
        f'"version" is {card.get("version")!r}, and the folder is {str(version)!r}',
    )
    labels = card.get("labels")
    require(
        isinstance(labels, list) and all(isinstance(label, str) for label in labels),
        '"labels" is not a list of texts',
    )
    files = card.get("files")
    require(isinstance(files, dict) and len(files) > 0, '"files" does not name a single file')
    assets = card.get("assets", {})
    require(isinstance(assets, dict), '"assets" is not an object of files')
    listed = [(f'"files"."{variant}"', entry, None) for variant, entry in files.items()]
    listed += [(f'"assets"."{name}"', entry, name) for name, entry in assets.items()]
    for where, entry, asset in listed:
        require(
            isinstance(entry, dict),
            f"{where} is not an object with {'' if asset else 'path, '}bytes and sha256",
        )
        name, size, digest = asset or entry.get("path"), entry.get("bytes"), entry.get("sha256")
        require(
            isinstance(name, str) and _FILE.fullmatch(name) is not None,
            f"{where} has the path {name!r}, where a plain file name is wanted: "
            "a file lies in its version's folder",
        )
        require(
            type(size) is int and 0 < size <= MAX_FILE_BYTES, f"{where} has {size!r} bytes; that is no size"
        )
        require(
            isinstance(digest, str) and _SHA256.fullmatch(digest) is not None,
            f"{where} has the sha256 {digest!r}; 64 lower-case hexadecimal digits are wanted",
        )
    return dict(card)
