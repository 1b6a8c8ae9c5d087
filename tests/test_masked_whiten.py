"""masked_whiten against a float64 reference, on every device."""

import math

import cases
import fused_critic
import pytest
import torch


def expected(x, mask, shift_mean=True, unbiased=True, eps=1e-8):
    x = x.detach().cpu().double()
    valid = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.cpu() != 0
    chosen = x[valid]
    if chosen.numel() < 2:
        return torch.zeros_like(x)
    white = (x - chosen.mean()) * torch.rsqrt(chosen.var(correction=int(unbiased)) + eps) + (0 if shift_mean else chosen.mean())
    return torch.where(valid, white, 0)


@pytest.mark.parametrize("options", [{}, {"shift_mean": False}, {"unbiased": False}, {"eps": 0.1}], ids=str)
@pytest.mark.parametrize("mask_dtype", cases.MASKS, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_matches_reference(device, dtype, mask_dtype, options):
    generator = torch.Generator().manual_seed(0)
    x = (3 + 2 * torch.randn(7, 45, generator=generator)).to(device, dtype)
    mask = cases.mask((7, 45), mask_dtype, generator)
    mask = mask if mask is None else mask.to(device)
    got = fused_critic.masked_whiten(x, mask, **options)
    assert got.dtype == dtype
    cases.assert_close(got, expected(x, mask, **options), max(1e-5, cases.ROUNDING[dtype]))


def test_far_from_zero(device):
    x = (1e4 + torch.randn(5000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).float()
    cases.assert_close(fused_critic.masked_whiten(x.to(device)), expected(x, None), 1e-5)


@pytest.mark.parametrize("valid", [0, 1])
@pytest.mark.parametrize("shift_mean", [True, False])
def test_fewer_than_two_give_zeros(device, valid, shift_mean):
    mask = torch.zeros(6, device=device)
    mask[:valid] = 1
    assert fused_critic.masked_whiten(torch.full((6,), 7.0, device=device), mask, shift_mean=shift_mean).tolist() == [0] * 6


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


def test_bad_input():
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"masked_whiten: mask: expected shape \[3, 4\].*got \[3, 1\]"):
        fused_critic.masked_whiten(x, torch.ones(3, 1))
    with pytest.raises(TypeError, match="masked_whiten: x: expected a floating dtype, got torch.int64"):
        fused_critic.masked_whiten(torch.ones(3, dtype=torch.int64))
    with pytest.raises(NotImplementedError, match="masked_whiten: group"):
        fused_critic.masked_whiten(x, group=object())
