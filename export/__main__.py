"""The command line of export: `python -m export digit`, `--all`, `--report`."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from export.errors import ExportRefused, ProofFailed
from export.publish import VARIANTS
from service.models import MODELS
from service.models.spec import Room


class _Parser(argparse.ArgumentParser):
    """Says in one sentence what is wrong, and nothing else."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. See {self.prog} --help.\n")


def _variants(text: str) -> list[str]:
    """`fp32,fp16` to the list, each once."""
    chosen = list(dict.fromkeys(text.split(",")))
    for name in chosen:
        if name not in VARIANTS:
            raise argparse.ArgumentTypeError(
                f"there is no variant {name!r}; choose from {', '.join(VARIANTS)}"
            )
    return chosen


def _version(text: str) -> int:
    """A version's number."""
    if not (text.isascii() and text.isdecimal()) or text.startswith("0") or len(text) > 9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a version; a whole number such as 2 is")
    return int(text)


def _temperature(text: str) -> float:
    """What logits are divided by."""
    try:
        temperature = float(text)
    except ValueError:
        temperature = 0.0
    if not 0.01 <= temperature <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is no temperature; a number from 0.01 to 100 is")
    return temperature


def parser() -> argparse.ArgumentParser:
    """All that can be said on the command line."""
    options = _Parser(prog="python -m export", description=__doc__)
    options.add_argument("model", choices=list(MODELS), nargs="?", help="the model to export")
    options.add_argument(
        "--all",
        action="store_true",
        help="all models: each from its default run where there is one, else from its highest version",
    )
    options.add_argument(
        "--report", action="store_true", help="only show what is in the repository, model by precision"
    )
    options.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="a training run's folder; default: runs/<model>-<its first architecture>-seed0",
    )
    options.add_argument(
        "--from-version",
        type=_version,
        metavar="N",
        help="start from the fp32 file of a version in the repository rather than from a checkpoint",
    )
    options.add_argument(
        "--temperature",
        type=_temperature,
        metavar="T",
        help="with --from-version: divide the classifier's logits by this",
    )
    options.add_argument(
        "--variants",
        type=_variants,
        metavar="LIST",
        help=f"precisions, separated by commas; default: {','.join(VARIANTS)}",
    )
    options.add_argument(
        "--to", type=Path, default=Path("models"), metavar="DIR", help="the model repository; default: models"
    )
    options.add_argument(
        "--data", type=Path, metavar="DIR", help="data sets; default: $QUINTET_DATA or ~/.cache/quintet/data"
    )
    options.add_argument("--version", type=_version, metavar="N", help="default: the next free one")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Export; 0 when it went well, 1 when a proof failed, 2 when something must be mended first."""
    options = parser()
    chosen = options.parse_args(arguments)
    if bool(chosen.model) == (chosen.all or chosen.report) or (chosen.all and chosen.report):
        options.error("name a model, or say --all, or --report")
    if chosen.temperature is not None and chosen.from_version is None:
        options.error("--temperature is for the file of a version; name one with --from-version")
    if chosen.checkpoint is not None and chosen.from_version is not None:
        options.error("name either --checkpoint or --from-version")
    if chosen.all and any((chosen.checkpoint, chosen.from_version, chosen.version, chosen.temperature)):
        options.error(
            "--all finds each model's checkpoint or version by itself; name one model to choose them"
        )
    # After the command line was understood: torch takes seconds to import, a wrong word should not.
    if chosen.report:
        from export.report import report

        return _told(lambda: report(chosen.to))
    rooms = list(MODELS.values()) if chosen.all else [MODELS[chosen.model]]
    return max(_told(lambda room=room: _export(room, chosen)) for room in rooms)  # type: ignore[misc]


def _export(room: Room, chosen: argparse.Namespace) -> None:
    """Export one model as the command line says."""
    from export.pipeline import export, first_run, highest_version

    from_version = chosen.from_version
    if chosen.all and not first_run(room).is_dir():
        from_version = highest_version(room, chosen.to)
    export(
        room,
        checkpoint=chosen.checkpoint,
        from_version=from_version,
        temperature=chosen.temperature,
        variants=chosen.variants,
        repository=chosen.to,
        data=chosen.data,
        version=chosen.version,
    )


def _told(work: Callable[[], None]) -> int:
    """Do it; what went wrong becomes one sentence and an exit code."""
    from training.errors import TrainingError

    try:
        work()
    except ProofFailed as failure:
        print(f"Nothing was exported. {failure}", file=sys.stderr)
        return 1
    except (ExportRefused, TrainingError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped; nothing was exported.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
