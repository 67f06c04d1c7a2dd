"""Running mean and deviation of observations, and their use."""

from __future__ import annotations

import torch
from torch import nn


class Normalizer(nn.Module):
    """Shifts and scales observations by the mean and deviation of all that :meth:`update` saw.

    Batches merge by Chan, Golub & LeVeque (1979): the statistics equal those of the whole data.

    Args:
      size: length of an observation.
      clip: normalized values are clipped to +- this.
    """

    mean: torch.Tensor
    variance: torch.Tensor
    count: torch.Tensor

    def __init__(self, size: int, clip: float = 10.0) -> None:
        super().__init__()
        self.clip = clip
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("variance", torch.ones(size))
        self.register_buffer("count", torch.zeros(()))

    @torch.no_grad()
    def update(self, batch: torch.Tensor) -> None:
        """Take in ``(n, size)`` observations."""
        if batch.dim() != 2 or batch.shape[1] != len(self.mean):
            raise ValueError(f"batch of shape {tuple(batch.shape)}: expected (n, {len(self.mean)})")
        self.merge(batch.mean(0), batch.var(0, correction=0), len(batch))

    @torch.no_grad()
    def merge(self, mean: torch.Tensor, variance: torch.Tensor, n: int) -> None:
        """Take in ``n`` observations of that mean and variance, ``(size,)`` each."""
        if mean.shape != self.mean.shape or variance.shape != self.mean.shape:
            raise ValueError(f"mean of shape {tuple(mean.shape)}: expected {tuple(self.mean.shape)}")
        total = self.count + n
        delta = mean - self.mean
        within = self.variance * self.count + variance * n
        between = delta.square() * self.count * n / total
        self.variance.copy_((within + between) / total)
        self.mean.add_(delta * n / total)
        self.count.copy_(total)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((x - self.mean) * torch.rsqrt(self.variance + 1e-5)).clamp(-self.clip, self.clip)
