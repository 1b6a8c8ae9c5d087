"""verl's critic functions (signatures of verl 0.9.1), computed by fused_critic.

Either call ``compute_value_loss`` and ``compute_gae_advantage_return`` where verl's own would be called, or let ``install()`` put them
into verl:

    from fused_critic.integrations import verl as fused_verl
    fused_verl.install()          # for good (until uninstall())
    with fused_verl.install():    # for the length of a block
        ...

A process has to be patched before it computes, and verl computes the value loss in worker processes. Naming the module
``fused_critic.integrations.verl_autoinstall`` in the environment variable VERL_USE_EXTERNAL_MODULES, which verl reads when it is
imported, does that in every process that inherits the variable.

At valid tokens the results are verl's, whitening included, up to rounding. They differ on purpose in these points:

===================================  ====================================  =====================================================
case                                 verl                                  here
===================================  ====================================  =====================================================
NaN or inf at masked tokens          gradient NaN there; the seq-mean      never used; gradient exactly 0
                                     losses and all of GAE NaN
nothing valid, value loss            NaN (but token-sum)                   loss 0, gradient 0, clip fraction 0
fewer than two valid tokens, GAE     ValueError                            advantages 0; returns as always
GAE at masked tokens                 carried and whitened values           advantages and returns 0
bool mask, GAE                       RuntimeError                          accepted
fractional mask, GAE                 blends the token with its successor   valid wherever non-zero (the loss takes it as a weight)
bf16 or fp16 throughout              computed and returned in half         computed and returned in float32; the range
                                     precision                             ``values +- cliprange_value`` does not collapse
ties of the two losses, bounds       a part of the gradient                the whole gradient wherever the clipped loss is not
of the range                                                               strictly greater
returns or old values that           gradient passed on                    error: they are constants of the loss
require grad
broadcasting, negative cliprange     accepted                              error
float64 mask                         widens the results                    widens the clip fraction only
===================================  ====================================  =====================================================
"""

from __future__ import annotations

from typing import Any, Optional

import torch

import fused_critic

from ._adapter import Adapter, Replacement

__all__ = ["compute_gae_advantage_return", "compute_value_loss", "install", "uninstall"]

_LOSS_AGG_MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")


def compute_value_loss(
    vpreds: torch.Tensor,
    returns: torch.Tensor,
    values: torch.Tensor,
    response_mask: torch.Tensor,
    cliprange_value: float,
    loss_agg_mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: Optional[int] = None,
    global_batch_size: Optional[int] = None,
    loss_scale_factor: Optional[int] = None,
):
    """Clipped value loss of ``vpreds`` against ``returns``; ``values`` are the old ones. Returns (loss, clip fraction), two 0-d tensors.

    The counts may be numbers or 0-d tensors. The clip fraction is the local one, whatever the counts, and carries no gradient.
    """
    if loss_agg_mode not in _LOSS_AGG_MODES:
        raise ValueError(f"Invalid loss_agg_mode: {loss_agg_mode!r}, expected one of {', '.join(_LOSS_AGG_MODES)}")
    loss, stats = fused_critic.value_loss(
        vpreds,
        values,
        returns,
        response_mask,
        clip_range=cliprange_value,
        reduction=loss_agg_mode,
        batch_num_tokens=batch_num_tokens,
        global_batch_size=global_batch_size,
        dp_size=dp_size,
        loss_scale_factor=loss_scale_factor,
    )
    return loss, stats.clip_fraction.to(torch.promote_types(torch.float32, response_mask.dtype))


@torch.no_grad()
def compute_gae_advantage_return(
    token_level_rewards: torch.Tensor,
    values: torch.Tensor,
    response_mask: torch.Tensor,
    gamma: torch.Tensor,
    lam: torch.Tensor,
):
    """Advantages, whitened over the valid tokens, and returns; masked tokens are transparent. ``gamma``, ``lam``: numbers or tensors."""
    advantages, returns = fused_critic.gae(
        token_level_rewards, values, response_mask, gamma=_squeeze_single(gamma), lam=_squeeze_single(lam)
    )
    return fused_critic.masked_whiten(advantages, response_mask), returns


def _squeeze_single(number: Any) -> Any:
    """A tensor of one element, which verl broadcasts, as the 0-d tensor that GAE takes."""
    return number.reshape(()) if isinstance(number, torch.Tensor) and number.numel() == 1 else number


_CORE_ALGOS = "verl.trainer.ppo.core_algos"

ADAPTER = Adapter(
    "verl",
    distribution="verl",
    version="0.9.1",
    replacements=[
        Replacement(f"{_CORE_ALGOS}:compute_value_loss", compute_value_loss),
        Replacement(f"{_CORE_ALGOS}:compute_gae_advantage_return", compute_gae_advantage_return),
    ],
    registries=[f"{_CORE_ALGOS}:ADV_ESTIMATOR_REGISTRY"],
)
install, uninstall = ADAPTER.install, ADAPTER.uninstall
