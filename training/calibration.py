"""Probabilities that mean what they say."""

import torch
from torch import Tensor, nn


class Probabilities(nn.Module):
    """A classifier and the softmax after it, so that the graph itself gives probabilities.

    Args:
        network: Gives logits [n, labels].
        temperature: What the logits are divided by. Above 1 softens the answers; none turns.
    """

    def __init__(self, network: nn.Module, temperature: float = 1.0) -> None:
        super().__init__()
        self.network = network
        self.temperature = temperature

    def forward(self, inputs: Tensor) -> Tensor:
        """The network's input to probabilities float32 [n, labels]."""
        return torch.softmax(self.network(inputs).float() / self.temperature, dim=1)
