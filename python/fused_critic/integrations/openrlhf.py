"""OpenRLHF's critic functions (signatures of OpenRLHF 0.11.2), computed by fused_critic.

``ValueLoss`` is a module like ``openrlhf.models.ValueLoss``, ``get_advantages_and_returns`` the method of that name of OpenRLHF's
``RemoteExperienceMaker``. Either use them where OpenRLHF's own would be, or let ``install()`` put them into OpenRLHF:

    from fused_critic.integrations import openrlhf as fused_openrlhf
    fused_openrlhf.install()          # for good (until uninstall())
    with fused_openrlhf.install():    # for the length of a block
        ...

It replaces ``ValueLoss.forward`` and the method in their classes, so existing instances compute by fused_critic too. A process has to be
patched before it computes: the critic's loss runs in the critic's Ray workers, the advantages in the process of the trainer. Ray calls
the function that the entry ``worker_process_setup_hook`` of a runtime environment names in each of them.

At valid tokens the results are OpenRLHF's up to rounding. They differ on purpose in these points:

===================================  ====================================  =====================================================
case                                 OpenRLHF                              here
===================================  ====================================  =====================================================
NaN or inf at masked tokens          loss NaN, advantages of the row NaN   never used; gradient exactly 0
nothing valid, no global count       loss NaN                              loss 0, gradient 0
rounding of the clip                 ``old + clamp(values - old)``, which  ``clamp(values, old - eps, old + eps)``: exact
                                     moves a value inside the range by an
                                     ulp
mean of a sequence                   denominator + 1e-8                    without it; the same in float32
advantages and returns at masked     what the recursion carries            0
tokens
no action mask, sequence mean        AttributeError                        all tokens are valid
fractional action mask, advantages   multiplies rewards and values         valid wherever non-zero (the loss takes it as a weight)
bf16 or fp16 throughout              computed and returned in half         computed and returned in float32
                                     precision
bf16 or fp16 values, float32         the discounted next value is rounded  computed in float32
rewards, gamma below 1               to half precision
ties of the two losses, bounds       a part of the gradient                the whole gradient wherever the clipped loss is not
of the range                                                               strictly greater
responses without a token            RuntimeError                          empty advantages and returns
gamma or lambd outside of [0, 1],    accepted                              error
broadcasting, old values or returns
that require grad
===================================  ====================================  =====================================================
"""

from __future__ import annotations

from typing import Any, Optional

import torch

import fused_critic

from ._adapter import Adapter, Replacement

__all__ = ["ValueLoss", "get_advantages_and_returns", "install", "uninstall"]


def _forward(
    self: Any,
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    action_mask: Optional[torch.Tensor] = None,
    dp_size: int = 1,
    batch_num_tokens: Optional[float] = None,
    global_batch_size: Optional[float] = None,
) -> torch.Tensor:
    """The value loss, a 0-d tensor; all tensors [B, T].

    ``batch_num_tokens`` (token mean) and ``global_batch_size`` (mean of the sequences' means) are the counts of the whole batch, numbers
    or 0-d tensors. Without the one of the two that it has a use for, the loss is the local mean, and ``dp_size`` plays no part.
    """
    count = batch_num_tokens if self.token_level_loss else global_batch_size
    return fused_critic.value_loss(
        values,
        None if self.clip_eps is None else old_values,
        returns,
        action_mask,
        clip_range=self.clip_eps,
        reduction="token-mean" if self.token_level_loss else "seq-mean-token-mean",
        batch_num_tokens=batch_num_tokens,
        global_batch_size=global_batch_size,
        dp_size=1 if count is None else dp_size,
    ).loss


class ValueLoss(torch.nn.Module):
    """``openrlhf.models.ValueLoss``: half the squared error, clipped around the old values unless ``clip_eps`` is None."""

    def __init__(self, clip_eps: Optional[float] = None, token_level_loss: bool = True) -> None:
        super().__init__()
        self.clip_eps = clip_eps
        self.token_level_loss = token_level_loss

    forward = _forward


@torch.no_grad()
def get_advantages_and_returns(
    self: Any, values: torch.Tensor, rewards: torch.Tensor, action_mask: Optional[torch.Tensor], gamma: float, lambd: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages, not whitened, and returns; all tensors [B, T]. ``self`` is not used: None where it is called as a function.

    Values and rewards count as 0 at masked tokens, and the recursion runs over them. OpenRLHF whitens later, over all experiences of a
    rollout; ``fused_critic.masked_whiten(advantages, action_mask, unbiased=False)`` does that for one batch.
    """
    advantages, returns = fused_critic.gae(rewards, values, action_mask, gamma=gamma, lam=lambd, mask_mode="zero")
    return advantages, returns


ADAPTER = Adapter(
    "OpenRLHF",
    distribution="openrlhf",
    version="0.11.2",
    replacements=[
        Replacement("openrlhf.models.loss:ValueLoss.forward", _forward),
        Replacement(
            "openrlhf.trainer.ppo_utils.experience_maker:RemoteExperienceMaker.get_advantages_and_returns", get_advantages_and_returns
        ),
    ],
)
install, uninstall = ADAPTER.install, ADAPTER.uninstall
