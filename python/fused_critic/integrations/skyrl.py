"""SkyRL's critic functions (signatures of skyrl 0.3.0), computed by fused_critic.

Either call ``ppo_critic_loss`` and ``compute_gae_advantage_return`` where SkyRL's own would be called, or let ``install()`` put them into
SkyRL, its registry of advantage estimators included:

    from fused_critic.integrations import skyrl as fused_skyrl
    fused_skyrl.install()          # for good (until uninstall())
    with fused_skyrl.install():    # for the length of a block
        ...

A process has to be patched before it computes. Advantages are computed in the process of the entry point; the critic's loss in worker
processes, where every worker takes ``ppo_critic_loss`` when it is constructed: docs/trainers/skyrl.md has a worker that is patched.

At valid tokens the results are SkyRL's, whitening included, up to rounding. They differ on purpose in these points:

===================================  ====================================  =====================================================
case                                 SkyRL                                 here
===================================  ====================================  =====================================================
NaN or inf at masked tokens, loss    loss and gradient NaN                 never used; gradient exactly 0
NaN or inf at masked tokens, GAE     flows into valid ones, and by         the same: both read every position in the recursion
                                     whitening into all                    (``fused_critic.gae(mask_mode="skip")`` does not)
fewer than two valid tokens, GAE     ValueError                            advantages 0; returns as always
whitened advantages at masked        whitened leftovers                    0; the returns are SkyRL's there too
tokens
inside of the clip range             ``old + (value - old)``, rounded      the value itself
weights of a row that sum up to      divided by 1                          divided by their sum
less than 1
bf16 or fp16 throughout              computed, and advantages returned,    computed and returned in float32
                                     in half precision
ties of the two losses               a part of the gradient                the whole gradient wherever the clipped loss is not
                                                                           strictly greater
bounds of the range                  ``torch.clamp``'s gradient there,     the whole gradient
                                     whole or half by torch's version
float64 throughout, GAE, integer     variance times n / (n - 1) in         in float64
mask                                 float32
returns or old values that           gradient passed on                    error: they are constants of the loss
require grad
no rows, or no tokens                loss NaN                              loss 0
broadcasting, negative value_clip    accepted                              error
===================================  ====================================  =====================================================

Each of them is a test in tests/parity/test_parity_skyrl.py.
"""

from __future__ import annotations

from typing import Any, Optional, Protocol

import torch

import fused_critic

from ._adapter import Adapter, Replacement

__all__ = ["compute_gae_advantage_return", "install", "ppo_critic_loss", "uninstall"]


class AlgorithmConfig(Protocol):
    """What is read of SkyRL's config of this name."""

    @property
    def value_clip(self) -> Optional[float]: ...


def ppo_critic_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    config: AlgorithmConfig,
    loss_mask: Optional[torch.Tensor] = None,
) -> tuple[torch.Tensor, Optional[float]]:
    """Mean over the rows of [B, T] ([T]: one row) of each row's masked mean of the clipped value loss. A row with nothing valid counts, with 0.

    Returns the loss, 0-d, float32 or float64 if any input is, and the clip fraction over all valid tokens as a number, which waits for
    the device as SkyRL's does; None where ``config.value_clip`` is None.

    Raises: ValueError for shapes or devices that differ, a negative ``value_clip``, returns or old values that require grad; TypeError
    for a dtype that is not floating.
    """
    loss, stats = fused_critic.value_loss(
        values,
        old_values,
        returns,
        loss_mask,
        clip_range=config.value_clip,
        reduction="seq-mean-token-mean",
        global_batch_size=values.shape[0] if values.ndim > 1 else 1,
    )
    return loss, None if config.value_clip is None else stats.clip_fraction.item()


@torch.no_grad()
def compute_gae_advantage_return(
    token_level_rewards: torch.Tensor,
    values: torch.Tensor,
    response_mask: torch.Tensor,
    gamma: float,
    lambd: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages, whitened over the valid tokens of [B, T], and returns. The recursion runs over every position, masked or not.

    float32, or float64 if any input is. Other keywords, which SkyRL passes to every estimator, are ignored.

    Raises: ValueError for shapes or devices that differ, ``gamma`` or ``lambd`` outside of [0, 1]; TypeError for a dtype that is not
    floating.
    """
    advantages, returns = fused_critic.gae(
        token_level_rewards, values, response_mask, gamma=gamma, lam=lambd, mask_mode="ignore", whiten=True
    )
    return advantages, returns


_PPO_UTILS = "skyrl.backends.skyrl_train.utils.ppo_utils"

ADAPTER = Adapter(
    "SkyRL",
    distribution="skyrl",
    version="0.3.0",
    replacements=[
        Replacement(f"{_PPO_UTILS}:ppo_critic_loss", ppo_critic_loss),
        Replacement(f"{_PPO_UTILS}:compute_gae_advantage_return", compute_gae_advantage_return),
    ],
    registries=[f"{_PPO_UTILS}:AdvantageEstimatorRegistry._functions"],
)
install, uninstall = ADAPTER.install, ADAPTER.uninstall
