"""Adapters without their trainers: what they refuse instead of computing something else, and numbers that only this package promises.

What they have in common with the trainers' own code is compared in tests/parity.
"""

from __future__ import annotations

import math

import pytest
import torch
from fused_critic.integrations import cleanrl, sb3, torchrl

# --- explained variance -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [51, 1000])
@pytest.mark.parametrize("constant", [0.1, 1 / 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_explained_variance_of_returns_that_do_not_vary(dtype, constant, size):
    """Neither is a binary number: the raw moments of equal returns are those of returns that vary by roundings."""
    returns, values = torch.full((size,), constant, dtype=dtype), torch.randn(size, dtype=dtype)
    assert cleanrl.explained_variance(values, returns).isnan()
    assert math.isnan(sb3.explained_variance(values.numpy(), returns.numpy()))
    assert torchrl.critic_loss(returns, values).explained_variance == 0
