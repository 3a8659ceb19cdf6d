"""Files that appear whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from training.errors import TrainingError


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[BinaryIO]:
    """Write a file beside its name; when the `with` ends well, it takes its name in one step.

    Raises:
        TrainingError: nothing can be written there, or not so much. What was there stays.
    """
    candidate = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with candidate.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        candidate.replace(path)
    except (OSError, RuntimeError) as error:
        # torch ends what it began to write even when that failed, and trips over it a second time.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise TrainingError(f"{path} cannot be written: {cause.strerror}; make room for it.") from error
    finally:
        with contextlib.suppress(OSError):
            candidate.unlink()
