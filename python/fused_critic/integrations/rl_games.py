"""rl_games' critic functions (signatures of rl-games 1.6.5), computed by fused_critic.

    from fused_critic.integrations import rl_games as fused_rl_games
    fused_rl_games.install()          # for good (until uninstall())
    with fused_rl_games.install():    # for the length of a block
        ...

puts :func:`discount_values` and :func:`discount_values_masks` into ``rl_games.common.a2c_common.A2CBase``, from which its agents inherit them, and
:func:`critic_loss` and :func:`default_critic_loss` into ``rl_games.common.common_losses``. (1.6.5 itself calls ``discount_values_masks`` nowhere.)

``mb_fdones[t]`` belongs to the state at t, so what gates the step from t is ``mb_fdones[t + 1]``, and ``fdones`` at the end. Time-outs have become a
part of the rewards before (``value_bootstrap`` adds ``gamma * V_t``), and nothing changes that.

Results are rl_games' up to rounding. They differ on purpose in these points:

===================================  ====================================  =====================================================
case                                 rl_games                              here
===================================  ====================================  =====================================================
NaN or inf in a masked step's        carried into every earlier step       never used
reward or value                      (``nan * 0``)
fractional mask                      a factor of the advantage             valid wherever non-zero
values inside the clip range         ``old + (new - old)``, which moves    the value itself
                                     some by a last bit
tie of the two losses                half the gradient                     the whole gradient
bounds of the clip range             half the gradient or all, by          the whole gradient
                                     torch's version
returns or old values that           gradient passed on                    error: they are constants of the loss
require grad
[B] beside [B, 1]                    broadcast to [B, B]                   error
[T, 1] flags or masks beside N > 1   broadcast                             error
bf16 or fp16 throughout              computed in half precision            computed in float32; the loss is float32
gamma or tau outside of [0, 1]       accepted                              error
===================================  ====================================  =====================================================
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

import fused_critic

from . import _rollout
from ._adapter import Adapter, Replacement

__all__ = ["critic_loss", "default_critic_loss", "discount_values", "discount_values_masks", "install", "uninstall"]


def discount_values(
    self: Any, fdones: Tensor, last_extrinsic_values: Tensor, mb_fdones: Tensor, mb_extrinsic_values: Tensor, mb_rewards: Tensor
) -> Tensor:
    """Advantages [T, N, V], of the rewards' dtype. The flags are shifted by a copy; the buffers are read where they lie.

    Args:
        fdones, mb_fdones: [N] and [T, N], non-zero where the state is the first one of an episode.
        last_extrinsic_values: [N, V].
        mb_extrinsic_values, mb_rewards: [T, N, V].

    Raises:
        ValueError: ``mb_fdones`` or ``mb_extrinsic_values`` of another shape, ``gamma`` or ``tau`` outside of [0, 1].
    """
    ends = _per_value("mb_fdones", _rollout.following(mb_fdones, fdones), mb_rewards)
    return _rollout.gae(mb_rewards, mb_extrinsic_values, ends, last_extrinsic_values, self.gamma, self.tau)[0]


def discount_values_masks(
    self: Any,
    fdones: Tensor,
    last_extrinsic_values: Tensor,
    mb_fdones: Tensor,
    mb_extrinsic_values: Tensor,
    mb_rewards: Tensor,
    mb_masks: Tensor,
) -> Tensor:
    """As :func:`discount_values`; a masked step (``mb_masks`` [T, N] 0) has advantage 0 and hands nothing on, but its value still counts as
    the one after the step before it."""
    _rollout.same_shape(mb_rewards=mb_rewards, mb_extrinsic_values=mb_extrinsic_values)
    ends = _per_value("mb_fdones", _rollout.following(mb_fdones, fdones), mb_rewards)
    masks = _per_value("mb_masks", mb_masks, mb_rewards)
    advantages = fused_critic.gae(
        _rollout.columns(mb_rewards),
        _rollout.columns(mb_extrinsic_values),
        _rollout.columns(masks),
        gamma=self.gamma,
        lam=self.tau,
        mask_mode="reset",
        terminated=_rollout.columns(ends),
        next_values=_rollout.columns(_rollout.following(mb_extrinsic_values, last_extrinsic_values)),
        time_dim=0,
    ).advantages
    return advantages.view(mb_rewards.shape).to(mb_rewards.dtype)


def critic_loss(
    model: Any, value_preds_batch: Tensor, values: Tensor, curr_e_clip: float, return_batch: Tensor, clip_value: float
) -> Tensor:
    """:func:`default_critic_loss`, as there."""
    return default_critic_loss(value_preds_batch, values, curr_e_clip, return_batch, clip_value)


def default_critic_loss(value_preds_batch: Tensor, values: Tensor, curr_e_clip: float, return_batch: Tensor, clip_value: float) -> Tensor:
    """The squared error per element, or where ``clip_value`` is set the greater of the clipped and the unclipped one.

    Args:
        value_preds_batch: the values at rollout time.
        values: the critic's values, [B, V]; the gradient goes here.
        curr_e_clip: the range around ``value_preds_batch``.
        return_batch: the returns; all three of one shape, which is the result's.

    Raises:
        ValueError: shapes that differ, ``value_preds_batch`` or ``return_batch`` that require grad, a negative ``curr_e_clip``.
    """
    new, old, returns = _rollout.per_element(values=values, value_preds_batch=value_preds_batch, return_batch=return_batch)
    loss = fused_critic.value_loss(new, old, returns, clip_range=curr_e_clip if clip_value else None, reduction="none").loss
    return (2 * loss).view(values.shape)


def _per_value(name: str, flags: Tensor, rewards: Tensor) -> Tensor:
    """[T, N] flags as [T, N, V]; a view."""
    if rewards.ndim != 3:
        raise ValueError(f"fused_critic.integrations.rl_games: mb_rewards: expected [T, N, V], got shape {list(rewards.shape)}")
    if flags.shape != rewards.shape[:2]:
        raise ValueError(
            f"fused_critic.integrations.rl_games: {name}: expected shape {list(rewards.shape[:2])} beside mb_rewards {list(rewards.shape)}, "
            f"got {list(flags.shape)}; nothing is broadcast"
        )
    return flags.unsqueeze(2).expand(rewards.shape)


_A2C_BASE, _LOSSES = "rl_games.common.a2c_common:A2CBase", "rl_games.common.common_losses"

ADAPTER = Adapter(
    "rl_games",
    distribution="rl-games",
    version="1.6.5",
    replacements=[
        Replacement(f"{_A2C_BASE}.discount_values", discount_values),
        Replacement(f"{_A2C_BASE}.discount_values_masks", discount_values_masks),
        Replacement(f"{_LOSSES}:critic_loss", critic_loss),
        Replacement(f"{_LOSSES}:default_critic_loss", default_critic_loss),
    ],
)
install, uninstall = ADAPTER.install, ADAPTER.uninstall
