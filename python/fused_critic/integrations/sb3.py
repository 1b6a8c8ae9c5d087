"""Stable-Baselines3's rollout buffer and value loss (version 2.9.2), computed by fused_critic.

    from fused_critic.integrations import sb3 as fused_sb3

    fused_sb3.install()           # RolloutBuffer.compute_returns_and_advantage computes here, until uninstall()
    with fused_sb3.install():     # or for the length of a block
        ...

``RolloutBuffer`` and every buffer that inherits the method (``DictRolloutBuffer``; sb3-contrib's) are replaced at once, for PPO, A2C and
whatever else fills them, existing instances included. The value loss is written out inside of SB3's ``train()``, where nothing can be
replaced: ``value_loss`` and ``explained_variance`` are for a ``train()`` of one's own.

The results are SB3's up to rounding. They differ on purpose in these points:

===================================  ==========================================  ==================================================
case                                 SB3                                         here
===================================  ==========================================  ==================================================
NaN or inf as the value after the    NaN in every earlier step of that           not used
end of an episode                    environment
episode starts and dones other than  blends: the share ``1 - x`` passes          non-zero ends the episode
0 and 1
gamma or gae_lambda outside [0, 1]   accepted                                    ValueError
last_values that require grad        RuntimeError                                detached
value loss, a value inside of the    ``old + clamp(new - old)`` moves it by a    not moved
range                                last bit
value loss, a value on a bound of    gradient as torch.clamp has it              the whole gradient
the range
value loss, shapes that differ       broadcast                                   ValueError
value loss in half precision         the range collapses where values are large  computed in float32
returns or old values that require   gradient passed on                          error: they are constants of the loss
grad
===================================  ==========================================  ==================================================
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Optional

import torch

import fused_critic

from . import _rollout
from ._adapter import Adapter, Replacement

if TYPE_CHECKING:
    import numpy as np

__all__ = ["compute_returns_and_advantage", "explained_variance", "install", "uninstall", "value_loss"]


def compute_returns_and_advantage(self: Any, last_values: torch.Tensor, dones: np.ndarray) -> None:
    """The method of ``RolloutBuffer``: fills ``advantages`` in place and sets ``returns``, both [buffer_size, n_envs].

    Reads ``rewards``, ``values`` and ``episode_starts`` [buffer_size, n_envs], without a copy, ``gamma`` and ``gae_lambda``.
    ``last_values`` (n_envs elements, any device): the values after the last step; ``dones`` [n_envs]: whether it ended the episode.
    """
    arrays = self.rewards, self.values, self.episode_starts, self.advantages
    rewards, values, starts, advantages = (torch.from_numpy(x) for x in arrays)
    # Step t ended an episode where step t + 1 starts one.
    ends = torch.cat([starts[1:] != 0, torch.from_numpy(dones).reshape(1, -1) != 0])
    estimated, returns = fused_critic.gae(
        rewards,
        values,
        gamma=float(self.gamma),
        lam=float(self.gae_lambda),
        terminated=ends,
        bootstrap_values=last_values.detach().cpu().flatten(),
        time_dim=0,
    )
    advantages.copy_(estimated)
    self.returns = returns.to(torch.promote_types(advantages.dtype, values.dtype)).numpy()


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip_range_vf: Optional[float] = None
) -> torch.Tensor:
    """The value loss of SB3's PPO: the mean square of ``returns`` minus the prediction, without a factor; multiply it by ``vf_coef``.

    The prediction is ``values``, or, with a ``clip_range_vf``, ``values`` clipped to that distance from ``old_values`` and nothing else: what
    left the range has no gradient. All three tensors have one shape (SB3: [batch]), or a ValueError shows theirs.
    """
    _rollout.same_shape(values=values, old_values=old_values, returns=returns)
    loss, _ = fused_critic.value_loss(
        values.flatten(), old_values.flatten(), returns.flatten(), clip_range=clip_range_vf, clip_only=clip_range_vf is not None
    )
    return 2 * loss


def explained_variance(y_pred: np.ndarray, y_true: np.ndarray) -> float:
    """``1 - Var[y_true - y_pred] / Var[y_true]`` of two 1-d arrays; NaN where ``y_true`` does not vary. Moments in float64."""
    pred, true = torch.from_numpy(y_pred), torch.from_numpy(y_true)
    if pred.ndim != 1 or true.ndim != 1:
        raise ValueError(f"fused_critic.integrations.sb3: expected 1-d arrays, got {list(pred.shape)} and {list(true.shape)}")
    _, stats = fused_critic.value_loss(pred, None, true, clip_range=None)
    return float(stats.explained_variance) if stats.return_var > 0 else math.nan


ADAPTER = Adapter(
    "Stable-Baselines3",
    distribution="stable-baselines3",
    version="2.9.2",
    replacements=[
        Replacement("stable_baselines3.common.buffers:RolloutBuffer.compute_returns_and_advantage", compute_returns_and_advantage)
    ],
)
install, uninstall = ADAPTER.install, ADAPTER.uninstall
