"""What TRL's PPO (version 1.9.0) computes for its critic, by fused_critic: functions to call in place of its lines.

``PPOTrainer.train`` has the critic's formulas inline, so there is nothing that could be replaced from outside and no ``install()``: copy
the trainer, as TRL's users do to change it, and call these functions where its lines stood. Names are the trainer's own.

    from fused_critic.integrations import trl as fused_trl

    # 5. whiten rewards
    if args.whiten_rewards:
        rewards = fused_trl.whiten_rewards(rewards, padding_mask_p1)
    # 6. compute advantages and returns
    advantages, returns = fused_trl.advantages_and_returns(rewards, values, padding_mask, args.gamma, args.lam)
    ...
    vpred = vpred_temp[:, context_length - 1 : -1].squeeze(-1)
    vf_loss, vf_clipfrac = fused_trl.value_loss(vpred, mb_values, mb_return, padding_mask_p1[micro_batch_inds], args.cliprange_value)

``vpredclipped``, ``vf_losses1`` and ``vf_losses2`` do not exist then: take them out of the trainer's ``del`` statement.

A padding mask is true where there is padding. ``padding_mask_p1`` is false at one position more than ``padding_mask``: there the trainer
puts the score.

Results are TRL's, up to rounding. They differ on purpose in these points:

==================================  =======================================  ===================================================
case                                TRL                                      here
==================================  =======================================  ===================================================
only padding, value loss            loss NaN, clip fraction NaN              both 0, gradient 0
only padding, whitening             ValueError                               0
one token, whitening                NaN everywhere but at padding            0
integer padding mask                ``~`` of it selects every position       true wherever non-zero
NaN or inf at padding               replaced by 0 in ``vpred`` alone; in     never used by the value loss and by whitening; GAE
                                    ``mb_return``, ``mb_values``,            reads every position, as TRL's does
                                    advantages: NaN
bf16 or fp16 throughout             computed and returned in half precision  computed in float32, and so returned but by
                                                                             ``whiten_rewards``; the range
                                                                             ``mb_values +- cliprange_value`` does not collapse
ties of the two losses              a part of the gradient                   the whole gradient wherever the clipped loss is not
                                                                             strictly greater
bounds of the range                 ``torch.clamp``'s gradient there, whole  the whole gradient
                                    or half by torch's version
float64 throughout, whitening       variance times n / (n - 1) in float32    in float64
returns or old values that          gradient passed on                       error: they are constants of the loss
require grad
broadcasting, negative cliprange    accepted                                 error
==================================  =======================================  ===================================================

Each of them is a test in tests/parity/test_parity_trl.py.
"""

from __future__ import annotations

import torch

import fused_critic

from ._adapter import Adapter

__all__ = ["advantages_and_returns", "value_loss", "whiten_rewards"]


def value_loss(
    vpred: torch.Tensor, mb_values: torch.Tensor, mb_return: torch.Tensor, padding_mask_p1: torch.Tensor, cliprange_value: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of the lines from ``vpred = torch.masked_fill(...)`` to ``vf_clipfrac = ...``. Returns (vf_loss, vf_clipfrac), 0-d.

    All tensors are [B, T]; ``vpred`` with or without the fill. ``vf_loss`` is float32, or float64 if any floating input is;
    ``vf_clipfrac`` is float32, as TRL's, and carries no gradient.

    Raises: ValueError for shapes or devices that differ, a negative ``cliprange_value``, returns or old values that require grad;
    TypeError for a dtype that is not floating.
    """
    loss, stats = fused_critic.value_loss(vpred, mb_values, mb_return, padding_mask_p1 == 0, clip_range=cliprange_value)
    return loss, stats.clip_fraction.float()


@torch.no_grad()
def advantages_and_returns(
    rewards: torch.Tensor, values: torch.Tensor, padding_mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of the lines from ``lastgaelam = 0`` to ``advantages = torch.masked_fill(...)``. Returns (advantages, returns), [B, T].

    Advantages are whitened over what is no padding, and 0 at padding. The recursion runs over every position, so ``rewards`` and
    ``values`` have to be 0 behind ``padding_mask_p1``, which the trainer's lines before it see to. float32, or float64 if any input is.

    Raises: ValueError for shapes or devices that differ, ``gamma`` or ``lam`` outside of [0, 1]; TypeError for a dtype that is not
    floating.
    """
    advantages, returns = fused_critic.gae(rewards, values, padding_mask == 0, gamma=gamma, lam=lam, mask_mode="ignore", whiten=True)
    return advantages, returns


@torch.no_grad()
def whiten_rewards(rewards: torch.Tensor, padding_mask_p1: torch.Tensor) -> torch.Tensor:
    """In place of the two lines under ``if args.whiten_rewards``: unit variance around the mean that they have, 0 at padding.

    [B, T], of the dtype of ``rewards``.
    """
    return fused_critic.masked_whiten(rewards, padding_mask_p1 == 0, shift_mean=False)


ADAPTER = Adapter("TRL", distribution="trl", version="1.9.0")
