"""Policy and value networks. The observation normalizer is their first layer: it cannot be left behind."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import nn

from kouros.learning.config import STD_RANGE
from kouros.normalizer import Normalizer

ACTIVATIONS = {"elu": nn.ELU, "relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}

# A reflection of a vector space as a signed permutation: mirrored = sign * x[..., index].
Mirror = tuple[torch.Tensor, torch.Tensor]


def make_mlp(
    sizes: Sequence[int], activation: str = "elu", layer_norm: bool = False, last_gain: float = 1.0
) -> nn.Sequential:
    """A multilayer perceptron ``sizes[0] -> ... -> sizes[-1]`` with orthogonal first weights.

    Args:
      sizes: units of each layer, input and output included.
      activation: name of the hidden activation.
      layer_norm: normalize before each activation (without weights of its own).
      last_gain: scale of the last layer's first weights.
    """
    layers: list[nn.Module] = []
    for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
        last = i == len(sizes) - 2
        linear = nn.Linear(n_in, n_out)
        nn.init.orthogonal_(linear.weight, gain=last_gain if last else math.sqrt(2))
        nn.init.zeros_(linear.bias)
        layers.append(linear)
        if not last:
            if layer_norm:
                layers.append(nn.LayerNorm(n_out, elementwise_affine=False))
            layers.append(ACTIVATIONS[activation]())
    return nn.Sequential(*layers)


class ActorNetwork(nn.Module):
    """Gaussian policy: mean from observations, one learnt deviation per action.

    Args:
      obs_dim: length of an observation.
      action_dim: length of an action.
      hidden: units of the hidden layers.
      activation: ``elu``, ``relu``, ``silu`` or ``tanh``.
      layer_norm: normalize each hidden layer.
      initial_std: first deviation, in units of action.
      squash: bound actions by tanh; else they are clipped.

    Attributes:
      log_std: ``(action_dim,)`` logarithms of the deviations.
      low, high: ``(action_dim,)`` bounds of the actions that an environment takes; infinite at first.
    """

    low: torch.Tensor
    high: torch.Tensor

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        hidden: Sequence[int] = (256, 128),
        activation: str = "elu",
        layer_norm: bool = False,
        initial_std: float = 1.0,
        squash: bool = False,
    ) -> None:
        super().__init__()
        self.normalizer = Normalizer(obs_dim)
        # A small last layer: the first actions stay near zero, the default pose.
        self.mlp = make_mlp((obs_dim, *hidden, action_dim), activation, layer_norm, 0.01)
        self.log_std = nn.Parameter(torch.full((action_dim,), math.log(initial_std)))
        self.squash = squash
        self.register_buffer("low", torch.full((action_dim,), -math.inf))
        self.register_buffer("high", torch.full((action_dim,), math.inf))

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        """Mean of the Gaussian, ``(..., action_dim)``."""
        return self.mlp(self.normalizer(obs))

    def bound(self, action: torch.Tensor) -> torch.Tensor:
        """What the environment is given for a draw from the Gaussian."""
        if self.squash:
            return self.low + 0.5 * (self.high - self.low) * (torch.tanh(action) + 1.0)
        return action.clamp(self.low, self.high)

    def act(self, obs: torch.Tensor) -> torch.Tensor:
        """The action of the mean, as the environment takes it: the policy that is deployed."""
        return self.bound(self(obs))

    @torch.no_grad()
    def clamp_std(self) -> None:
        """Bring deviations back into ``STD_RANGE``.

        The parameter itself is clamped: a clamp in the forward pass would have no gradient to lead
        back from beyond the bound.
        """
        self.log_std.clamp_(*map(math.log, STD_RANGE))


class CriticNetwork(nn.Module):
    """Value of an observation; arguments as :class:`ActorNetwork`."""

    def __init__(
        self,
        obs_dim: int,
        hidden: Sequence[int] = (256, 128),
        activation: str = "elu",
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.normalizer = Normalizer(obs_dim)
        self.mlp = make_mlp((obs_dim, *hidden, 1), activation, layer_norm)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        """Value, ``(...)``."""
        return self.mlp(self.normalizer(obs)).squeeze(-1)


def log_prob(actions: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """Log-density of a Gaussian with independent components, summed over the last dimension."""
    scaled = (actions - mean) * torch.exp(-log_std)
    return -(0.5 * scaled.square() + log_std).sum(-1) - 0.5 * math.log(2 * math.pi) * mean.shape[-1]


def entropy(log_std: torch.Tensor) -> torch.Tensor:
    """Entropy of a Gaussian with independent components."""
    return log_std.sum() + 0.5 * (1.0 + math.log(2 * math.pi)) * len(log_std)


def reflection(network: ActorNetwork | CriticNetwork, obs: Mirror, out: Mirror) -> Mirror:
    """The reflection of a network's parameters, as one flat vector, that mirrors its function.

    Hidden layers reflect by exchanging their halves. A network is mirror-symmetric (mirrored
    observations give exactly mirrored output) when its parameters equal their own reflection, and
    it stays so under any optimizer that treats equal gradients equally, if gradients are projected
    by :func:`project`. Every sample then teaches its mirror image too, at no cost; Su et al. 2024
    (arXiv 2403.17320) compare this with mirrored copies of the data.

    Args:
      network: with even hidden sizes.
      obs: reflection of its observations.
      out: reflection of its output.

    Returns:
      ``index`` and ``sign``, each ``(number of parameters,)``, in ``network.parameters()`` order.

    Raises:
      ValueError: a hidden size is odd.
    """
    index: list[torch.Tensor] = []
    sign: list[torch.Tensor] = []
    start = 0

    def append(places: torch.Tensor, signs: torch.Tensor) -> None:
        nonlocal start
        index.append(start + places.flatten())
        sign.append(signs.flatten())
        start += places.numel()

    if isinstance(network, ActorNetwork):  # log_std, the first of its parameters
        append(out[0], torch.ones_like(out[1]))
    layers = [layer for layer in network.mlp if isinstance(layer, nn.Linear)]
    before = obs
    for layer in layers:
        size = layer.out_features
        if layer is layers[-1]:
            after = out
        elif size % 2:
            raise ValueError(f"hidden size {size}: symmetric networks need even sizes")
        else:
            after = (torch.arange(size).roll(size // 2), torch.ones(size))
        append(after[0][:, None] * layer.in_features + before[0], after[1][:, None] * before[1])
        append(*after)
        before = after
    return torch.cat(index), torch.cat(sign)


def project(vector: torch.Tensor, mirror: Mirror) -> torch.Tensor:
    """The part of a vector that equals its own reflection."""
    index, sign = mirror
    return 0.5 * (vector + sign * vector[index])
