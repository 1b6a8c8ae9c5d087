"""AReaL's critic functions (AReaL 1.0.4), computed by fused_critic.

``ppo_critic_loss_fn`` has the signature of ``areal.utils.functional.ppo_critic_loss_fn``. Either call it where AReaL's own would be, or let
``install()`` put it into AReaL, also where ``areal.trainer.ppo.critic`` has imported it:

    from fused_critic.integrations import areal as fused_areal
    fused_areal.install()          # for good (until uninstall())
    with fused_areal.install():    # for the length of a block
        ...

A process has to be patched before it computes; the critic's loss runs in the critic's training workers.

``compute_gae`` is the recursion that AReaL has written out inside of ``PPOActor._compute_advantages``, which is not replaced: in a
subclass of PPOActor with that method, call it where AReaL's loop over t is.

At valid tokens the results are AReaL's up to rounding. They differ on purpose in these points:

===================================  ====================================  =====================================================
case                                 AReaL                                 here
===================================  ====================================  =====================================================
NaN or inf at masked tokens          gradient NaN there; advantages of     never used; gradient exactly 0
                                     the row NaN
nothing valid                        loss NaN                              loss 0, gradient 0
rounding of the clip                 ``old + clamp(value - old)``, which   ``clamp(value, old - eps, old + eps)``: exact
                                     moves a value inside the range by an
                                     ulp
losses in the statistics, advantages what was computed there               0
and returns at masked tokens
ties of the two losses, bounds       a part of the gradient                the whole gradient wherever the clipped loss is not
of the range                                                               strictly greater
values that are not float32          AssertionError                        accepted
integer mask                         RuntimeError (loss)                   valid wherever non-zero
discount or gae_lambda outside of    accepted                              error
[0, 1], broadcasting, old values or
targets that require grad
===================================  ====================================  =====================================================
"""

from __future__ import annotations

from typing import Any, Optional

import torch

import fused_critic

from ._adapter import Adapter, Replacement

__all__ = ["compute_gae", "install", "ppo_critic_loss_fn", "uninstall"]

_HUBER_DELTA = 10.0


def ppo_critic_loss_fn(
    value: torch.Tensor,
    old_value: torch.Tensor,
    target_value: torch.Tensor,
    value_eps_clip: float,
    loss_mask: Optional[torch.Tensor] = None,
    loss_fn_type: str = "mse",
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Clipped value loss, the mean over the valid tokens. All tensors have one shape, [B, T] or packed [N].

    Returns the loss, a 0-d tensor, and per token, without gradient, ``clip_mask`` (bool: the clipped loss is strictly greater) and
    ``loss``. ``loss_fn_type``: "mse", half the square, or "huber" with delta 10; any other raises NotImplementedError.
    """
    if loss_fn_type not in ("mse", "huber"):
        raise NotImplementedError(f"Unknown loss fn type: {loss_fn_type}")
    old_value, target_value = _saveable(old_value), _saveable(target_value)
    mask = None if loss_mask is None else _saveable(loss_mask.bool())
    options: dict[str, Any] = {"criterion": loss_fn_type, "delta": _HUBER_DELTA}
    loss = fused_critic.value_loss(value, old_value, target_value, mask, clip_range=value_eps_clip, **options).loss
    with torch.no_grad():
        losses = fused_critic.value_loss(value, old_value, target_value, mask, clip_range=value_eps_clip, reduction="none", **options).loss
        unclipped = fused_critic.value_loss(value, None, target_value, mask, clip_range=None, reduction="none", **options).loss
    return loss, {"clip_mask": losses > unclipped, "loss": losses}


@torch.no_grad()
def compute_gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    loss_mask: torch.Tensor,
    seq_no_eos_mask: torch.Tensor,
    discount: float,
    gae_lambda: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages, not normalised, and returns, as AReaL has them before ``adv_norm``; masked positions are transparent.

    Args:
        rewards, values: [B, S], over prompts and responses; the reward at t is that of the token at t + 1.
        loss_mask: [B, S], rolled by -1 as AReaL rolls it: the position that predicts a response's token is valid.
        seq_no_eos_mask: [B], bool: rows that fill all of S, which are bootstrapped with the value at their last position.
        discount, gae_lambda: numbers in [0, 1].

    Returns:
        [B, S] each. The last position predicts nothing: its advantage is 0, and its return its value where it is valid.
    """
    mask = loss_mask.bool()
    advantages, returns = fused_critic.gae(
        rewards[:, :-1],
        values[:, :-1],
        mask[:, :-1],
        gamma=discount,
        lam=gae_lambda,
        bootstrap_values=torch.where(seq_no_eos_mask.bool(), values[:, -1], 0),
    )
    last = torch.where(mask[:, -1:], values[:, -1:], 0).to(returns.dtype)
    return torch.nn.functional.pad(advantages, (0, 1)), torch.cat([returns, last], dim=1)


def _saveable(x: torch.Tensor) -> torch.Tensor:
    """A tensor made in inference mode cannot be kept for a backward pass; its clone can."""
    return x.clone() if x.is_inference() else x


ADAPTER = Adapter(
    "AReaL",
    distribution="areal",
    version="1.0.4",
    replacements=[Replacement("areal.utils.functional.functional:ppo_critic_loss_fn", ppo_critic_loss_fn)],
)
install, uninstall = ADAPTER.install, ADAPTER.uninstall
