"""What the adapters of trainers with time-major rollouts share: [T, N] and [T, N, 1] buffers, their shifted flags, their normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

import fused_critic


def gae(rewards: Tensor, values: Tensor, ends: Tensor, last_values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns in the shape of the buffers: [T, N], or [T, N, V], whose columns are as many sequences.

    `ends[t]`: the episode ended in the step from t. `last_values`: one number per column, of any shape. Computed in float32 (float64 if an
    input is); the advantages have the rewards' dtype, the returns the one that values and rewards promote to, as a trainer's buffers have.
    """
    same_shape(rewards=rewards, values=values, ends=ends)
    advantages, returns = fused_critic.gae(
        columns(rewards),
        columns(values),
        gamma=gamma,
        lam=lam,
        terminated=columns(ends),
        bootstrap_values=last_values.flatten(),
        time_dim=0,
    )
    dtype = torch.promote_types(rewards.dtype, values.dtype)
    return advantages.view(rewards.shape).to(rewards.dtype), returns.view(rewards.shape).to(dtype)


def columns(buffer: Tensor) -> Tensor:
    """[T, N, V] as [T, N * V]: a view wherever V is 1 or the buffer is contiguous."""
    return buffer.flatten(1) if buffer.ndim > 2 else buffer


def per_element(**tensors: Tensor) -> list[Tensor]:
    """[..., 1] tensors of one shape without their last dimension (views), for the loss: rows of a single element would cost it more."""
    same_shape(**tensors)
    return [x.squeeze(-1) if x.ndim > 1 and x.shape[-1] == 1 else x for x in tensors.values()]


def same_shape(**tensors: Tensor) -> None:
    """Dropping dimensions must not hide what broadcasting would have made of [B] beside [B, 1]."""
    if len({x.shape for x in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in tensors.items())
        raise ValueError(f"fused_critic.integrations: expected tensors of one shape, got {shapes}")


def following(buffer: Tensor, last: Tensor) -> Tensor:
    """What each step's next state has: [T, ...] shifted by one, `last` at the end. A copy: no stride holds both."""
    return torch.cat([buffer[1:], last.reshape(1, *buffer.shape[1:])])


def standardised(x: Tensor) -> Tensor:
    """(x - mean) / (std + 1e-8), unbiased: the trainers' normalisation, whose epsilon is added to the deviation, not to the variance.

    The mean is summed in float64, so that equal numbers give exactly 0. Fewer than two numbers give 0.
    """
    if x.numel() < 2:
        return torch.zeros_like(x)
    centred = x - x.mean(dtype=torch.float64).to(x.dtype)
    return centred / (centred.std() + 1e-8)
