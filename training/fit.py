"""The one loop. Every model's story hands it networks, losses and batches.

It seeds, steps, averages (EMA), scores, shows time left, writes TensorBoard scalars,
and after every epoch a resume point that appears all at once or not at all. Started by
`torchrun` it shares every batch between processes, and only the first one writes.

Randomness is sown anew for each epoch from (seed, epoch, process), so a run that was
broken off and resumed goes on exactly as if nothing had happened.
"""

import contextlib
import copy
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.tensorboard import SummaryWriter

from training.errors import TrainingError
from training.files import appearing

Batch = Any
"""Whatever a story's `batch_of` makes and its `loss` understands."""

RESUME_POINT = "last.pt"


@dataclass(frozen=True)
class Settings:
    """How a run goes. The defaults work on a laptop.

    Attributes:
        epochs: How often every example is seen.
        batch_size: Examples per step, over all processes together.
        seed: Sows every random number.
        device: `cpu` or `cuda`.
        precision: `bf16` runs the forward pass in bfloat16 where torch deems it
            safe; `fp32` does not; `auto` takes bf16 where the hardware has it.
        largest_gradient: Gradients are scaled down to this Euclidean norm.
    """

    epochs: int
    batch_size: int
    seed: int = 0
    device: str = "cpu"
    precision: str = "auto"
    largest_gradient: float = 1.0


@dataclass(frozen=True)
class Run:
    """One run as the command line asks for it; None leaves the choice to the story's recipe.

    Attributes:
        model: The room it trains for.
        arch: One of the story's architectures.
        out: Where weights, card and pictures go.
        data: Holds the data sets' folders; None for `$QUINTET_DATA` or the cache.
        verify: Whether the data must be the published ones.
        holdout: Score on the last so many training examples instead of the test half,
            to tune a recipe without looking at the test half.
        resume: Go on where a broken-off run in `out` stopped.
        averaged: The seeds of the runs whose mean this is; none for a run of its own.
        teacher: The folder of a finished run whose network says what labels do not.
    """

    model: str
    arch: str
    out: Path
    epochs: int | None = None
    batch_size: int | None = None
    seed: int = 0
    device: str = "cpu"
    precision: str = "auto"
    data: Path | None = None
    verify: bool = True
    holdout: int = 0
    resume: bool = False
    averaged: tuple[int, ...] = ()
    teacher: Path | None = None

    def command(self, settings: Settings) -> str:
        """The command that does this run again on another machine."""
        seeds = f"--seed {settings.seed}"
        if self.averaged:
            seeds = f"--seeds {' '.join(map(str, self.averaged))} --average"
        command = (
            f"python -m training {self.model} --arch {self.arch} --epochs {settings.epochs} "
            f"--batch-size {settings.batch_size} {seeds} --device {settings.device}"
        )
        if self.teacher:
            command += f" --teacher {self.teacher}"
        if self.holdout:
            command += f" --holdout {self.holdout}"
        return command if self.verify else command + " --own-data"

    def identity(self, settings: Settings, recipe: Any) -> dict[str, Any]:
        """What a resume point must agree with to belong to this run."""
        return {
            "model": self.model,
            "arch": self.arch,
            "holdout": self.holdout,
            # What the command line said comes last: it overrides the recipe.
            **asdict(recipe),
            **{name: value for name, value in asdict(settings).items() if name != "device"},
        }


@dataclass
class Player:
    """A network and all that moves it. Most stories have one; an adversarial pair is two.

    Attributes:
        name: Prefix of its scalars and of its part in the resume point.
        network: Already on its device.
        loss: `loss(network, batch)`, a scalar; calls the network through its first argument.
        optimizer: Over the network's parameters.
        schedule: Steps after every batch.
        average_decay: Of the exponential moving average of the weights; 0 for none
            (Polyak & Juditsky, *Acceleration of Stochastic Approximation by Averaging*, 1992).
        averaged: The averaged network, which is the one to score and to keep.
    """

    name: str
    network: nn.Module
    loss: Callable[[nn.Module, Batch], Tensor]
    optimizer: Optimizer
    schedule: LRScheduler
    average_decay: float = 0.0
    averaged: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        """Start the average at the network's first weights, or be the network where there is none."""
        self.averaged = copy.deepcopy(self.network) if self.average_decay else self.network

    def state(self) -> dict[str, Any]:
        """All that must be kept to go on later."""
        return {
            "network": self.network.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Become what `state` described."""
        self.network.load_state_dict(state["network"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])


@dataclass
class Story:
    """What has happened so far: one row of numbers per epoch, and the minutes it took."""

    epochs: list[dict[str, float]] = field(default_factory=list)
    minutes: float = 0.0


def process_rank() -> int:
    """This process's number under `torchrun`; 0 without it."""
    return dist.get_rank() if dist.is_initialized() else 0


def process_count() -> int:
    """How many processes `torchrun` started; 1 without it."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def processes(device: str) -> Iterator[torch.device]:
    """Join the other processes where `torchrun` started several; give this one's device.

    Raises:
        TrainingError: there is no such device here.
    """
    if device not in ("cpu", "cuda"):
        raise TrainingError(f"There is no device {device!r}; choose cpu or cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise TrainingError("This machine has no CUDA device that torch can use; choose --device cpu.")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = torch.device("cuda", local_rank) if device == "cuda" else torch.device("cpu")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if "WORLD_SIZE" not in os.environ:
        yield chosen
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield chosen
    finally:
        dist.destroy_process_group()


def sow(seed: int, epoch: int = 0) -> None:
    """Seed every source of random numbers for one epoch of one process."""
    words = np.random.SeedSequence([seed, epoch, process_rank()]).generate_state(2, np.uint64)
    torch.manual_seed(int(words[0]))
    np.random.seed(int(words[1] % 2**32))
    random.seed(int(words[1]))


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Steps in which every process sees its share of the examples once; a last partial batch is left out."""
    return max(1, examples // batch_size)


def shards(examples: int, settings: Settings, epoch: int) -> Iterator[Tensor]:
    """This process's share of each batch of a shuffled epoch, as int64 indices.

    The shuffle depends on seed and epoch alone, so the processes' shares never overlap.
    """
    shuffle = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
    order = torch.randperm(examples, generator=shuffle)
    for batch in torch.split(order, settings.batch_size)[: steps_per_epoch(examples, settings.batch_size)]:
        yield share(batch)


def share(batch: Tensor) -> Tensor:
    """This process's part of a batch that all processes learn from together.

    Of a batch that has fewer examples than there are processes, some have the same one.
    """
    return batch[process_rank() % len(batch) :: process_count()]


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether the forward pass runs in bfloat16."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    # Without the instruction bfloat16 is emulated, at a fraction of fp32's speed.
    has_instruction = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return bool(has_instruction())


def autocasting(precision: str, device: torch.device) -> torch.autocast:
    """A context for forward passes: in bfloat16 where `precision` asks for it, else as they are."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(precision, device))


def fit(
    players: Sequence[Player],
    *,
    examples: int,
    batch_of: Callable[[Tensor, float], Batch],
    score: Callable[[], dict[str, float]],
    settings: Settings,
    out: Path,
    identity: Mapping[str, Any],
    resume: bool = False,
    batches: Sequence[Sequence[Tensor]] | None = None,
) -> Story:
    """Train the players for `settings.epochs` epochs, or for what is left of them.

    Args:
        players: Each steps once per batch, in this order.
        examples: How many there are to learn from.
        batch_of: `batch_of(indices, progress)` makes a batch of the examples at int64
            `indices` [n]; `progress` in 0..1 says how much of the run lies behind.
        score: Measures the averaged networks after each epoch. Nothing is chosen by it.
        settings: How the run goes.
        out: Folder for the resume point and the TensorBoard scalars.
        identity: What a resume point must agree with to be this run's: settings, data.
        resume: Go on from the resume point in `out` where there is one.
        batches: Each epoch's batches, int64 indices, as many in every epoch: for examples of
            many lengths, which learn faster beside their like. None for shuffled batches of
            `settings.batch_size`.

    Returns:
        What happened, a broken-off run's part included.

    Raises:
        TrainingError: the resume point is damaged or another run's, or the loss stopped
            being a number.
    """
    device = next(players[0].network.parameters()).device
    first = process_rank() == 0
    console = Console(quiet=not first, soft_wrap=True)
    story = _restore(players, out / RESUME_POINT, dict(identity), device, console) if resume else Story()
    if first and not resume:
        # Whoever resumes this run, should it be broken off in its first epoch, must not get an earlier one.
        (out / RESUME_POINT).unlink(missing_ok=True)
    steps = len(batches[0]) if batches else steps_per_epoch(examples, settings.batch_size)
    movers = [_shared(player.network, device) for player in players]
    autocast = autocasting(settings.precision, device)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, console=console) as progress,
        SummaryWriter(str(out / "tensorboard"), purge_step=len(story.epochs) + 1)
        if first
        else contextlib.nullcontext() as scalars,
    ):
        bar = progress.add_task(
            "training", total=settings.epochs * steps, completed=len(story.epochs) * steps
        )
        for epoch in range(len(story.epochs) + 1, settings.epochs + 1):
            started = time.monotonic()
            sow(settings.seed, epoch)
            for player in players:
                player.network.train()
            losses = torch.zeros(len(players), device=device)
            for step, indices in enumerate(
                map(share, batches[epoch - 1]) if batches else shards(examples, settings, epoch)
            ):
                done = (epoch - 1) * steps + step
                batch = batch_of(indices, done / (settings.epochs * steps))
                for number, (player, mover) in enumerate(zip(players, movers, strict=True)):
                    with autocast:
                        loss = player.loss(mover, batch)
                    _step(player, loss, settings.largest_gradient, done)
                    losses[number] += loss.detach()
                progress.advance(bar)
            row = _row(players, losses / steps, epoch)
            if scalars is not None:  # the first process
                row |= score()
                row["seconds"] = time.monotonic() - started
                story.epochs.append(row)
                story.minutes += row["seconds"] / 60
                for name, value in row.items():
                    scalars.add_scalar(name, value, epoch)
                _keep(players, story, dict(identity), out / RESUME_POINT)
                console.print(_line(row, settings.epochs))
            if dist.is_initialized():
                dist.barrier()
    return story


def _shared(network: nn.Module, device: torch.device) -> nn.Module:
    """The network, its gradients averaged over all processes where there are several."""
    if not dist.is_initialized():
        return network
    return DistributedDataParallel(network, device_ids=[device.index] if device.type == "cuda" else None)


def _step(player: Player, loss: Tensor, largest_gradient: float, done: int) -> None:
    """One step down the loss, and one of the average after it. `done` counts the steps before."""
    player.optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_(player.network.parameters(), largest_gradient)
    player.optimizer.step()
    player.schedule.step()
    if not player.average_decay:
        return
    # Early on the average would mostly remember the random start: let it forget faster.
    decay = min(player.average_decay, (1 + done) / (10 + done))
    averages, values = player.averaged.state_dict(), player.network.state_dict()
    moving = [name for name, value in values.items() if value.is_floating_point()]
    torch._foreach_lerp_([averages[name] for name in moving], [values[name] for name in moving], 1 - decay)
    for name in values.keys() - set(moving):
        averages[name].copy_(values[name])


def _row(players: Sequence[Player], losses: Tensor, epoch: int) -> dict[str, float]:
    """An epoch's losses (means over its steps, this process's) and learning rates.

    Raises:
        TrainingError: a loss is not a number any more; every process sees it alike.
    """
    if dist.is_initialized():
        dist.all_reduce(losses)
        losses = losses / process_count()
    if not bool(losses.isfinite().all()):
        raise TrainingError(
            f"In epoch {epoch} the loss stopped being a finite number; lower the learning rate "
            "and resume from the epoch before."
        )
    row: dict[str, float] = {"epoch": epoch}
    for player, loss in zip(players, losses.tolist(), strict=True):
        row[f"{player.name}/loss"] = loss
        row[f"{player.name}/learning_rate"] = float(player.schedule.get_last_lr()[0])
    return row


def _line(row: Mapping[str, float], epochs: int) -> str:
    """An epoch in a line for people."""
    shown = [f"epoch {int(row['epoch'])}/{epochs}"]
    shown += [
        f"{name} {value:.4f}"
        for name, value in row.items()
        if name not in ("epoch", "seconds") and not name.endswith("learning_rate")
    ]
    return "  ".join([*shown, f"{row['seconds']:.1f} s"])


def _keep(players: Sequence[Player], story: Story, identity: dict[str, Any], path: Path) -> None:
    """Write the resume point beside itself, then swap it in."""
    state = {
        "identity": identity,
        "epochs": story.epochs,
        "minutes": story.minutes,
        "players": {player.name: player.state() for player in players},
    }
    with appearing(path) as file:
        torch.save(state, file)


def _restore(
    players: Sequence[Player], path: Path, identity: dict[str, Any], device: torch.device, console: Console
) -> Story:
    """Bring the players to where the resume point left them."""
    if not path.exists():
        console.print(f"Nothing to resume in {path.parent}; starting at the first epoch.")
        return Story()
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        kept_identity: dict[str, Any] = state["identity"]
        differing = sorted(name for name in identity if kept_identity.get(name) != identity[name])
        if differing:
            raise TrainingError(
                f"{path.parent} holds a run of other settings ({', '.join(differing)}); "
                "use the same ones to resume it, or another --out."
            )
        for player in players:
            player.restore(state["players"][player.name])
        story = Story(list(state["epochs"]), float(state["minutes"]))
    except TrainingError:
        raise
    except Exception as error:  # a damaged file makes torch raise almost anything
        raise TrainingError(
            f"{path} is damaged and cannot be resumed; start again without --resume."
        ) from error
    console.print(f"Resuming after epoch {len(story.epochs)}.")
    return story
