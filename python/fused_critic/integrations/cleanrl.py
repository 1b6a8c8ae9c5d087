"""CleanRL's critic lines (``cleanrl/ppo.py`` and its relatives) as functions, computed by fused_critic.

CleanRL's scripts are copied and changed, so there is nothing to patch: the functions take the place of lines of your script.

    from fused_critic.integrations import cleanrl as fused_cleanrl

    advantages, returns = fused_cleanrl.compute_gae(rewards, values, dones, next_value, next_done, args.gamma, args.gae_lambda)
    ...
    v_loss = fused_cleanrl.value_loss(newvalue, b_values[mb_inds], b_returns[mb_inds], args.clip_coef, args.clip_vloss)
    ...
    explained_var = fused_cleanrl.explained_variance(b_values, b_returns).item()

``dones[t]`` belongs to the state at t, so what gates the step from t is ``dones[t + 1]``, and ``next_done`` at the end. A truncated episode
is a terminated one, as there.

Results are those of CleanRL's lines up to rounding. They differ on purpose in these points:

===================================  ====================================  =====================================================
case                                 CleanRL                               here
===================================  ====================================  =====================================================
values inside the clip range         ``old + (new - old)``, which moves    the value itself
                                     some by a last bit
tie of the two losses                half the gradient                     the whole gradient
bounds of the clip range             half the gradient or all, by          the whole gradient
                                     torch's version
explained variance of returns that   NaN, or by the rounding of their      NaN
do not vary                          mean a huge number
empty mini-batch                     loss NaN                              loss 0, gradient 0
returns or old values that           gradient passed on                    error: they are constants of the loss
require grad
[B] beside [B, 1]                    broadcast to [B, B]                   error
bf16 or fp16 throughout              computed in half precision            computed in float32; the loss is float32
gamma or lambda outside of [0, 1]    accepted                              error
===================================  ====================================  =====================================================
"""

from __future__ import annotations

import torch
from torch import Tensor

import fused_critic

from . import _rollout
from ._adapter import Adapter

__all__ = ["compute_gae", "explained_variance", "value_loss"]


@torch.no_grad()
def compute_gae(
    rewards: Tensor, values: Tensor, dones: Tensor, next_value: Tensor, next_done: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, both [T, N], without gradient. The flags are shifted by a copy; nothing else is copied.

    Args:
        rewards, values, dones: [T, N]; ``dones``: any dtype, non-zero where the state at t is the first one of an episode.
        next_value: [N] or [1, N], the value after the last step.
        next_done: [N], the flag of that state.

    Raises:
        ValueError: shapes that differ, ``gamma`` or ``gae_lambda`` out of [0, 1].
    """
    return _rollout.gae(rewards, values, _rollout.following(dones, next_done), next_value, gamma, gae_lambda)


def value_loss(newvalue: Tensor, b_values: Tensor, b_returns: Tensor, clip_coef: float, clip_vloss: bool = True) -> Tensor:
    """The 0-d ``v_loss``: half the mean of the squared errors, or of the greater of the clipped and the unclipped one.

    Args:
        newvalue: the critic's values, of any shape up to 2-d, or [..., 1]; the gradient goes here.
        b_values: the values at rollout time, of the same shape.
        b_returns: of the same shape.
        clip_coef: the range around ``b_values``.
        clip_vloss: False: no clipping.

    Raises:
        ValueError: shapes that differ, ``b_values`` or ``b_returns`` that require grad, a negative ``clip_coef``.
    """
    values, old_values, returns = _rollout.per_element(newvalue=newvalue, b_values=b_values, b_returns=b_returns)
    return fused_critic.value_loss(values, old_values, returns, clip_range=clip_coef if clip_vloss else None).loss


@torch.no_grad()
def explained_variance(b_values: Tensor, b_returns: Tensor) -> Tensor:
    """1 - Var[returns - values] / Var[returns] as a 0-d float64 tensor on the inputs' device, NaN where the returns do not vary."""
    values, returns = _rollout.per_element(b_values=b_values, b_returns=b_returns)
    stats = fused_critic.value_loss(values, None, returns, clip_range=None).stats
    return torch.where(stats.return_var == 0, torch.nan, stats.explained_variance)


ADAPTER = Adapter("cleanrl", distribution="cleanrl", version="1.2.0")
