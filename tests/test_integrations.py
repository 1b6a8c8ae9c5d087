"""Adapters without their trainers: what they refuse instead of computing something else, and numbers that only this package promises.

What they have in common with the trainers' own code is compared in tests/parity.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from fused_critic.integrations import cleanrl, nemo_rl, rl_games, sb3, skyrl, torchrl

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


# --- shapes: nothing is broadcast ---------------------------------------------------------------------------------------------------


def test_skyrl_takes_one_dimension_for_one_row():
    """As its masked_mean(dim=-1).mean() does."""
    values, old_values, returns = torch.randn(3, 7)
    mask = torch.tensor([1, 1, 0, 1, 0, 1, 1])
    for clip in (None, 0.2):
        config = SimpleNamespace(value_clip=clip)
        one_row, clip_fraction = skyrl.ppo_critic_loss(*(x[None] for x in (values, old_values, returns)), config, mask[None])
        assert skyrl.ppo_critic_loss(values, old_values, returns, config, mask) == (one_row, clip_fraction)
    torch.testing.assert_close(
        skyrl.ppo_critic_loss(values, old_values, returns, SimpleNamespace(value_clip=None), mask)[0],
        0.5 * (values - returns)[mask == 1].square().mean(),
    )


@pytest.mark.parametrize("shapes", [[(4, 2), (2, 4), (4, 2)], [(4, 2), (4, 2), (8,)], [(4,), (4, 1), (4,)]], ids=str)
def test_sb3_values_of_one_shape(shapes):
    for clip_range_vf in (None, 0.2):
        with pytest.raises(ValueError, match=r"expected tensors of one shape, got values \[4"):
            sb3.value_loss(*(torch.zeros(shape) for shape in shapes), clip_range_vf)


@pytest.mark.parametrize(
    "mask, shape",
    [
        ((1, 16), (4, 16, 1)), ((1,), (4, 16)), ((4, 1), (4, 16, 1)), ((1, 1), (4, 1)), ((4, 15), (4, 16, 1)), ((4, 16, 1, 2), (4, 16, 1)),
        ((1,), (4,)),
    ],
    ids=str,
)  # fmt: skip
def test_torchrl_mask_that_does_not_fit(mask, shape):
    with pytest.raises(RuntimeError, match=r"torchrl: mask: expected state_value's shape \[4.*got \["):
        torchrl.critic_loss(torch.zeros(shape), torch.zeros(shape), mask=torch.ones(mask, dtype=torch.bool))


@pytest.mark.parametrize("mask, shape", [((4, 16, 1, 1), (4, 16)), ((4, 16, 1), (4, 16)), ((4, 16, 1), (4, 16, 2))], ids=str)
def test_torchrl_masks_with_trailing_dimensions_of_one(mask, shape):
    """TorchRL drops them, as it does for its own [*B, T, 1] masks beside losses of [*B, T]."""
    valid, (target, value) = torch.arange(64).view(4, 16) % 3 > 0, torch.randn(2, *shape)
    expected = torchrl.critic_loss(target, value, mask=valid)
    assert torchrl.critic_loss(target, value, mask=valid.view(mask)) == expected
    kept = valid.view(4, 16, *[1] * (len(shape) - 2)).expand(shape)
    torch.testing.assert_close(expected.loss, torch.nn.functional.smooth_l1_loss(value[kept], target[kept]))


@pytest.mark.parametrize("name, shape", [("sample_mask", (1,)), ("sample_mask", (4, 1)), ("token_mask", (1, 6)), ("token_mask", (4, 1))])
def test_nemo_rl_masks_that_do_not_fit(name, shape):
    data = {"token_mask": torch.ones(4, 6), "sample_mask": torch.ones(4), "returns": torch.zeros(4, 6), name: torch.ones(shape)}
    with pytest.raises(ValueError, match=rf"nemo_rl\.mse_value_loss: {name}: expected shape \[4.*got \[{shape[0]}"):
        nemo_rl.mse_value_loss(SimpleNamespace(cliprange=None, scale=1), torch.zeros(4, 6), data, torch.tensor(4), torch.tensor(24))


def test_rl_games_flags_and_masks_that_do_not_fit():
    agent, rewards = SimpleNamespace(gamma=0.99, tau=0.95), torch.zeros(5, 3, 1)
    flags, one = (torch.zeros(5, 3), torch.zeros(3)), (torch.zeros(5, 1), torch.zeros(1))
    for fdones, call in ((one, rl_games.discount_values), (one, rl_games.discount_values_masks)):
        masks = () if call is rl_games.discount_values else (torch.ones(5, 3),)
        with pytest.raises(ValueError, match=r"rl_games: mb_fdones: expected shape \[5, 3\].*got \[5, 1\]"):
            call(agent, fdones[1], torch.zeros(3, 1), fdones[0], rewards, rewards, *masks)
    with pytest.raises(ValueError, match=r"rl_games: mb_masks: expected shape \[5, 3\].*got \[5, 1\]"):
        rl_games.discount_values_masks(agent, flags[1], torch.zeros(3, 1), flags[0], rewards, rewards, torch.ones(5, 1))
    with pytest.raises(ValueError, match=r"rl_games: mb_rewards: expected \[T, N, V\], got shape \[5, 3\]"):
        rl_games.discount_values(agent, flags[1], torch.zeros(3), flags[0], rewards[..., 0], rewards[..., 0])


# --- dtypes -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.9, torch.tensor(0.9), torch.full((3, 17, 1), 0.9)], ids=["number", "0-d", "per step"])
@pytest.mark.parametrize("estimate", [torchrl.generalized_advantage_estimate, torchrl.vec_generalized_advantage_estimate])
@pytest.mark.parametrize("name", ["state_value", "next_state_value", "reward"])
def test_torchrl_takes_no_integers(name, estimate, gamma):
    tensors = {key: torch.zeros(3, 17, 1) for key in ("state_value", "next_state_value", "reward", "done")}
    tensors[name] = tensors[name].long()
    with pytest.raises(TypeError, match=f"torchrl: {name}: expected a floating dtype, got torch.int64"):
        estimate(gamma, 0.95, **tensors)
