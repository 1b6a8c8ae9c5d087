"""Statistics of the value loss: a few moments that merge exactly across micro-batches and ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ._collectives import gathered

# Order of the moments: enum Moment in csrc/value_loss.h.
_TOKENS, _WEIGHT, _LOSS, _CLIPPED, _OUTSIDE, _VALUE, _VALUE_SQ, _RETURN, _RETURN_SQ, _ERROR, _ERROR_SQ, _SEQUENCES, _MIN, _MAX = range(14)
NUM_MOMENTS = 14

# A variance of so many epsilons of the mean square is rounding: constants have up to some ten in one call of any size, some hundred in the sum of
# a thousand micro-batches. In float64 it is a standard deviation of 4.8e-7 of the root mean square, a few units in the last place of float32.
_ROUNDING = 1024


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator; 0 where both are (a sum over nothing and its weight)."""
    return numerator / denominator.clamp(min=torch.finfo(denominator.dtype).tiny)


@dataclass(frozen=True)
class ValueLossStats:
    """Moments of one or more value-loss calls, in one float64 tensor of 14 elements on the inputs' device.

    Every property is a 0-d tensor on that device: reading one costs no synchronisation, :meth:`to_dict` exactly one. Sums run over
    the valid tokens, each times its weight (1 under a bool or integer mask). With no valid token every property is 0
    (``value_min`` and ``value_max`` too).

    A variance is 0 where the sums cannot tell it from 0: below 2.3e-13 of the mean square, which is a standard deviation of less than 4.8e-7 of the
    root mean square (at a mean of 1e4: 0.0048).

    ``a + b`` merges two micro-batches and :meth:`all_reduce` merges ranks as if their tokens had been one call's. It is a pytree: it
    passes through ``torch.compile`` and ``torch.func`` transforms. What ``torch.func.vmap`` returns has one row of moments, and one element
    in each property, for every member of the batch.
    """

    moments: Tensor

    @property
    def num_tokens(self) -> Tensor:
        """Number of tokens with a non-zero weight."""
        return self.moments[..., _TOKENS]

    @property
    def weight(self) -> Tensor:
        """Sum of the weights: the number of valid tokens unless the mask is floating."""
        return self.moments[..., _WEIGHT]

    @property
    def num_sequences(self) -> Tensor:
        """Sequences (rows, columns, segments) with at least one valid token."""
        return self.moments[..., _SEQUENCES]

    @property
    def loss_sum(self) -> Tensor:
        """Sum of the weighted per-token losses, before any reduction's division or factor."""
        return self.moments[..., _LOSS]

    @property
    def loss_mean(self) -> Tensor:
        """``loss_sum / weight``: the mean loss of a token, whatever the reduction."""
        return _ratio(self.moments[..., _LOSS], self.moments[..., _WEIGHT])

    @property
    def clip_fraction(self) -> Tensor:
        """Share of tokens at which the clipped value's criterion is strictly greater: those without gradient, but with ``clip_only``
        (verl's ``vf_clipfrac``)."""
        return _ratio(self.moments[..., _CLIPPED], self.moments[..., _WEIGHT])

    @property
    def outside_fraction(self) -> Tensor:
        """Share of tokens whose value left the clip range (slime's and TorchRL's clip fraction)."""
        return _ratio(self.moments[..., _OUTSIDE], self.moments[..., _WEIGHT])

    @property
    def value_mean(self) -> Tensor:
        """Mean of the values."""
        return _ratio(self.moments[..., _VALUE], self.moments[..., _WEIGHT])

    @property
    def value_min(self) -> Tensor:
        """Least value of a valid token."""
        return torch.where(self.moments[..., _TOKENS] > 0, self.moments[..., _MIN], 0.0)

    @property
    def value_max(self) -> Tensor:
        """Greatest value of a valid token."""
        return torch.where(self.moments[..., _TOKENS] > 0, self.moments[..., _MAX], 0.0)

    @property
    def value_var(self) -> Tensor:
        """Biased variance of the values."""
        return self._variance(_VALUE)

    @property
    def return_mean(self) -> Tensor:
        """Mean of the returns."""
        return _ratio(self.moments[..., _RETURN], self.moments[..., _WEIGHT])

    @property
    def return_var(self) -> Tensor:
        """Biased variance of the returns."""
        return self._variance(_RETURN)

    @property
    def error_mean(self) -> Tensor:
        """Mean of ``returns - values``."""
        return _ratio(self.moments[..., _ERROR], self.moments[..., _WEIGHT])

    @property
    def error_var(self) -> Tensor:
        """Biased variance of ``returns - values``."""
        return self._variance(_ERROR)

    @property
    def explained_variance(self) -> Tensor:
        """``1 - Var[returns - values] / Var[returns]``; 0 where the returns do not vary, NaN where one is not finite."""
        variance = self._variance(_RETURN)
        return torch.where(variance == 0, 0.0, 1 - _ratio(self._variance(_ERROR), variance))  # NaN stays

    def _variance(self, first: int) -> Tensor:
        weight = self.moments[..., _WEIGHT]
        mean, mean_square = (_ratio(self.moments[..., moment], weight) for moment in (first, first + 1))
        variance = mean_square - mean * mean
        rounding = _ROUNDING * torch.finfo(weight.dtype).eps * mean_square
        return torch.where(variance <= rounding, 0.0, variance)  # NaN stays

    def __add__(self, other: ValueLossStats) -> ValueLossStats:
        """The statistics of both parts' tokens together."""
        if not isinstance(other, ValueLossStats):
            return NotImplemented
        return self.merge([self, other])

    def __radd__(self, other: object) -> ValueLossStats:
        """So that ``sum(list_of_stats)`` merges."""
        return self if other == 0 else NotImplemented

    @staticmethod
    def merge(stats: list[ValueLossStats] | tuple[ValueLossStats, ...]) -> ValueLossStats:
        """The statistics of all the tokens together."""
        return ValueLossStats(_merge(torch.stack([s.moments for s in stats])))

    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> ValueLossStats:
        """Merges the ranks of a ``torch.distributed`` process group (default: all) with one collective; every rank gets the same bits.

        Statistics of a loss of DTensors are those of the whole device mesh already; merging them again is an error.
        """
        if type(self.moments) is not Tensor and hasattr(self.moments, "device_mesh"):
            raise ValueError(
                "fused_critic.ValueLossStats.all_reduce: expected the statistics of one rank, got those of a DTensor, which are those of its whole "
                "device mesh; ValueLossStats(stats.moments.to_local()) merges several meshes"
            )
        return ValueLossStats(_merge(gathered(self.moments, group)))

    def to_dict(self) -> dict[str, float]:
        """All statistics of a single call or merge as Python floats, with a single synchronisation."""
        cpu = ValueLossStats(self.moments.detach().cpu())
        return {name: float(getattr(cpu, name)) for name in _PROPERTIES}


def _merge(rows: Tensor) -> Tensor:
    return torch.cat([rows[..., :_MIN].sum(0), rows[..., _MIN : _MIN + 1].amin(0), rows[..., _MAX:].amax(0)], dim=-1)


_PROPERTIES = [name for name, member in vars(ValueLossStats).items() if isinstance(member, property)]

# Not a NamedTuple: torch.compile may take `+` of two tuples for their concatenation.
pytree.register_pytree_node(
    ValueLossStats,
    lambda stats: ([stats.moments], None),
    lambda leaves, _: ValueLossStats(*leaves),
    serialized_type_name="fused_critic.ValueLossStats",
)
