"""Statistics merged over micro-batches are those of all their tokens in one call, however the batch was cut."""

import math

import fused_critic
import pytest
import torch
from fused_critic.check import cases
from hypothesis import given
from hypothesis import strategies as st

TOLERANCE = 1e-6  # relative and absolute
MEAN = 1e4  # of the values and returns, whose standard deviation is about 1


def batch(rows, columns, dtype, mask_dtype, seed):
    """values, old values, returns, mask: far from zero, the returns half explained by the values, the rows' means apart."""
    generator = torch.Generator().manual_seed(seed)

    def noise():
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64)

    values = MEAN + noise() + torch.linspace(-1, 1, rows, dtype=torch.float64)[:, None]
    returns = values + 0.7 * noise()
    old_values = values + 0.3 * noise()
    return *(x.to(dtype) for x in (values, old_values, returns)), cases.mask((rows, columns), mask_dtype, generator)


def exact(values, returns, mask):
    """Moments by the textbook, in float64."""
    weight = torch.ones_like(values, dtype=torch.float64)
    if mask is not None:
        weight = mask.double() if mask.is_floating_point() else (mask != 0).double()
    v, r = values.double(), returns.double()
    total = weight.sum()

    def variance(x):
        mean = (weight * x).sum() / total
        return (weight * (x - mean).square()).sum() / total

    return {
        "value_mean": (weight * v).sum() / total,
        "value_var": variance(v),
        "return_var": variance(r),
        "error_mean": (weight * (r - v)).sum() / total,
        "error_var": variance(r - v),
        "explained_variance": 1 - variance(r - v) / variance(r) if variance(r) > 0 else torch.tensor(0.0),
    }


def assert_statistics(got, expected, what):
    for name, value in expected.items():
        assert math.isclose(got[name], float(value), rel_tol=TOLERANCE, abs_tol=TOLERANCE), (
            f"{what}: {name}: {got[name]!r}, expected {value!r}"
        )


@given(
    rows=st.integers(2, 12),
    columns=st.integers(1, 70),
    cuts=st.lists(st.integers(0, 12), max_size=5),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    mask_dtype=st.sampled_from([None, torch.bool, torch.float32]),
    emptied=st.sets(st.integers(0, 5)),
    seed=st.integers(0, 999),
)
def test_any_cut_merges_to_the_whole(rows, columns, cuts, dtype, mask_dtype, emptied, seed):
    values, old_values, returns, mask = batch(rows, columns, dtype, mask_dtype, seed)
    bounds = [0, *sorted(min(cut, rows) for cut in cuts), rows]  # parts without a row, where cuts coincide
    parts = list(zip(bounds, bounds[1:]))
    if mask is not None:
        for part in emptied & set(range(len(parts))):  # parts without a valid token
            mask[slice(*parts[part])] = 0
    whole = fused_critic.value_loss(values, old_values, returns, mask).stats
    pieces = []
    for part in parts:
        cut = [x if x is None else x[slice(*part)] for x in (values, old_values, returns, mask)]
        pieces.append(fused_critic.value_loss(*cut).stats)
    added = pieces[0]
    for piece in pieces[1:]:
        added = added + piece
    expected = whole.to_dict()
    for name, merged in (("+", added), ("sum", sum(pieces)), ("merge", fused_critic.ValueLossStats.merge(pieces))):
        assert_statistics(merged.to_dict(), expected, name)
    if expected["weight"] > 0:
        assert_statistics(added.to_dict(), exact(values, returns, mask), "float64")


def test_micro_batches_of_a_large_batch(device):
    """Enough tokens for the cut to go through the kernels' chunks."""
    values, old_values, returns, mask = (x.to(device) for x in batch(40, 700, torch.float32, torch.bool, 0))
    whole = fused_critic.value_loss(values, old_values, returns, mask).stats.to_dict()
    merged = sum(
        fused_critic.value_loss(*(x[rows] for x in (values, old_values, returns, mask))).stats for rows in torch.arange(40).split(7)
    )
    assert_statistics(merged.to_dict(), whole, "micro-batches")
    assert_statistics(whole, exact(values.cpu(), returns.cpu(), mask.cpu()), "float64")


def test_one_token_each(device):
    """A single token has no variance of its own; two of them have that of their distance."""
    one, other = (torch.full((1, 1), x, device=device) for x in (MEAN, MEAN + 2))
    merged = fused_critic.value_loss(one, one, one).stats + fused_critic.value_loss(other, other, other).stats
    assert_statistics(merged.to_dict(), {"value_var": 1, "value_mean": MEAN + 1, "error_var": 0, "explained_variance": 1}, "two tokens")


@pytest.mark.parametrize("constant", [0.1, 1 / 3, 1e4 / 3])
@pytest.mark.parametrize("shape", [(1000,), (51, 1), (7, 3000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_constants_do_not_vary(device, dtype, shape, constant):
    """No variance is left of the rounding of sums, neither in one call nor in a thousand micro-batches."""
    returns = torch.full(shape, constant, dtype=dtype, device=device)
    values = torch.randn(shape, dtype=dtype, device=device)
    for mask in (None, torch.rand(shape, device=device) < 0.6, torch.rand(shape, device=device)):
        one = fused_critic.value_loss(values, None, returns, mask, clip_range=None).stats
        for stats in (one, sum([one] * 1000), fused_critic.ValueLossStats.merge([one] * 1000)):
            assert stats.return_var == 0 and stats.explained_variance == 0 and stats.value_var > 0
        offset = fused_critic.value_loss(returns - 1, None, returns, mask, clip_range=None).stats
        assert offset.value_var == 0 and offset.explained_variance == 0


@pytest.mark.parametrize("spread, tolerance", [(1, 1e-6), (1e-2, 1e-2)])
def test_a_small_variance_is_none_of_rounding(device, spread, tolerance):
    """About a mean of 1e4. The tolerance: a few roundings of the mean square, over the variance."""
    generator = torch.Generator().manual_seed(0)
    returns, noise = MEAN + spread * torch.randn(2, 4000, generator=generator, dtype=torch.float64)
    values = returns - 0.5 * (noise - MEAN)
    stats = fused_critic.value_loss(values.to(device), None, returns.to(device), clip_range=None).stats
    expected = exact(values, returns, None)
    for name in ("return_var", "value_var", "explained_variance"):
        assert math.isclose(getattr(stats, name), expected[name], rel_tol=tolerance), name


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_explained_variance_of_what_is_not_finite(device, poison):
    values, _, returns, _ = (x.to(device) for x in batch(3, 8, torch.float32, torch.bool, 1))
    returns[1, 2] = poison
    mask = torch.ones_like(returns, dtype=torch.bool)
    assert fused_critic.value_loss(values, None, returns, mask, clip_range=None).stats.explained_variance.isnan()
    mask[1, 2] = False
    assert fused_critic.value_loss(values, None, returns, mask, clip_range=None).stats.explained_variance.isfinite()


def test_nothing_is_neutral(device):
    values, old_values, returns, mask = (x.to(device) for x in batch(3, 8, torch.float32, torch.bool, 1))
    stats = fused_critic.value_loss(values, old_values, returns, mask).stats
    nothing = fused_critic.value_loss(values, old_values, returns, torch.zeros_like(mask)).stats
    no_tokens = fused_critic.value_loss(values[:0], old_values[:0], returns[:0]).stats
    for empty in (nothing, no_tokens):
        cases.assert_same_bits((stats + empty).moments, stats.moments)
        cases.assert_same_bits((empty + stats).moments, stats.moments)
    assert all(value == 0 for value in (nothing + no_tokens).to_dict().values())


def test_only_statistics_can_be_added(device):
    stats = fused_critic.value_loss(*(torch.ones(2, 2, device=device) for _ in range(3))).stats
    for wrong in (1, 0.5, None):
        with pytest.raises(TypeError, match="unsupported operand"):
            stats + wrong
