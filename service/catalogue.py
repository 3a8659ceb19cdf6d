"""Which model versions are open, and how that changes while requests run.

A version is opened beside those that serve, and takes its place among them in one assignment
once it has answered its room's example. One that cannot be opened changes nothing but the index,
which says so; whoever was given a version keeps it until they are done.
"""

import secrets
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import structlog

from service.lanes import Lanes, LoopTurns
from service.loaded_model import LoadedModel
from service.metrics import Board
from service.models import MODELS
from service.providers import profile_of
from service.repository import Fingerprint, ModelFiles, Repository, RepositoryError
from service.settings import Settings

READY: Final = "READY"
UNAVAILABLE: Final = "UNAVAILABLE"

log = structlog.get_logger("quintet")


@dataclass(frozen=True)
class Entry:
    """A line of the index: `reason` says why a version is in its state, where there is something to say."""

    model: str
    version: str
    state: str
    reason: str = ""


@dataclass(frozen=True)
class Trouble:
    """A version that could not be opened, as it was then; the log has the reason under `id`."""

    fingerprint: Fingerprint
    id: str
    error: Exception

    @property
    def sentence(self) -> str:
        """What strangers may know of it."""
        return f"It could not be loaded; the log has the reason under id {self.id}."


class Catalogue:
    """The open model versions of one worker.

    `models` is read by requests at any time and never changed, only replaced, model by model;
    everything else blocks and belongs into one thread at a time, which a lock sees to.
    """

    def __init__(self, settings: Settings, board: Board, lanes: Lanes, loop_turns: LoopTurns) -> None:
        self._settings = settings
        self._profile = profile_of(settings)
        self._board = board
        self._lanes = lanes
        self._loop_turns = loop_turns
        self._lock = threading.Lock()
        self.models: dict[str, dict[str, LoadedModel]] = {}
        self._opened: dict[tuple[str, str], Fingerprint] = {}
        self._troubles: dict[tuple[str, str], Trouble] = {}
        self._seen: dict[tuple[str, str], Fingerprint] = {}
        self._unloaded: set[str] = set()

    def load_all(self, unloaded: Iterable[str] = ()) -> None:
        """Open every version of every model that has a room, but those that were `unloaded`.

        Raises:
            RepositoryError: there is no repository, or a model in it has versions and none can be opened.
            NetworkMismatch: a model has versions, and the best is not the network that its room describes.
        """
        with self._lock:
            repository = Repository(self._settings.models)
            self._unloaded = set(unloaded)
            for model in self._known(repository):
                self._refresh(repository, model)
                troubles = [trouble for (name, _), trouble in self._troubles.items() if name == model]
                if troubles and model not in self.models:
                    raise troubles[-1].error

    def load(self, model: str) -> Trouble | None:
        """Open every version of a model anew.

        Returns:
            What is wrong with the highest version, if it could not be opened.

        Raises:
            RepositoryError: the repository cannot be read.
        """
        with self._lock:
            self._unloaded.discard(model)
            repository = Repository(self._settings.models)
            self._refresh(repository, model, anew=True)
            versions = repository.versions(model) if model in repository.models() else []
            return self._troubles.get((model, str(versions[-1]))) if versions else None

    def unload(self, model: str) -> None:
        """Let a model go, until it is loaded again; requests under way are finished."""
        with self._lock:
            self._unloaded.add(model)
            self._replace(model, {})
            self._troubles = {key: trouble for key, trouble in self._troubles.items() if key[0] != model}

    def watch(self) -> None:
        """Open what is new or has changed since the last look, and let go what was taken away.

        A version still being written is left for the next look: it must look the same twice.
        """
        with self._lock:
            try:
                repository = Repository(self._settings.models)
                for model in self._known(repository):
                    self._refresh(repository, model, must_have_settled=True)
            except RepositoryError as error:
                log.error("the model repository cannot be read; what is loaded serves on", reason=str(error))

    def index(self) -> list[Entry]:
        """Every version there is, whether it serves, and if not, why."""
        entries = [
            Entry(model, version, READY, trouble.sentence if trouble else "")
            for model, versions in self.models.copy().items()
            for version in versions
            for trouble in (self._troubles.get((model, version)),)
        ]
        ready = {(entry.model, entry.version) for entry in entries}
        entries += [
            Entry(model, version, UNAVAILABLE, trouble.sentence)
            for (model, version), trouble in self._troubles.copy().items()
            if (model, version) not in ready
        ]
        entries += [Entry(model, "", UNAVAILABLE, "It was unloaded.") for model in sorted(self._unloaded)]
        return entries

    def broken(self, model: str) -> int:
        """How many versions of a model cannot be loaded."""
        return sum(of_model == model for of_model, _ in self._troubles.copy())

    def _known(self, repository: Repository) -> list[str]:
        found = set(repository.models())
        return [model for model in MODELS if model in found and model not in self._unloaded]

    def _refresh(
        self, repository: Repository, model: str, *, anew: bool = False, must_have_settled: bool = False
    ) -> None:
        """Bring one model's open versions to what the repository has."""
        open_now = self.models.get(model, {})
        found: dict[str, LoadedModel] = {}
        numbers = repository.versions(model) if model in repository.models() else []
        for version in map(str, numbers):
            key = (model, version)
            fingerprint = repository.fingerprint(model, version)
            has_settled = not must_have_settled or self._seen.get(key) == fingerprint
            self._seen[key] = fingerprint
            trouble = self._troubles.get(key)
            is_new = fingerprint not in (self._opened.get(key), trouble and trouble.fingerprint)
            if has_settled and (anew or is_new):
                opened = self._open(repository, model, version, fingerprint)
                if opened is not None:
                    found[version] = opened
                    continue
            if version in open_now:
                found[version] = open_now[version]
        # A repository that was emptied is likelier a mistake than a wish; `unload` says it plainly.
        if found or not open_now:
            self._replace(model, found)
        for key in [key for key in self._troubles if key[0] == model and int(key[1]) not in numbers]:
            del self._troubles[key]

    def _open(
        self, repository: Repository, model: str, version: str, fingerprint: Fingerprint
    ) -> LoadedModel | None:
        started = time.perf_counter()
        try:
            files = repository.open(model, version, self._profile.variants)
            loaded = self._load(files)
        # Whatever a file does to the libraries that read it, it must not end what serves.
        except Exception as error:
            trouble = Trouble(fingerprint, secrets.token_hex(6), error)
            self._troubles[model, version] = trouble
            log.error(
                "a model version cannot be loaded; what is loaded serves on",
                model=model,
                version=version,
                id=trouble.id,
                reason=str(error),
            )
            return None
        self._troubles.pop((model, version), None)
        self._opened[model, version] = fingerprint
        log.info(
            "model loaded",
            model=model,
            version=files.version,
            provider=loaded.network.provider,
            seconds=round(time.perf_counter() - started, 3),
            inline=loaded.batcher.is_inline,
            microseconds_per_input=round(loaded.network.seconds_per_input * 1e6),
        )
        return loaded

    def _load(self, files: ModelFiles) -> LoadedModel:
        room = MODELS[files.model]
        return LoadedModel(
            files, room, self._settings, self._profile, self._board, self._lanes, self._loop_turns
        )

    def _replace(self, model: str, versions: dict[str, LoadedModel]) -> None:
        """Have these versions serve, instead of those that did."""
        old = self.models.get(model, {})
        models = {**self.models, model: versions}
        # In the order of the rooms, and in one assignment: a request sees the old or the new.
        self.models = {name: models[name] for name in MODELS if models.get(name)}
        kept = [one.workers for one in versions.values()]
        for loaded in versions.values():
            loaded.workers.set(1)
        for version, loaded in old.items():
            if all(loaded.workers is not workers for workers in kept):
                loaded.workers.set(0)
            if version not in versions:
                self._opened.pop((model, version), None)
                log.info("model unloaded", model=model, version=version)
