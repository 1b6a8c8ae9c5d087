"""The critic's lines of TRL's PPO, executed from the wheel's source (trl_wheel.py), and our functions on the same data.

The lines run from the two padding masks on: rewards, their whitening, GAE, the whitening of advantages, and in the inner loop the value
loss. Every difference on purpose is a test of its own.
"""

from __future__ import annotations

from types import SimpleNamespace

import peers
import pytest
import torch
import trl_wheel
import wheel_source
from fused_critic.integrations import trl as fused_trl

SHAPES = [(6, 40), (1, 9), (5, 1), (64, 128)]
GAMMA, LAM, CLIP = 0.99, 0.95, 0.2
LOSS, GAE = "PPOTrainer.train: value loss", "PPOTrainer.train: advantages and returns"
WHITEN = "PPOTrainer.train: whiten rewards"


@pytest.fixture(scope="module")
def trl():
    return wheel_source.or_skip(trl_wheel.Critic)


def rollout(shape, dtype=torch.float32, seed=0) -> SimpleNamespace:
    """What the trainer has before its padding masks. Sequence lengths are the last token's index; one row is empty, one without padding."""
    batch, length = shape
    generator = torch.Generator().manual_seed(seed)
    logprobs, noise, values = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    ends = torch.randint(0, length, (batch,), generator=generator)
    if batch > 2:
        ends[0], ends[1] = -1, length - 1
    return SimpleNamespace(
        responses=torch.zeros(shape, dtype=torch.long), logprobs=-logprobs.abs(), ref_logprobs=-logprobs.abs() + 0.1 * noise,
        sequence_lengths=ends, values=values, scores=torch.randn(batch, generator=generator).to(dtype),
    )  # fmt: skip


def theirs_before(trl, data, **changes):
    args = {"gamma": GAMMA, "lam": LAM, "kl_estimator": "k1", "kl_coef": 0.05, "whiten_rewards": False, **changes}
    return trl.from_logprobs(**vars(data), **args)


def minibatch(trl, shape, dtype=torch.float32, seed=0) -> SimpleNamespace:
    """Old values, returns and mask as the trainer makes them, and new values: beyond some of the clip ranges."""
    left = theirs_before(trl, rollout(shape, seed=seed))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1))
    vpred = (left.values + 0.4 * noise).to(dtype)
    return SimpleNamespace(vpred=vpred, mb_values=left.values.to(dtype), mb_return=left.returns.to(dtype), mask=left.padding_mask_p1)


def their_loss(trl, vpred, mb_values, mb_return, padding_mask_p1, cliprange_value=CLIP):
    """Loss, clip fraction, gradient. The value model's output has a context of one token, and one value behind the response."""
    vpred = vpred.detach().requires_grad_()
    loss, clipfrac = trl.value_loss(
        torch.nn.functional.pad(vpred, (0, 1)).unsqueeze(-1), 1, mb_values, mb_return, padding_mask_p1, cliprange_value
    )
    return loss, clipfrac, torch.autograd.grad(loss, vpred)[0]


def our_loss(vpred, mb_values, mb_return, padding_mask_p1, cliprange_value=CLIP):
    vpred = vpred.detach().requires_grad_()
    loss, clipfrac = fused_trl.value_loss(vpred, mb_values, mb_return, padding_mask_p1, cliprange_value)
    return loss, clipfrac, torch.autograd.grad(loss, vpred)[0]


# --- the same -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype, rtol, atol", [(torch.float32, 1e-5, 2e-6), (torch.float64, 1e-12, 1e-12)], ids=["float32", "float64"])
def test_value_loss(trl, parity, shape, dtype, rtol, atol):
    batch = minibatch(trl, shape, dtype)
    tensors = (batch.vpred, batch.mb_values, batch.mb_return, batch.mask)
    theirs, ours = their_loss(trl, *tensors), our_loss(*tensors)
    assert ours[0].dtype == theirs[0].dtype and ours[1].dtype == theirs[1].dtype == torch.float32 and ours[2].dtype == dtype
    if shape == (64, 128):
        assert 0.05 < theirs[1] < 0.95
    suffix = ", float64" if dtype == torch.float64 else ""
    parity.same("trl", LOSS, "loss" + suffix, ours[0], theirs[0], rtol=rtol, atol=atol)
    parity.same("trl", LOSS, "clip fraction", ours[1], theirs[1], rtol=1e-6, atol=1e-7)
    parity.same("trl", LOSS, "gradient" + suffix, ours[2], theirs[2], rtol=rtol, atol=atol)


@pytest.mark.parametrize("value_dtype", [torch.bfloat16, torch.float16])
def test_value_loss_of_a_half_precision_model(trl, parity, value_dtype):
    """New values in half precision beside old values and returns in float32: both compute in float32, and round the gradient once."""
    batch = minibatch(trl, (6, 40))
    tensors = (batch.vpred.to(value_dtype), batch.mb_values, batch.mb_return, batch.mask)
    theirs, ours = their_loss(trl, *tensors), our_loss(*tensors)
    assert ours[0].dtype == theirs[0].dtype == torch.float32 and ours[2].dtype == theirs[2].dtype == value_dtype
    parity.same("trl", LOSS, f"loss, {value_dtype} values", ours[0], theirs[0], rtol=1e-5, atol=0)
    # One unit in the last place of the gradient's dtype: theirs is rounded once on the way as well.
    parity.same("trl", LOSS, f"gradient, {value_dtype} values", ours[2], theirs[2], rtol=torch.finfo(value_dtype).eps, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gamma, lam", [(GAMMA, LAM), (1.0, 1.0), (0.0, 0.5)])
def test_advantages_and_returns(trl, parity, shape, dtype, gamma, lam):
    left = theirs_before(trl, rollout(shape, dtype), gamma=gamma, lam=lam)
    ours = fused_trl.advantages_and_returns(left.rewards, left.values, left.padding_mask, gamma, lam)
    assert all(x.dtype == dtype for x in (*ours, left.advantages, left.returns))
    if dtype == torch.float32:
        precisions, suffix = ((1e-4, 1e-5), (1e-4, 1e-5)), ""
    else:  # the factor n / (n - 1) of TRL's variance is a quotient of integers, which torch rounds to float32
        precisions, suffix = ((torch.finfo(torch.float32).eps, 1e-9), (1e-11, 1e-12)), ", float64"
    for what, ours_is, theirs_is, (rtol, atol) in zip(("advantages", "returns"), ours, (left.advantages, left.returns), precisions):
        parity.same("trl", GAE, what + suffix, ours_is, theirs_is, rtol=rtol, atol=atol)  # at padding too
    assert not ours[0][left.padding_mask].any()


@pytest.mark.parametrize("kl_estimator", ["k1", "k3"])
def test_whitened_rewards(trl, parity, kl_estimator):
    """With --whiten_rewards: our whitening, then our GAE on what it gave."""
    data = rollout((6, 40))
    plain = theirs_before(trl, data, kl_estimator=kl_estimator)
    whitened = theirs_before(trl, data, kl_estimator=kl_estimator, whiten_rewards=True)
    rewards = fused_trl.whiten_rewards(plain.rewards, plain.padding_mask_p1)
    parity.same("trl", WHITEN, "rewards", rewards, whitened.rewards, rtol=1e-4, atol=1e-5)
    advantages, returns = fused_trl.advantages_and_returns(rewards, plain.values, plain.padding_mask, GAMMA, LAM)
    parity.same("trl", WHITEN, "advantages after it", advantages, whitened.advantages, rtol=1e-4, atol=1e-5)
    parity.same("trl", WHITEN, "returns after it", returns, whitened.returns, rtol=1e-4, atol=1e-5)


# --- different on purpose -------------------------------------------------------------------------------------------------------------


def test_difference_only_padding(trl, parity):
    vpred, values, returns = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    everything = torch.ones(2, 4, dtype=torch.bool)
    theirs, ours = their_loss(trl, vpred, values, returns, everything), our_loss(vpred, values, returns, everything)
    assert theirs[0].isnan() and theirs[1].isnan()
    assert ours[0] == 0 and ours[1] == 0 and not ours[2].any()
    parity.differs("trl", LOSS, "only padding", theirs="NaN", ours="0, gradient 0")
    with pytest.raises(ValueError, match="sum of the mask is zero"):
        trl.advantages_and_returns(values, values, everything, GAMMA, LAM)
    advantages, _ = fused_trl.advantages_and_returns(values, values, everything, GAMMA, LAM)
    assert not advantages.any()
    with pytest.raises(ValueError, match="sum of the mask is zero"):
        trl.masked_whiten(values, ~everything, shift_mean=False)
    assert not fused_trl.whiten_rewards(values, everything).any()
    parity.differs("trl", GAE, "only padding", theirs="ValueError", ours="advantages 0")
    parity.differs("trl", WHITEN, "only padding", theirs="ValueError", ours="0")


def test_difference_whitening_of_one_token(trl, parity):
    """A batch of one response of one token, or of one that is no padding: the unbiased variance of one number is 0 / 0."""
    rewards, values = torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(0))
    padding_mask = torch.tensor([[False, True, True, True]])
    theirs, returns = trl.advantages_and_returns(rewards, values, padding_mask, GAMMA, LAM)
    ours = fused_trl.advantages_and_returns(rewards, values, padding_mask, GAMMA, LAM)
    assert theirs[0, 0].isnan() and not theirs[0, 1:].any()
    assert not ours[0].any()
    torch.testing.assert_close(ours[1], returns)
    assert trl.masked_whiten(rewards, ~padding_mask, shift_mean=False).isnan().all()
    assert not fused_trl.whiten_rewards(rewards, padding_mask).any()
    parity.differs("trl", GAE, "one token that is no padding", theirs="NaN", ours="advantages 0")
    parity.differs("trl", WHITEN, "one token that is no padding", theirs="NaN", ours="0")


@pytest.mark.parametrize("which", ["vpred", "mb_values", "mb_return"])
@pytest.mark.parametrize("leftover", [float("nan"), float("inf")])
def test_difference_nan_at_padding(trl, parity, which, leftover):
    batch = minibatch(trl, (6, 40))
    getattr(batch, which)[batch.mask] = leftover
    tensors = (batch.vpred, batch.mb_values, batch.mb_return, batch.mask)
    theirs, ours = their_loss(trl, *tensors), our_loss(*tensors)
    clean = our_loss(*(x.masked_fill(batch.mask, 0) for x in tensors[:3]), batch.mask)
    assert all(torch.equal(a, b) for a, b in zip(ours, clean)) and not ours[2][batch.mask].any()
    if which == "vpred":  # TRL replaces it
        torch.testing.assert_close(theirs[0], ours[0])
        torch.testing.assert_close(theirs[2], ours[2])
    else:
        assert theirs[0].isnan()
        case = f"NaN or inf at padding in {'old values' if which == 'mb_values' else 'returns'}"
        parity.differs("trl", LOSS, case, theirs="loss NaN", ours="never used")


def test_difference_nan_at_padding_whitening(trl, parity):
    left = theirs_before(trl, rollout((6, 40)))
    rewards = left.rewards.masked_fill(left.padding_mask_p1, float("nan"))
    assert trl.masked_whiten(rewards, ~left.padding_mask_p1, shift_mean=False).isnan().all()
    ours = fused_trl.whiten_rewards(rewards, left.padding_mask_p1)
    assert torch.equal(ours, fused_trl.whiten_rewards(left.rewards, left.padding_mask_p1))
    parity.differs("trl", WHITEN, "NaN at padding", theirs="NaN everywhere", ours="never used")


def test_nan_at_padding_reaches_gae_in_both(trl):
    """The recursion reads every position. TRL fills values and rewards at padding before it."""
    left = theirs_before(trl, rollout((6, 40)))
    values = left.values.masked_fill(left.padding_mask_p1, float("nan"))
    theirs = trl.advantages_and_returns(left.rewards, values, left.padding_mask, GAMMA, LAM)
    ours = fused_trl.advantages_and_returns(left.rewards, values, left.padding_mask, GAMMA, LAM)
    valid = ~left.padding_mask
    assert theirs[0][valid].isnan().all() and ours[0][valid].isnan().all()
    assert torch.equal(theirs[1].isnan(), ours[1].isnan())


def test_difference_integer_padding_mask(trl, parity):
    """bool is what the trainer has, and both take it; the complement of the integers 0 and 1 is -1 and -2, both of them true."""
    batch = minibatch(trl, (6, 40))
    tensors = (batch.vpred, batch.mb_values, batch.mb_return)
    expected = our_loss(*tensors, batch.mask)
    torch.testing.assert_close(their_loss(trl, *tensors, batch.mask)[0], expected[0])
    ours = our_loss(*tensors, batch.mask.int())
    assert all(torch.equal(a, b) for a, b in zip(ours, expected))
    theirs = trl.masked_mean(torch.ones(6, 40), ~batch.mask.int())
    weights = torch.where(batch.mask, -2.0, -1.0)
    assert theirs == 1 and (~batch.mask.int() == weights).all(), "padding weighs twice as much as tokens"
    parity.differs("trl", LOSS, "integer padding mask", theirs="`~` makes weights of -1 and -2 of it", ours="as bool")


def test_difference_half_precision_throughout(trl, parity):
    """In bfloat16 the bounds of the range around 100 are 100."""
    vpred, values, returns = (torch.full((1, 4), x, dtype=torch.bfloat16) for x in (100.5, 100.0, 104.0))
    padding_mask = torch.zeros(1, 4, dtype=torch.bool)
    theirs, ours = their_loss(trl, vpred, values, returns, padding_mask), our_loss(vpred, values, returns, padding_mask)
    assert theirs[0].dtype == torch.bfloat16 and theirs[0] == 0.5 * 4.0**2
    assert ours[0].dtype == torch.float32
    torch.testing.assert_close(ours[0], torch.tensor(0.5 * 3.8**2))
    parity.differs("trl", LOSS, "bf16 throughout", theirs="computed in bf16: the range collapses", ours="computed in float32")

    data = rollout((6, 40), torch.bfloat16)
    left = theirs_before(trl, data)
    ours = fused_trl.advantages_and_returns(left.rewards, left.values, left.padding_mask, GAMMA, LAM)
    exact = trl.advantages_and_returns(left.rewards.double(), left.values.double(), left.padding_mask, GAMMA, LAM)
    assert left.advantages.dtype == torch.bfloat16 and all(x.dtype == torch.float32 for x in ours)
    torch.testing.assert_close([x.double() for x in ours], list(exact), rtol=1e-4, atol=1e-5)
    parity.differs("trl", GAE, "bf16 throughout", theirs="computed and returned in bf16", ours="computed and returned in float32")


def test_difference_float64_throughout(trl, parity):
    """n / (n - 1) of the variance is float32 of integers, which a padding mask sums up to; of a float64 mask it is exact in TRL too."""
    left = theirs_before(trl, rollout((6, 40), torch.float64))
    rewards, valid = left.rewards, ~left.padding_mask_p1
    theirs, exact = (trl.masked_whiten(rewards, mask, shift_mean=False)[valid] for mask in (valid, valid.double()))
    ours = fused_trl.whiten_rewards(rewards, left.padding_mask_p1)[valid]
    assert theirs.dtype == ours.dtype == torch.float64
    assert (theirs - exact).abs().max() > 1e-10
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)
    parity.differs("trl", WHITEN, "float64 throughout", theirs="n / (n - 1) in float32", ours="in float64")

    valid = ~left.padding_mask
    exact = trl.masked_whiten(left.returns - left.values, valid.double())[valid]
    ours, _ = fused_trl.advantages_and_returns(rewards, left.values, left.padding_mask, GAMMA, LAM)
    assert left.advantages.dtype == ours.dtype == torch.float64
    assert (left.advantages[valid] - exact).abs().max() > 1e-10
    torch.testing.assert_close(ours[valid], exact, rtol=1e-12, atol=1e-12)
    parity.differs("trl", GAE, "float64 throughout", theirs="n / (n - 1) in float32", ours="in float64")


@pytest.mark.parametrize("vpred, value, ret", [(1.5, 0.5, 1.25), (0.5, 0.0, 3.0)], ids=["equal losses", "on the bound"])
def test_difference_gradient_at_ties(trl, parity, vpred, value, ret):
    """Clip range 0.5: the return half way between vpred and its clipped value, and vpred on the bound of the range."""
    tensors = (torch.tensor([[vpred]]), torch.tensor([[value]]), torch.tensor([[ret]]), torch.tensor([[False]]), 0.5)
    theirs, ours = their_loss(trl, *tensors), our_loss(*tensors)
    assert ours[0] == theirs[0] and ours[2] == vpred - ret
    if vpred == 1.5:
        assert 0 < theirs[2] / ours[2] < 1
        parity.differs("trl", LOSS, "ties of the two losses", theirs="a part of the gradient", ours="the whole gradient")
    else:  # what torch.clamp passes on at its bounds is another thing in another version of torch
        assert 0 < theirs[2] / ours[2] <= 1
        parity.differs("trl", LOSS, "bounds of the range", theirs="torch.clamp's gradient, by torch's version", ours="the whole gradient")


def test_difference_returns_and_old_values_are_constants(trl, parity):
    batch = minibatch(trl, (6, 40))
    for which in ("mb_values", "mb_return"):
        tensors = {"mb_values": batch.mb_values, "mb_return": batch.mb_return}
        leaf = tensors[which] = tensors[which].clone().requires_grad_()
        loss, _, _ = their_loss(trl, batch.vpred, *tensors.values(), batch.mask)
        assert loss.requires_grad
        with pytest.raises(ValueError, match="requires_grad"):
            our_loss(batch.vpred, *tensors.values(), batch.mask)
        assert leaf.grad is None
    parity.differs("trl", LOSS, "returns or old values that require grad", theirs="gradient passed on", ours="error")


def test_difference_no_broadcasting_and_no_negative_range(trl, parity):
    batch = minibatch(trl, (6, 40))
    for mb_return, clip in ((batch.mb_return[:, :1], CLIP), (batch.mb_return, -CLIP)):
        tensors = (batch.vpred, batch.mb_values, mb_return, batch.mask, clip)
        assert their_loss(trl, *tensors)[0].isfinite()
        with pytest.raises(ValueError, match="value_loss"):
            our_loss(*tensors)
    parity.differs("trl", LOSS, "broadcasting, negative cliprange", theirs="accepted", ours="error")


# --- the page -------------------------------------------------------------------------------------------------------------------------


def test_the_page(trl):
    """Its python block is the trainer's lines with our calls in place of TRL's, on the variables that the trainer has."""
    (snippet,) = peers.snippets("trl")
    data = rollout((6, 40))
    left = theirs_before(trl, data, whiten_rewards=True)
    args = SimpleNamespace(gamma=GAMMA, lam=LAM, whiten_rewards=True, cliprange_value=CLIP)
    rows = torch.tensor([1, 4, 2])
    vpred_temp = torch.randn(3, 43, 1, generator=torch.Generator().manual_seed(0))
    scope = {
        "args": args, "rewards": theirs_before(trl, data).rewards, "values": left.values, "padding_mask": left.padding_mask,
        "padding_mask_p1": left.padding_mask_p1, "vpred_temp": vpred_temp, "context_length": 3, "micro_batch_inds": rows,
    }  # fmt: skip
    exec(snippet, scope)
    torch.testing.assert_close([scope["advantages"], scope["returns"]], [left.advantages, left.returns], rtol=1e-4, atol=1e-5)
    theirs = trl.value_loss(vpred_temp, 3, left.values[rows], left.returns[rows], left.padding_mask_p1[rows], CLIP)
    torch.testing.assert_close([scope["vf_loss"], scope["vf_clipfrac"]], list(theirs), rtol=1e-4, atol=1e-5)
