"""What the administrator asks of one worker and all must do: load a model, let one go.

The workers of one server share a folder. A command is a line appended to a file there; every
worker reads on from where it was, and says in a file of its own how far it has come.
"""

import json
import os
from pathlib import Path
from typing import Final, Literal, NamedTuple

from service.metrics import is_alive

Action = Literal["load", "unload"]

FILE: Final = "commands"
PROGRESS: Final = ".progress"


class Command(NamedTuple):
    """One wish of the administrator's."""

    action: Action
    model: str


class Commands:
    """The commands of one server, as one of its workers sees them; places are offsets into the file."""

    def __init__(self, folder: Path) -> None:
        """Begin after the commands that were given before this worker was there; `past` has them."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._path = folder / FILE
        self._path.touch()
        self._place = 0
        self.past = self.read()
        self.done()

    def unloaded(self) -> set[str]:
        """The models that were let go and not asked for again, before this worker was there."""
        last = {command.model: command.action for command in self.past}
        return {model for model, action in last.items() if action == "unload"}

    def give(self, command: Command) -> int:
        """Tell all workers; the place that one has come to who has done it."""
        # One write to a file opened for appending is not mixed up with another worker's.
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(file, json.dumps(command).encode() + b"\n")
            return os.lseek(file, 0, os.SEEK_CUR)
        finally:
            os.close(file)

    def are_new(self) -> bool:
        """Whether there is something to read."""
        return os.stat(self._path).st_size > self._place

    def read(self) -> list[Command]:
        """The commands since the last time; `done` says that they were carried out."""
        if not self.are_new():
            return []
        with self._path.open("rb") as file:
            file.seek(self._place)
            lines = file.read()
        self._place += len(lines)
        return [Command(*json.loads(line)) for line in lines.splitlines()]

    def done(self) -> None:
        """Say that all that was read is carried out."""
        own = self._folder / f"{os.getpid()}{PROGRESS}"
        # Renamed into place: nobody reads half a number.
        draft = own.with_suffix(".draft")
        draft.write_text(str(self._place))
        draft.replace(own)

    def are_done(self, place: int) -> bool:
        """Whether every living worker has come to this place."""
        return all(
            int(progress.read_text()) >= place
            for progress in self._folder.glob(f"*{PROGRESS}")
            if is_alive(int(progress.stem))
        )
