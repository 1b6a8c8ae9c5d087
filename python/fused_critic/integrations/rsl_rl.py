"""rsl_rl's critic code (signatures of rsl-rl-lib 5.5.1), computed by fused_critic.

    from fused_critic.integrations import rsl_rl as fused_rsl_rl
    fused_rsl_rl.install()          # for good (until uninstall())
    with fused_rsl_rl.install():    # for the length of a block
        ...

puts :func:`compute_returns` in the place of ``rsl_rl.algorithms.ppo.PPO.compute_returns``, a loop over the steps of a rollout. Of the other
lines, the value loss is inside of ``PPO.update``, which does more than that: :func:`value_loss` is for an ``update`` of your own.

``dones[t]`` belongs to the step from t and gates it. Time-outs have become a part of the rewards before (``PPO.process_env_step`` adds
``gamma * V_t``), and nothing changes that.

Results are rsl_rl's up to rounding. They differ on purpose in these points:

===================================  ====================================  =====================================================
case                                 rsl_rl                                here
===================================  ====================================  =====================================================
normalising a single advantage       NaN                                   0
normalising equal advantages         the mean's rounding error, divided    0
                                     by itself: numbers up to about 0.5
float64 storage                      gamma and lambda rounded to float32   in float64
values inside the clip range         ``old + (new - old)``, which moves    the value itself
                                     some by a last bit
tie of the two losses                half the gradient                     the whole gradient
bounds of the clip range             half the gradient or all, by          the whole gradient
                                     torch's version
empty mini-batch                     loss NaN                              loss 0, gradient 0
returns or old values that           gradient passed on                    error: they are constants of the loss
require grad
[B] beside [B, 1]                    broadcast to [B, B]                   error
bf16 or fp16 throughout              computed in half precision            computed in float32; the loss is float32
gamma or lambda outside of [0, 1]    accepted                              error
===================================  ====================================  =====================================================
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

import fused_critic

from . import _rollout
from ._adapter import Adapter, Replacement

__all__ = ["compute_returns", "install", "uninstall", "value_loss"]


def compute_returns(self: Any, obs: Any) -> None:
    """``PPO.compute_returns``: fills ``storage.returns`` and sets ``storage.advantages``, normalised unless that is done per mini-batch.

    The storage's [T, N, 1] buffers are read where they lie. ``storage.returns`` stays the same tensor: a new one would belong to the inference mode
    in which the runner calls this, and autograd could not save it.
    """
    storage = self.storage
    hidden_state = self.critic.get_hidden_state()
    last_values = self.critic(obs).detach()
    self.critic.reset(hidden_state=hidden_state)  # the next rollout goes on from here
    advantages, returns = _rollout.gae(storage.rewards, storage.values, storage.dones, last_values, self.gamma, self.lam)
    storage.returns.copy_(returns)
    storage.advantages = advantages if self.normalize_advantage_per_mini_batch else _rollout.standardised(advantages)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_param: float = 0.2, use_clipped_value_loss: bool = True) -> Tensor:
    """The 0-d ``value_loss`` of ``PPO.update``, without ``value_loss_coef``: the mean of the squared errors, or of the greater of the clipped
    and the unclipped one.

    Args:
        values: the critic's values, [B, 1], or [T, N, 1] with recurrent networks; the gradient goes here.
        old_values, returns: ``batch.values`` and ``batch.returns``, of the same shape.
        clip_param: the range around ``old_values``.
        use_clipped_value_loss: False: no clipping.

    Raises:
        ValueError: shapes that differ, ``old_values`` or ``returns`` that require grad, a negative ``clip_param``.
    """
    values, old_values, returns = _rollout.per_element(values=values, old_values=old_values, returns=returns)
    return 2 * fused_critic.value_loss(values, old_values, returns, clip_range=clip_param if use_clipped_value_loss else None).loss


ADAPTER = Adapter(
    "rsl_rl",
    distribution="rsl-rl-lib",
    version="5.5.1",
    replacements=[Replacement("rsl_rl.algorithms.ppo:PPO.compute_returns", compute_returns)],
)
install, uninstall = ADAPTER.install, ADAPTER.uninstall
