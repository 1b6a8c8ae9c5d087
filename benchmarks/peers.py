"""What trainers run today, to compare with."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Callable, NamedTuple

import torch

_VERL_WHEEL = Path(__file__).resolve().parents[1] / "tests" / "verl_wheel.py"


class Verl(NamedTuple):
    origin: str
    compute_value_loss: Callable  # (vpreds, returns, values, response_mask, cliprange_value) -> loss, clip fraction
    compute_gae_advantage_return: Callable  # (token_level_rewards, values, response_mask, gamma, lam) -> whitened advantages, returns
    gae: Callable  # the same without whitening


def verl(download: bool = False) -> Verl:
    """verl's own functions if its wheel is at hand (or may be downloaded), else the same formulas, written here."""
    spec = importlib.util.spec_from_file_location("verl_wheel", _VERL_WHEEL)
    verl_wheel = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(verl_wheel)
    try:
        own, unwhitened = verl_wheel.functions(download), verl_wheel.functions(download)
    except verl_wheel.VerlUnavailable as reason:
        return Verl(f"verl's formulas ({reason})", _value_loss, _gae_whitened, _gae)
    unwhitened.compute_gae_advantage_return.__globals__["verl_F"].masked_whiten = lambda advantages, mask: advantages
    return Verl(
        f"verl {verl_wheel.VERSION}'s own functions",
        own.compute_value_loss,
        own.compute_gae_advantage_return,
        unwhitened.compute_gae_advantage_return,
    )


def _masked_sum(x, mask):
    return (torch.where(mask.bool(), x, 0.0) * mask).sum()


def _masked_mean(x, mask):
    return _masked_sum(x, mask) / (mask.sum() + 1e-8)


def _value_loss(vpreds, returns, values, mask, clip_range):
    clipped = torch.max(torch.min(vpreds, values + clip_range), values - clip_range)
    plain_loss, clipped_loss = (vpreds - returns) ** 2, (clipped - returns) ** 2
    loss = 0.5 * (_masked_sum(torch.max(plain_loss, clipped_loss), mask) / mask.sum())
    return loss, _masked_mean((clipped_loss > plain_loss).float(), mask)


@torch.no_grad()
def _gae(rewards, values, mask, gamma, lam):
    next_value, next_advantage, advantages = 0, 0, []
    for t in range(rewards.shape[-1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        next_value = values[:, t] * mask[:, t] + (1 - mask[:, t]) * next_value
        next_advantage = advantage * mask[:, t] + (1 - mask[:, t]) * next_advantage
        advantages.append(next_advantage)
    advantages = torch.stack(advantages[::-1], dim=1)
    return advantages, advantages + values


@torch.no_grad()
def _gae_whitened(rewards, values, mask, gamma, lam):
    advantages, returns = _gae(rewards, values, mask, gamma, lam)
    mean, count = _masked_mean(advantages, mask), mask.sum()
    if count < 2:
        raise ValueError("whitening needs two valid tokens")
    variance = _masked_mean((advantages - _masked_mean(advantages, mask)) ** 2, mask) * (count / (count - 1))
    return (advantages - mean) * torch.rsqrt(variance + 1e-8), returns
