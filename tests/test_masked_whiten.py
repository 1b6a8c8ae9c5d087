"""masked_whiten against a float64 reference, on every device."""

import math

import fused_critic
import pytest
import torch
from fused_critic import reference
from fused_critic.check import cases
from fused_critic.check.gae import WHITEN_OPTIONS, compare_whiten, compare_whiten_far_from_zero, compare_whiten_few, whiten_tolerance
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize("options", WHITEN_OPTIONS, ids=str)
@pytest.mark.parametrize("mask_dtype", cases.MASKS, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_matches_reference(device, dtype, mask_dtype, options):
    compare_whiten(dtype, mask_dtype, options, device)


def test_far_from_zero(device):
    compare_whiten_far_from_zero(device)


@pytest.mark.parametrize("valid", [0, 1])
@pytest.mark.parametrize("shift_mean", [True, False])
def test_fewer_than_two_give_zeros(device, valid, shift_mean):
    compare_whiten_few(valid, shift_mean, device)


def test_empty(device):
    assert fused_critic.masked_whiten(torch.empty(0, 3, device=device)).shape == (0, 3)


def test_masked_contents_have_no_influence(device):
    mask = torch.tensor([1, 0, 1, 1], device=device)
    a, b = (fused_critic.masked_whiten(torch.tensor([1.0, hidden, 3.0, 5.0], device=device), mask) for hidden in (0.0, math.nan))
    cases.assert_same_bits(a, b)


def test_differentiable(device):
    x = torch.randn(12, dtype=torch.float64, device=device, requires_grad=True)
    mask = (torch.arange(12) % 3 > 0).to(device)
    assert torch.autograd.gradcheck(lambda x: fused_critic.masked_whiten(x, mask), x)


@given(
    shape=st.lists(st.integers(0, 40), min_size=0, max_size=3).map(tuple),
    mean=st.sampled_from([0.0, 1e4, -300.0]),
    dtype=st.sampled_from(cases.DTYPES),
    mask_dtype=st.sampled_from(cases.MASKS),
    how=st.sampled_from(cases.STRIDES),
    options=st.sampled_from(WHITEN_OPTIONS),
    seed=st.integers(0, 999),
)
def test_any_input(shape, mean, dtype, mask_dtype, how, options, seed):
    """Any shape, stride, dtype and mask, with NaN under the mask."""
    generator = torch.Generator().manual_seed(seed)
    if dtype not in (torch.float32, torch.float64):
        mean = 0.0  # far from zero half precision leaves nothing of a standard deviation of 1
    x = (mean + torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    mask = cases.mask(shape, mask_dtype, generator)
    expected = reference.masked_whiten(x, mask, **options)
    if mask is not None:
        x = x.masked_fill(mask == 0, math.nan)
    if x.dim() > 0:
        x = cases.restride(x, how)
    got = fused_critic.masked_whiten(x, mask, **options)
    assert got.dtype == dtype
    cases.assert_close(got, expected, cases.stored(whiten_tolerance(dtype), dtype))
    assert mask is None or not got[mask == 0].any()


@pytest.mark.parametrize("mask_dtype", [None, torch.bool])
def test_rows_do_not_depend_on_the_threads(threads, mask_dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 2000, generator=generator)
    mask = cases.mask(x.shape, mask_dtype, generator)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(fused_critic.masked_whiten(x, mask))
    for other in results[1:]:
        cases.assert_same_bits(other, results[0])


def test_bad_input():
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"masked_whiten: mask: expected shape \[3, 4\].*got \[3, 1\]"):
        fused_critic.masked_whiten(x, torch.ones(3, 1))
    with pytest.raises(TypeError, match="masked_whiten: x: expected a floating dtype, got torch.int64"):
        fused_critic.masked_whiten(torch.ones(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="masked_whiten: group: expected a torch.distributed process group .*, got str"):
        fused_critic.masked_whiten(x, group="all")
