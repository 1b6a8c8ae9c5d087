"""NeMo-RL's critic methods (signatures of its repository on 2026-08-22, commit 00925dd), computed by fused_critic.

NeMo-RL's advantages are a method of ``GeneralizedAdvantageEstimator`` and its value loss is ``MseValueLossFn``; ``install()`` replaces the
methods, so that instances which exist already are served too:

    from fused_critic.integrations import nemo_rl as fused_nemo_rl
    fused_nemo_rl.install()          # for good (until uninstall())
    with fused_nemo_rl.install():    # for the length of a block
        ...

A process has to be patched before it computes: advantages are computed in the driver, the value loss in the value model's workers.

The project on PyPI of this name is a placeholder without code, so that NeMo-RL's own code was never executed beside ours. Signatures and
formulas are those that were read in the repository; what the tests compare with is written from them.

At valid tokens the results follow these formulas up to rounding. They differ on purpose in these points:

===================================  ====================================  =====================================================
case                                 NeMo-RL, as read                      here
===================================  ====================================  =====================================================
NaN or inf at masked tokens          loss, gradient, metrics, advantages   never used; gradient exactly 0
                                     and returns NaN
GAE at masked tokens                 carried advantage, and value + it     advantages and returns 0
bool mask, GAE                       RuntimeError                          accepted
fractional mask, GAE, whitening      blends a token with its successor;    valid wherever non-zero (the loss takes it as a weight)
                                     weights
one valid token, whitening           NaN                                   0
denominators                         ``count + 1e-8``                      ``count``; nothing valid: 0
bf16 or fp16 throughout              computed in half precision            computed and returned in float32; the range
                                                                           ``values +- cliprange`` does not collapse
ties of the two losses, bounds of    a part of the gradient                the whole gradient wherever the clipped loss is not
the range                                                                  strictly greater
returns or old values that           gradient passed on                    error: they are constants of the loss
require grad
broadcasting                         accepted                              error
metrics                              nine waits for the device             three
===================================  ====================================  =====================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional, Protocol

import torch

import fused_critic

from ._adapter import Adapter, Replacement

__all__ = ["compute_gae", "install", "mse_value_loss", "reward_whiten", "uninstall"]


class _Estimator(Protocol):
    """What is read of a GeneralizedAdvantageEstimator."""

    gae_gamma: float
    gae_lambda: float


class _ValueLossFn(Protocol):
    """What is read of a MseValueLossFn."""

    scale: float
    cliprange: Optional[float]


def compute_gae(
    self: _Estimator,
    token_level_rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    gae_lambda: torch.Tensor | float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of ``GeneralizedAdvantageEstimator._compute_gae``: advantages, not whitened, and returns, [B, T].

    Masked tokens are transparent. ``gae_lambda``: a number, or one per sample, [B] (VAPO's length-adaptive lambda); None: the estimator's
    ``gae_lambda``. float32, or float64 if any input is.

    Raises: ValueError for shapes or devices that differ, a gamma or lambda outside of [0, 1]; TypeError for a dtype that is not
    floating.
    """
    lam = self.gae_lambda if gae_lambda is None else gae_lambda
    advantages, returns = fused_critic.gae(token_level_rewards, values, mask, gamma=self.gae_gamma, lam=lam)
    return advantages, returns


def reward_whiten(self: _Estimator, rewards: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    """In place of ``GeneralizedAdvantageEstimator._reward_whiten``: ``rewards`` whitened over the valid tokens, 0 at the others."""
    return fused_critic.masked_whiten(rewards, mask, shift_mean=shift_mean)


def mse_value_loss(
    self: _ValueLossFn,
    logits: torch.Tensor,
    data: Mapping[str, torch.Tensor],
    global_valid_seqs: torch.Tensor,
    global_valid_toks: torch.Tensor,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """In place of ``MseValueLossFn.__call__``: ``scale`` times the clipped value loss over ``global_valid_toks``, and its metrics.

    ``logits``: [B, S] or [B, S, 1], the values. ``data``: ``token_mask`` [B, S], ``sample_mask`` [B], ``returns`` [B, S], and where
    ``cliprange`` is neither None nor 0 ``values`` [B, S], the old ones. ``global_valid_toks``: a number or a tensor of one element. The loss
    is float32, or float64 if any input is.

    Raises: ValueError for shapes or devices that differ, returns or old values that require grad; TypeError for a dtype that is not
    floating.
    """
    values = logits.squeeze(-1) if logits.ndim > 2 and logits.shape[-1] == 1 else logits
    clip_range = self.cliprange if self.cliprange and self.cliprange > 0 else None
    for name, shape in (("token_mask", values.shape), ("sample_mask", values.shape[:1])):
        if data[name].shape != shape:
            raise ValueError(
                f"fused_critic.integrations.nemo_rl.mse_value_loss: {name}: expected shape {list(shape)} beside values {list(values.shape)}, "
                f"got {list(data[name].shape)}; nothing is broadcast"
            )
    count = global_valid_toks.reshape(()) if isinstance(global_valid_toks, torch.Tensor) else global_valid_toks
    loss, stats = fused_critic.value_loss(
        values,
        None if clip_range is None else data["values"],
        data["returns"],
        data["token_mask"] * data["sample_mask"].unsqueeze(-1),
        clip_range=clip_range,
        batch_num_tokens=count,
    )
    loss = self.scale * loss
    local, tokens = stats.to_dict(), float(count)
    # Of the local tokens in the global mean: micro-batches and ranks are summed by the trainer.
    share = local["weight"] / tokens if tokens > 0 else 0.0
    metrics = {
        "loss": float(loss.detach()),
        "vf_clipfrac": share * local["clip_fraction"],
        "returns_mean": share * local["return_mean"],
        "values_mean": share * local["value_mean"],
        "values_min": local["value_min"],
        "values_max": local["value_max"],
        "returns_sq_mean": share * (local["return_var"] + local["return_mean"] ** 2),
        "residual_sq_mean": share * (local["error_var"] + local["error_mean"] ** 2),
        "num_valid_samples": int(values.shape[0]),
    }
    return loss, metrics


_ESTIMATOR = "nemo_rl.algorithms.advantage_estimator:GeneralizedAdvantageEstimator"

ADAPTER = Adapter(
    "NeMo-RL",
    distribution="nemo-rl",
    version="git 00925dd (2026-08-22)",
    evidence="formulas only; its code is in no wheel and was not executed",
    replacements=[
        Replacement(f"{_ESTIMATOR}._compute_gae", compute_gae),
        Replacement(f"{_ESTIMATOR}._reward_whiten", reward_whiten),
        Replacement("nemo_rl.algorithms.loss.loss_functions:MseValueLossFn.__call__", mse_value_loss),
    ],
)
install, uninstall = ADAPTER.install, ADAPTER.uninstall
