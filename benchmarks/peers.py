"""What trainers run today, to compare with."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from fused_critic.check import plain

_VERL_WHEEL = Path(__file__).resolve().parents[1] / "tests" / "verl_wheel.py"


class Verl(NamedTuple):
    origin: str
    compute_value_loss: Callable  # (vpreds, returns, values, response_mask, cliprange_value) -> loss, clip fraction
    compute_gae_advantage_return: Callable  # (token_level_rewards, values, response_mask, gamma, lam) -> whitened advantages, returns
    gae: Callable  # the same without whitening


def verl(download: bool = False) -> Verl:
    """verl's own functions if its wheel is at hand (or may be downloaded), else the same formulas in plain torch."""
    spec = importlib.util.spec_from_file_location("verl_wheel", _VERL_WHEEL)
    verl_wheel = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(verl_wheel)
    try:
        own, unwhitened = verl_wheel.functions(download), verl_wheel.functions(download)
    except verl_wheel.VerlUnavailable as reason:
        return Verl(f"verl's formulas ({reason})", _value_loss, _gae_whitened, plain.gae)
    unwhitened.compute_gae_advantage_return.__globals__["verl_F"].masked_whiten = lambda advantages, mask: advantages
    return Verl(
        f"verl {verl_wheel.VERSION}'s own functions",
        own.compute_value_loss,
        own.compute_gae_advantage_return,
        unwhitened.compute_gae_advantage_return,
    )


def _value_loss(vpreds, returns, values, mask, clip_range):
    return plain.value_loss(vpreds, values, returns, mask, clip_range)


@torch.no_grad()
def _gae_whitened(rewards, values, mask, gamma, lam):
    advantages, returns = plain.gae(rewards, values, mask, gamma, lam)
    mean, count = plain.masked_mean(advantages, mask), mask.sum()
    if count < 2:
        raise ValueError("whitening needs two valid tokens")
    variance = plain.masked_mean((advantages - plain.masked_mean(advantages, mask)) ** 2, mask) * (count / (count - 1))
    return (advantages - mean) * torch.rsqrt(variance + 1e-8), returns
