"""The command line of training: `python -m training digit`."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from service.models import MODELS
from training.errors import TrainingError

HERE = Path(__file__).parent


class OneSentence(argparse.ArgumentParser):
    """Says in one sentence what is wrong, and nothing else."""

    def error(self, message: str) -> NoReturn:
        """End with the sentence and code 2."""
        self.exit(2, f"{self.prog}: {message}. See {self.prog} --help.\n")


def whole(text: str) -> int:
    """A number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _seed(text: str) -> int:
    """A number that every generator of random numbers takes."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2**32 - 1}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """All that can be said on the command line."""
    stories = [name for name in MODELS if (HERE / f"{name}.py").exists()]
    options = OneSentence(prog="python -m training", description=__doc__)
    options.add_argument("model", choices=stories, help="the model to train")
    options.add_argument("--arch", help="the network; default: the model's first")
    options.add_argument("--epochs", type=whole, help="how often every example is seen")
    options.add_argument("--batch-size", type=whole, help="examples per step, over all processes")
    which = options.add_mutually_exclusive_group()
    which.add_argument("--seed", type=_seed, default=0, help="sows every random number; default: 0")
    which.add_argument("--seeds", type=_seed, nargs="+", metavar="SEED", help="several runs, one for each")
    options.add_argument(
        "--average", action="store_true", help="with --seeds: keep the mean of the runs' weights, too"
    )
    options.add_argument(
        "--teacher",
        type=Path,
        metavar="DIR",
        help="learn what another network says: a finished run (sentiment) or a version of the model (digit)",
    )
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    options.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="of the forward pass; auto: bf16 where the hardware has it",
    )
    options.add_argument(
        "--data", type=Path, metavar="DIR", help="data sets; default: $QUINTET_DATA or ~/.cache/quintet/data"
    )
    options.add_argument(
        "--own-data", action="store_true", help="take your own data in the same format, unverified"
    )
    options.add_argument(
        "--holdout", type=whole, default=0, metavar="N", help="score on the last N training examples instead"
    )
    options.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="default: runs/<model>-<arch>-seed<seed>; with --seeds, DIR/seed<seed> and DIR/average",
    )
    options.add_argument("--resume", action="store_true", help="go on where a broken-off run stopped")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; 0 when it went well, 2 with one sentence when something must be mended first."""
    options = parser()
    chosen = options.parse_args(arguments)
    story = importlib.import_module(f"training.{chosen.model}")
    arch = chosen.arch or next(iter(story.ARCHITECTURES))
    if arch not in story.ARCHITECTURES:
        known = ", ".join(story.ARCHITECTURES)
        options.error(f"there is no architecture {arch!r} for {chosen.model}; choose from {known}")
    if chosen.seeds and len(set(chosen.seeds)) < len(chosen.seeds):
        options.error("--seeds names one seed twice; each is a run of its own")
    if chosen.average and len(chosen.seeds or ()) < 2:
        options.error("--average needs two runs or more; name their seeds, as in --seeds 0 1")
    if chosen.average and arch not in getattr(story, "WITH_A_MEAN", ()):
        options.error(
            f"runs of {chosen.model}'s {arch} each start from weights of their own, so their mean is no "
            "network; --average is for sentiment's transformer"
        )
    if chosen.teacher and arch not in getattr(story, "WITH_A_TEACHER", ()):
        options.error(
            f"{chosen.model}'s {arch} learns from labels alone; --teacher is for sentiment's transformer "
            "and digit's lean and mlp"
        )
    try:
        _train(story, chosen, arch)
    except TrainingError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{error.filename or 'A file'} cannot be written or read: {error.strerror}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped; go on with --resume.", file=sys.stderr)
        return 130
    return 0


def _train(story: ModuleType, chosen: argparse.Namespace, arch: str) -> None:
    """One run per seed; with several, what they say together."""
    from training.card import note_seeds
    from training.fit import Run

    seeds = chosen.seeds or [chosen.seed]

    def run_of(name: str, seed: int, averaged: tuple[int, ...] = ()) -> Run:
        kind = f"{arch}-taught" if chosen.teacher else arch
        out = chosen.out or Path("runs") / f"{chosen.model}-{kind}-{name}"
        return Run(
            model=chosen.model,
            arch=arch,
            out=out / name if chosen.out and chosen.seeds else out,
            epochs=chosen.epochs,
            batch_size=chosen.batch_size,
            seed=seed,
            device=chosen.device,
            precision=chosen.precision,
            data=chosen.data,
            verify=not chosen.own_data,
            holdout=chosen.holdout,
            resume=chosen.resume,
            averaged=averaged,
            teacher=chosen.teacher,
        )

    runs = [run_of(f"seed{seed}", seed) for seed in seeds]
    for run in runs:
        card = story.train(run)
        if card:
            print(f"{run.out}: {card['scores']}")
    if not chosen.seeds or int(os.environ.get("RANK", "0")) != 0:
        return
    folders = [run.out for run in runs]
    print(note_seeds(folders))
    if chosen.average:
        mean = run_of("average", seeds[0], tuple(seeds))
        print(f"{mean.out}: {story.average(mean, folders)['scores']}")


if __name__ == "__main__":
    sys.exit(main())
