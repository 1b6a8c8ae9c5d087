"""Rollouts [T, N] for the trainers of classic reinforcement learning, and mini-batches for their value losses."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from hypothesis import strategies

GAMMA, LAM = 0.96875, 0.875  # float32 numbers, as their product is: rsl_rl rounds them to float32 beside float64 buffers

# [T, N] flags of the step from t: where an episode ends.
ENDS = {
    "no end": lambda t, n: torch.zeros(t, n, dtype=torch.bool),
    "every step": lambda t, n: torch.ones(t, n, dtype=torch.bool),
    "last step": lambda t, n: (torch.arange(t) == t - 1)[:, None].repeat(1, n),
    "all but the last step": lambda t, n: (torch.arange(t) != t - 1)[:, None].repeat(1, n),
    "several per column": lambda t, n: torch.rand(t, n, generator=torch.Generator().manual_seed(7)) < 0.3,
}
SHAPES = [(1, 1), (1, 5), (7, 1), (24, 6), (130, 3)]


def rollout(t: int, n: int, ends: torch.Tensor, dtype: torch.dtype = torch.float32, seed: int = 0) -> SimpleNamespace:
    """rewards, values, ends [T, N]; last_values [N]; the flags as those of the states: dones [T, N], last_dones [N]."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(t, n, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    last_values = torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)
    first = torch.rand(1, n, generator=generator) < 0.5  # of no consequence: gates the step before the rollout
    dones = torch.cat([first, ends[:-1]])
    return SimpleNamespace(rewards=rewards, values=values, ends=ends, last_values=last_values, dones=dones, last_dones=ends[-1])


def minibatch(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """New values (a leaf that requires grad), old values, returns; about half of the new values are outside of old ± 0.3."""
    generator = torch.Generator().manual_seed(seed)
    old, noise, returns = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return (old + 0.45 * noise).to(dtype).requires_grad_(), old.to(dtype), returns.to(dtype)


def inside_the_range(*shape: int, clip: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 values and old values; no value leaves old ± clip, but `old + (new - old)` is not always `new`."""
    generator = torch.Generator().manual_seed(seed)
    old = 0.1 * torch.randn(shape, generator=generator)
    new = (old.double() + clip * (1.8 * torch.rand(shape, generator=generator, dtype=torch.float64) - 0.9)).float()
    assert (old + (new - old).clamp(-clip, clip) != new).any()
    return new.requires_grad_(), old


def near_constant(n: int) -> torch.Tensor:
    """Equal float32 numbers whose float32 mean is not that number."""
    x = torch.full((n,), 0.1)
    assert (x.mean() != x[0]) and n > 1
    return x


@strategies.composite
def rollouts(draw, max_t: int = 9, max_n: int = 4):
    """Float64 rollouts with any pattern of ends, beside gamma and lambda, which may be 0 and 1."""
    t, n = draw(strategies.integers(1, max_t)), draw(strategies.integers(1, max_n))
    ends = torch.tensor(draw(strategies.lists(strategies.booleans(), min_size=t * n, max_size=t * n))).view(t, n)
    data = rollout(t, n, ends, torch.float64, seed=draw(strategies.integers(0, 2**16)))
    scale = draw(strategies.sampled_from([1e-3, 1.0, 1e3]))
    data.rewards *= scale
    data.gamma, data.lam = (draw(strategies.sampled_from([0.0, 0.5, 0.96875, 1.0])) for _ in range(2))
    data.mask = torch.tensor(draw(strategies.lists(strategies.booleans(), min_size=t * n, max_size=t * n))).view(t, n)
    data.tolerance = {"rtol": 1e-9, "atol": 1e-9 * max(scale, 1.0)}
    return data


def loss_and_gradient(loss: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    (gradient,) = torch.autograd.grad(loss, values)
    return loss.detach(), gradient
