"""Trains a line through 64 points for one epoch; `torchrun` starts several of it. Prints loss and weights."""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from training import fit

POINTS = torch.linspace(-1, 1, 64).unsqueeze(1)

with fit.processes("cpu"):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)

    def error(network: nn.Module, batch: Tensor) -> Tensor:
        """Mean squared error against twice the input."""
        return (network(batch) - 2 * batch).square().mean()

    story = fit.fit(
        [fit.Player("line", network, error, optimizer, schedule, average_decay=0.9)],
        examples=len(POINTS),
        batch_of=lambda indices, progress: POINTS[indices],
        score=lambda: {},
        settings=fit.Settings(epochs=1, batch_size=16, precision="fp32"),
        out=Path(sys.argv[1]),
        identity={},
    )
    if fit.process_rank() == 0:
        print("RESULT", story.epochs[0]["line/loss"], *(value.sum().item() for value in network.parameters()))
