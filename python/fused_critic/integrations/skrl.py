"""skrl's critic code for PyTorch (signatures of skrl 2.1.1), computed by fused_critic.

    from fused_critic.integrations import skrl as fused_skrl
    fused_skrl.install()          # for good (until uninstall())
    with fused_skrl.install():    # for the length of a block
        ...

skrl's agents have their ``compute_gae`` each in their own module, in two forms. :func:`compute_gae` takes the place of those of A2C, AMP, PPO, RPO,
TRPO, IPPO and MAPPO, :func:`compute_gae_rnn` of those of A2C_RNN, PPO_RNN, RPO_RNN and TRPO_RNN. The value loss is inside of the agents'
``update``, which does more than that: :func:`value_loss` is for an ``update`` of your own.

``terminated[t]`` and ``truncated[t]`` belong to the step from t and gate it; the truncated ones only with ``time_limit_bootstrap``. Without it a
truncated step goes on into the next episode, as there; the agents with recurrent networks never look at them.

Results are skrl's up to rounding. They differ on purpose in these points:

===================================  ====================================  =====================================================
case                                 skrl                                  here
===================================  ====================================  =====================================================
a single advantage                   NaN                                   0
equal advantages                     the mean's rounding error, divided    0
                                     by itself: numbers up to about 0.5
values inside the clip range         ``old + (new - old)``, which moves    the value itself
                                     some by a last bit
bounds of the clip range             no gradient or all, by torch's        the whole gradient
                                     version
empty mini-batch                     loss NaN                              loss 0, gradient 0
returns or old values that           gradient passed on                    error: they are constants of the loss
require grad
[B] beside [B, 1]                    broadcast to [B, B], with a warning   error
bf16 or fp16 throughout              computed in half precision            computed in float32; the loss is float32
gamma or lambda outside of [0, 1]    accepted                              error
===================================  ====================================  =====================================================
"""

from __future__ import annotations

from torch import Tensor

import fused_critic

from . import _rollout
from ._adapter import Adapter, Replacement

__all__ = ["compute_gae", "compute_gae_rnn", "install", "uninstall", "value_loss"]


def compute_gae(
    *,
    rewards: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    values: Tensor,
    last_values: Tensor,
    discount_factor: float = 0.99,
    lambda_coefficient: float = 0.95,
    time_limit_bootstrap: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns and advantages, in this order, of the shape of ``rewards``; the advantages are standardised over all of the rollout.

    Args:
        rewards, values: [T, N, 1], read where they lie.
        terminated, truncated: of the same shape, bool.
        last_values: [N, 1].
    """
    ends = terminated | truncated if time_limit_bootstrap else terminated
    advantages, returns = _rollout.gae(rewards, values, ends, last_values, discount_factor, lambda_coefficient)
    return returns, _rollout.standardised(advantages)


def compute_gae_rnn(
    *,
    rewards: Tensor,
    terminated: Tensor,
    values: Tensor,
    next_values: Tensor,
    discount_factor: float = 0.99,
    lambda_coefficient: float = 0.95,
) -> tuple[Tensor, Tensor]:
    """As :func:`compute_gae` without truncated steps; ``next_values``, [N, 1], are the last ones alone."""
    advantages, returns = _rollout.gae(rewards, values, terminated, next_values, discount_factor, lambda_coefficient)
    return returns, _rollout.standardised(advantages)


def value_loss(
    predicted_values: Tensor, sampled_values: Tensor, sampled_returns: Tensor, value_clip: float = 0.2, value_loss_scale: float = 2.5
) -> Tensor:
    """The 0-d ``value_loss`` of the agents' ``update``: ``value_loss_scale`` times the mean squared error of the clipped values.

    A value that left the range has no gradient, in whatever direction it went.

    Args:
        predicted_values: the critic's values, [B, 1]; the gradient goes here.
        sampled_values, sampled_returns: of the same shape.
        value_clip: the range around ``sampled_values``; no clipping where it is not positive.

    Raises:
        ValueError: shapes that differ, ``sampled_values`` or ``sampled_returns`` that require grad.
    """
    values, old_values, returns = _rollout.per_element(
        predicted_values=predicted_values, sampled_values=sampled_values, sampled_returns=sampled_returns
    )
    clip_range = value_clip if value_clip > 0 else None
    return 2 * value_loss_scale * fused_critic.value_loss(values, old_values, returns, clip_range=clip_range, clip_only=True).loss


_AGENTS, _MULTI_AGENTS = "skrl.agents.torch", "skrl.multi_agents.torch"
_MODULES = [
    *(f"{_AGENTS}.{name}.{name}" for name in ("a2c", "amp", "ppo", "rpo", "trpo")),
    *(f"{_MULTI_AGENTS}.{name}.{name}" for name in ("ippo", "mappo")),
]
_RNN_MODULES = [f"{_AGENTS}.{name}.{name}_rnn" for name in ("a2c", "ppo", "rpo", "trpo")]

ADAPTER = Adapter(
    "skrl",
    distribution="skrl",
    version="2.1.1",
    replacements=[
        *(Replacement(f"{module}:compute_gae", compute_gae) for module in _MODULES),
        *(Replacement(f"{module}:compute_gae", compute_gae_rnn) for module in _RNN_MODULES),
    ],
)
install, uninstall = ADAPTER.install, ADAPTER.uninstall
