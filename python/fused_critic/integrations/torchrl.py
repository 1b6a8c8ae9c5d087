"""TorchRL's advantage estimation and critic loss (signatures of TorchRL 0.14.1), computed by fused_critic.

Importing this module does not import TorchRL. Three ways to use it:

    from fused_critic.integrations import torchrl as fused_torchrl

    fused_torchrl.install()                                        # TorchRL's own GAE and MultiAgentGAE compute here, until uninstall()
    gae = fused_torchrl.GAE(gamma=0.99, lmbda=0.95, value_network=critic)       # or: nothing is patched, this module computes here
    loss.make_value_estimator(fused_torchrl.GAE, gamma=0.99, lmbda=0.95, value_network=critic)
    fused_torchrl.vec_generalized_advantage_estimate(gamma, lmbda, value, next_value, reward, done, terminated)    # or: the functions

``GAE`` is a subclass of ``torchrl.objectives.value.GAE``, made when it is first asked for. It runs TorchRL's own ``forward`` and
``value_estimate`` with the two functions below in place of TorchRL's: every option, key and output is TorchRL's.

The results are TorchRL's up to rounding. They differ on purpose in these points:

===================================  ==========================================  ==================================================
case                                 TorchRL                                     here
===================================  ==========================================  ==================================================
vectorised, gamma * lmbda < 1        series cut off below 1e-7                   the recursion itself
vectorised, gamma * lmbda >= 1       as many taps as the longest trajectory      the recursion itself: time grows with T
                                     has steps: time grows with T squared
vectorised, gamma * lmbda = 0        IndexError                                  one-step advantages
vectorised, no steps or no rows      IndexError, RuntimeError                    empty results
vectorised, 0-d gamma or lmbda       a part of their gradient (the powers of     the whole gradient
that requires grad                   gamma * lmbda are constants)
float64 values, gamma a number or    products with it in float32                 all in float64
a float32 tensor
half precision throughout            loop: target rounded twice. Vectorised      computed in float32. Loop: target rounded once.
                                     with a discount per step: half precision    Vectorised: float32 results
NaN or inf as next value of a        NaN                                         not used
terminated step
flags that are not bool              wrong numbers, silently (``~1`` is -2)      non-zero is set
integer rewards or values            accepted                                    TypeError
[T] tensors, time_dim=0              results of shape [T, 1]                     [T]
gamma with fewer dimensions,         ``time_dim`` counts in gamma's own shape:   expands to the values' shape, as torch expands
positive time_dim                    other axes are combined
clipped loss, ties and bounds of     a part of the gradient                      the whole gradient wherever the clipped loss is
the range                                                                        not strictly greater
clipped loss in half precision       range collapses where the values are large  computed in float32, rounded once
loss: target or old values that      gradient passed on                          error: they are constants of the loss
require grad
loss: NaN or inf at masked elements  gradient NaN there                          never used; gradient exactly 0
loss: a mask of another size         broadcast, leading dimensions too           RuntimeError
value_clip_fraction under a mask     over all elements                           over the valid elements
explained variance                   over the first dimension: one for each      one over all valid elements; 0 where the target
                                     remaining position, masked elements too     does not vary
===================================  ==========================================  ==================================================
"""

from __future__ import annotations

import functools
import importlib
import math
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple, Optional, Union

import torch

import fused_critic

from ._adapter import Adapter, Replacement

# And GAE, which is not listed: ``import *`` would make it, and import TorchRL.
__all__ = [
    "CriticLoss",
    "critic_loss",
    "generalized_advantage_estimate",
    "install",
    "uninstall",
    "vec_generalized_advantage_estimate",
]

Scalar = Union[float, torch.Tensor]


def generalized_advantage_estimate(
    gamma: Scalar,
    lmbda: Scalar,
    state_value: torch.Tensor,
    next_state_value: torch.Tensor,
    reward: torch.Tensor,
    done: torch.Tensor,
    terminated: Optional[torch.Tensor] = None,
    *,
    time_dim: int = -2,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation over ``time_dim`` of [*B, T, *F] tensors: (advantage, value_target), differentiable.

    ``done`` stops the trace, ``terminated`` (default: ``done``) drops the next value. The five tensors have exactly one shape, or a
    RuntimeError names them; values and rewards are floating, or a TypeError names the one that is not. ``gamma`` and ``lmbda``: numbers, tensors of one element, or tensors that expand to that shape (a discount per
    step). Where both are numbers in [0, 1] without gradient it is one pass of ``fused_critic.gae``; else ``fused_critic.reverse_scan`` over
    temporal differences that torch computes, with gradients for ``gamma`` and ``lmbda`` too.

    Dtypes are TorchRL's: the advantage has that of ``next_state_value``, the target that of the advantage and ``state_value`` together.
    """
    tensors = (state_value, next_state_value, reward, done, terminated)
    advantage, value_target = vec_generalized_advantage_estimate(gamma, lmbda, *tensors, time_dim=time_dim)
    dtype = next_state_value.dtype
    return advantage.to(dtype), value_target.to(torch.promote_types(dtype, state_value.dtype))


def vec_generalized_advantage_estimate(
    gamma: Scalar,
    lmbda: Scalar,
    state_value: torch.Tensor,
    next_state_value: torch.Tensor,
    reward: torch.Tensor,
    done: torch.Tensor,
    terminated: Optional[torch.Tensor] = None,
    *,
    time_dim: int = -2,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`generalized_advantage_estimate`; both results are float32, or float64 if any tensor is, which is what TorchRL's has too."""
    terminated = done if terminated is None else terminated
    named = {"state_value": state_value, "next_state_value": next_state_value, "reward": reward, "done": done, "terminated": terminated}
    shape = reward.shape
    if any(x.shape != shape for x in named.values()):
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in named.items())
        raise RuntimeError(f"fused_critic.integrations.torchrl: expected five tensors of one shape, got {shapes}")
    for name in ("state_value", "next_state_value", "reward"):
        if not named[name].dtype.is_floating_point:
            raise TypeError(f"fused_critic.integrations.torchrl: {name}: expected a floating dtype, got {named[name].dtype}")
    if not -len(shape) <= time_dim < len(shape):
        raise RuntimeError(f"fused_critic.integrations.torchrl: time_dim={time_dim} is not a dimension of the shape {list(shape)}")
    layout = _Layout(shape, time_dim % len(shape))
    # done and terminated are independent here: a terminated step that is not done has no next value, and its trace goes on.
    same = terminated is done
    done, terminated = (x if x.dtype == torch.bool else x != 0 for x in (done, terminated))
    following = next_state_value if same else next_state_value.masked_fill(terminated, 0)

    wide = torch.float32
    for x in (state_value, next_state_value, reward):
        wide = torch.promote_types(wide, x.dtype)
    if _is_plain(gamma, wide) and _is_plain(lmbda, wide):
        ends = layout.rows(done)
        estimate = fused_critic.gae(
            layout.rows(reward),
            layout.rows(state_value),
            gamma=_plain(gamma),
            lam=_plain(lmbda),
            next_values=layout.rows(following),
            terminated=ends if same else None,
            truncated=None if same else ends,
            time_dim=layout.time_dim,
        )
        return layout.back(estimate.advantages), layout.back(estimate.returns)

    for number in (gamma, lmbda):
        if isinstance(number, torch.Tensor):
            wide = torch.promote_types(wide, number.dtype)
    gamma, lmbda = (_expanded(x, name, shape, wide) for x, name in ((gamma, "gamma"), (lmbda, "lmbda")))
    if same:
        following = following.masked_fill(done, 0)
    state_value = state_value.to(wide)
    delta = reward.to(wide) + gamma * following.to(wide) - state_value
    decay = (gamma * lmbda * torch.ones_like(delta)).masked_fill(done, 0)
    advantage = layout.back(fused_critic.reverse_scan(layout.rows(delta), layout.rows(decay), time_dim=layout.time_dim))
    return advantage, advantage + state_value


class _Layout:
    """[*P, T, *Q] as the 2-d tensor of sequences that the operators take: a view where P or Q has one element, else a copy."""

    def __init__(self, shape: torch.Size, time: int):
        self.shape, self.time, self.steps = shape, time, shape[time]
        self.before, self.after = math.prod(shape[:time]), math.prod(shape[time + 1 :])
        self.time_dim = 0 if self.before == 1 and self.after > 1 else -1

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        if self.time_dim == 0:
            return x.reshape(self.steps, self.after)
        return x.movedim(self.time, -1).reshape(self.before * self.after, self.steps)

    def back(self, rows: torch.Tensor) -> torch.Tensor:
        if self.time_dim == 0:
            return rows.reshape(self.shape)
        others = (*self.shape[: self.time], *self.shape[self.time + 1 :])
        return rows.reshape(*others, self.steps).movedim(-1, self.time).contiguous()


def _is_plain(number: Scalar, wide: torch.dtype) -> bool:
    """Whether fused_critic.gae takes the number for what TorchRL takes it. One on a GPU is not read, and not checked there either."""
    if not isinstance(number, torch.Tensor):
        return 0 <= number <= 1
    if number.numel() != 1 or (number.requires_grad and torch.is_grad_enabled()) or torch.promote_types(wide, number.dtype) != wide:
        return False
    return number.device.type != "cpu" or torch.compiler.is_compiling() or 0 <= float(number) <= 1


def _plain(number: Scalar) -> Scalar:
    return number.detach().reshape(()) if isinstance(number, torch.Tensor) else number


def _expanded(number: Scalar, name: str, shape: torch.Size, dtype: torch.dtype) -> Scalar:
    if not isinstance(number, torch.Tensor):
        return number
    number = number.reshape(()) if number.numel() == 1 else number
    try:
        return number.to(dtype).expand(shape)
    except RuntimeError:
        raise ValueError(
            f"fused_critic.integrations.torchrl: {name}: expected a number, or a tensor that expands to {list(shape)}, "
            f"got {list(number.shape)}"
        ) from None


class CriticLoss(NamedTuple):
    """``value_clip_fraction`` is None without clipping. Only ``loss`` carries a gradient."""

    loss: torch.Tensor
    value_clip_fraction: Optional[torch.Tensor]
    explained_variance: torch.Tensor


# fused_critic's "mse" has the factor 1/2, TorchRL's "l2" has not.
_CRITERIA = {"l2": (2.0, "mse"), "l1": (1.0, "l1"), "smooth_l1": (1.0, "smooth_l1")}
_REDUCTIONS = {"mean": "token-mean", "sum": "token-sum", "none": "none"}


def critic_loss(
    target_return: torch.Tensor,
    state_value: torch.Tensor,
    old_state_value: Optional[torch.Tensor] = None,
    *,
    clip_value: Optional[Scalar] = None,
    loss_critic_type: str = "smooth_l1",
    critic_coeff: Scalar = 1.0,
    reduction: str = "mean",
    mask: Optional[torch.Tensor] = None,
) -> CriticLoss:
    """The critic's part of ``PPOLoss`` and ``ClipPPOLoss``: the entries loss_critic, value_clip_fraction and explained_variance.

    For a loss module of one's own. The tensors have one shape, any number of dimensions; ``mask`` (as TorchRL's "shifted_valid") may lack
    trailing dimensions, or have trailing ones of one element; a RuntimeError names the one whose shape is another. ``reduction``: "mean" (over the valid elements; 0 where there are none), "sum", or "none" (the elements, 0 at
    masked ones). ``value_clip_fraction``: the share of elements whose value left the range.
    """
    if loss_critic_type not in _CRITERIA:
        raise NotImplementedError(f"loss_critic_type {loss_critic_type!r}: expected one of {', '.join(_CRITERIA)}")
    if reduction not in _REDUCTIONS:
        raise NotImplementedError(f"reduction {reduction!r}: expected one of {', '.join(_REDUCTIONS)}")
    factor, criterion = _CRITERIA[loss_critic_type]
    loss, stats = fused_critic.value_loss(
        state_value.reshape(-1),
        None if old_state_value is None else _same_shape(old_state_value, state_value, "old_state_value").reshape(-1),
        _same_shape(target_return, state_value, "target_return").reshape(-1),
        None if mask is None else _per_element(mask, state_value).reshape(-1),
        clip_range=None if clip_value is None else _plain(clip_value),
        criterion=criterion,
        reduction=_REDUCTIONS[reduction],
    )
    dtype = torch.promote_types(state_value.dtype, target_return.dtype)
    loss = (critic_coeff * factor * loss).to(dtype)
    fraction = None if clip_value is None else stats.outside_fraction.to(state_value.dtype)
    return CriticLoss(loss.reshape(state_value.shape) if reduction == "none" else loss, fraction, stats.explained_variance.to(dtype))


def _same_shape(x: torch.Tensor, like: torch.Tensor, name: str) -> torch.Tensor:
    if x.shape != like.shape:
        raise RuntimeError(
            f"fused_critic.integrations.torchrl: {name}: expected state_value's shape {list(like.shape)}, got {list(x.shape)}"
        )
    return x


def _per_element(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    shape = mask.shape
    while mask.ndim > max(1, like.ndim - 1) and mask.shape[-1] == 1:  # TorchRL's masks are [*B, T, 1], whatever they lie beside
        mask = mask.squeeze(-1)
    if mask.shape != like.shape[: mask.ndim]:
        raise RuntimeError(
            f"fused_critic.integrations.torchrl: mask: expected state_value's shape {list(like.shape)}, trailing dimensions aside, got {list(shape)}"
        )
    return mask[(...,) + (None,) * (like.ndim - mask.ndim)].expand_as(like)


_FUNCTIONAL = "torchrl.objectives.value.functional"

ADAPTER = Adapter(
    "TorchRL",
    distribution="torchrl",
    version="0.14.1",
    replacements=[
        Replacement(f"{_FUNCTIONAL}:generalized_advantage_estimate", generalized_advantage_estimate),
        Replacement(f"{_FUNCTIONAL}:vec_generalized_advantage_estimate", vec_generalized_advantage_estimate),
    ],
)
install, uninstall = ADAPTER.install, ADAPTER.uninstall


def __getattr__(name: str) -> Any:
    if name == "GAE":
        return _gae_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _gae_class() -> type:
    """TorchRL's GAE, whose methods find our functions under the names of TorchRL's."""
    ADAPTER.check()
    advantages = importlib.import_module("torchrl.objectives.value.advantages")
    ours: dict[str, Callable[..., Any]] = {replacement.path[-1]: replacement.ours for replacement in ADAPTER.replacements}
    # A module of its own and not merely a dictionary: torch.compile looks globals up by the name of the module.
    space = types.ModuleType(f"{__name__}._advantages")
    vars(space).update({**vars(advantages), **ours, "__name__": space.__name__})
    sys.modules[space.__name__] = space
    members = {name: _rebound(vars(advantages.GAE)[name], space, ours) for name in ("forward", "value_estimate")}
    members |= {"__module__": __name__, "__doc__": "TorchRL's ``GAE``, computed by fused_critic: same arguments, keys and outputs."}
    return types.new_class("GAE", (advantages.GAE,), exec_body=lambda namespace: namespace.update(members))


def _rebound(function: Any, space: types.ModuleType, names: dict[str, Callable[..., Any]]) -> Any:
    """A copy of the function, decorators included, that finds its globals in `space`."""
    inner = getattr(function, "__wrapped__", None)
    if inner is None:
        if not set(names) & set(function.__code__.co_names):
            raise RuntimeError(f"TorchRL's {function.__qualname__} calls none of {', '.join(names)}, which fused_critic replaces in it")
        scope, closure = vars(space), function.__closure__
    else:
        rebound = _rebound(inner, space, names)
        cells = [types.CellType(rebound) if cell.cell_contents is inner else cell for cell in function.__closure__]
        scope, closure = function.__globals__, tuple(cells)
    copy = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__, copy.__qualname__, copy.__doc__ = function.__kwdefaults__, function.__qualname__, function.__doc__
    if inner is not None:
        copy.__wrapped__ = rebound  # type: ignore[attr-defined]
    return copy
