"""The operators as plain torch formulas, the way trainers write them (verl's): what the kernels are timed beside."""

from __future__ import annotations

import torch


def masked_sum(x, mask):
    return (torch.where(mask.bool(), x, 0.0) * mask).sum()


def masked_mean(x, mask):
    return masked_sum(x, mask) / (mask.sum() + 1e-8)


def value_loss(values, old_values, returns, mask, clip_range):
    """token-mean loss and clip fraction."""
    clipped = torch.max(torch.min(values, old_values + clip_range), old_values - clip_range)
    plain_loss, clipped_loss = (values - returns) ** 2, (clipped - returns) ** 2
    loss = 0.5 * (masked_sum(torch.max(plain_loss, clipped_loss), mask) / mask.sum())
    return loss, masked_mean((clipped_loss > plain_loss).float(), mask)


def gae_step(reward, value, next_value, next_advantage, gamma, lam):
    """This step's value and advantage, as the step before it wants them."""
    delta = reward + gamma * next_value - value
    return value, delta + gamma * lam * next_advantage


def masked_gae_step(reward, value, mask, next_value, next_advantage, gamma, lam):
    """`mask` holds floats, 1: valid."""
    own_value, advantage = gae_step(reward, value, next_value, next_advantage, gamma, lam)
    return own_value * mask + (1 - mask) * next_value, advantage * mask + (1 - mask) * next_advantage


@torch.no_grad()
def gae(rewards, values, mask, gamma, lam, time_dim=1, step=None):
    """Advantages and returns: a Python loop over time. `step`: gae_step or masked_gae_step, or either compiled."""
    step = step or (gae_step if mask is None else masked_gae_step)
    tensors = [x.unbind(time_dim) for x in (rewards, values) + (() if mask is None else (mask,))]
    next_value = next_advantage = torch.zeros_like(tensors[0][0])
    advantages = []
    for now in reversed(list(zip(*tensors))):
        next_value, next_advantage = step(*now, next_value, next_advantage, gamma, lam)
        advantages.append(next_advantage)
    advantages = torch.stack(advantages[::-1], dim=time_dim)
    return advantages, advantages + values
