"""The peers' environments: each has one of its own, made by `python -m load_tests peers install`.

They lie in `$QUINTET_PEERS` (default `~/.cache/quintet/peers`). None is needed: a peer without
its environment is a row of the table that says so.
"""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Final

REQUIREMENTS: Final = Path(__file__).with_name("requirements")
"""What each of them needs, a file for each."""

COMMAND: Final = "python -m load_tests peers install"


class InstallFailed(Exception):
    """An environment could not be made; the message has the installer's last words."""


def names() -> list[str]:
    """The peers that need an environment of their own."""
    return sorted(path.stem for path in REQUIREMENTS.glob("*.txt"))


def home() -> Path:
    """Where the environments lie."""
    return Path(os.environ.get("QUINTET_PEERS") or "~/.cache/quintet/peers").expanduser()


def python_of(peer: str) -> Path:
    """A peer's own interpreter, whether it is there or not."""
    return home() / peer / "bin" / "python"


def is_installed(peer: str) -> bool:
    """Whether all that a peer needs was installed, as its file says now."""
    mark = home() / peer / "installed.txt"
    wanted = (REQUIREMENTS / f"{peer}.txt").read_text()
    return python_of(peer).exists() and mark.is_file() and mark.read_text() == wanted


def install(peer: str) -> None:
    """Make a peer's environment anew.

    Raises:
        InstallFailed: the installer failed.
    """
    folder = home() / peer
    shutil.rmtree(folder, ignore_errors=True)
    # Our own installer fills it, which spares each environment one.
    venv.create(folder, symlinks=True)
    pip = (sys.executable, "-m", "pip", "--python", str(python_of(peer)), "install")
    quiet = ("--quiet", "--disable-pip-version-check")
    requirements = REQUIREMENTS / f"{peer}.txt"
    done = subprocess.run(
        [*pip, *quiet, "-r", str(requirements)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).splitlines()[-5:])
        raise InstallFailed(f"{peer} could not be installed:\n{said}")
    (folder / "installed.txt").write_text(requirements.read_text())
