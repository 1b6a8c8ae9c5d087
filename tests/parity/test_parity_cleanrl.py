"""fused_critic.integrations.cleanrl beside CleanRL's own lines: the statements of the scripts in its wheel, executed.

The wheel is PyPI's last one; the lines of the repository's ppo.py since are the same.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import peers
import pytest
import torch
from fused_critic.integrations import cleanrl as fused_cleanrl
from hypothesis import given
from rollouts import ENDS, GAMMA, LAM, SHAPES, inside_the_range, loss_and_gradient, minibatch, rollout, rollouts

CLIP = 0.3
SCRIPTS = [
    f"cleanrl/{name}.py"
    for name in (
        "ppo", "ppo_atari", "ppo_atari_envpool", "ppo_atari_lstm", "ppo_atari_multigpu", "ppo_continuous_action", "ppo_pettingzoo_ma_atari",
        "ppo_procgen", "rpo_continuous_action",
    )
]  # fmt: skip


def their_gae(d, gamma=GAMMA, lam=LAM, script=SCRIPTS[0]):
    args = SimpleNamespace(num_steps=len(d.rewards), gamma=gamma, gae_lambda=lam)
    dtype = d.rewards.dtype
    scope = dict(
        args=args, rewards=d.rewards, values=d.values, dones=d.dones.to(dtype), next_done=d.last_dones.to(dtype),
        next_value=d.last_values.reshape(1, -1), device="cpu", torch=torch,
    )  # fmt: skip
    exec(peers.statements("cleanrl", script, "advantages = torch.zeros_like", "returns = advantages"), scope)
    return scope["advantages"], scope["returns"]


def our_gae(d, gamma=GAMMA, lam=LAM):
    return fused_cleanrl.compute_gae(d.rewards, d.values, d.dones, d.last_values.reshape(1, -1), d.last_dones, gamma, lam)


def their_loss(newvalue, b_values, b_returns, clip_vloss=True, clip_coef=CLIP, script=SCRIPTS[0]):
    scope = dict(
        args=SimpleNamespace(clip_vloss=clip_vloss, clip_coef=clip_coef), newvalue=newvalue, b_values=b_values, b_returns=b_returns,
        mb_inds=slice(None), torch=torch,
    )  # fmt: skip
    exec(peers.statements("cleanrl", script, "if args.clip_vloss"), scope)
    return scope["v_loss"]


def their_explained_variance(b_values, b_returns):
    scope = dict(b_values=b_values, b_returns=b_returns, np=np)
    exec(peers.statements("cleanrl", SCRIPTS[0], "y_pred, y_true", "explained_var ="), scope)
    return scope["explained_var"]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["float32", "float64"])
@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gae(parity, shape, ends, dtype, tolerance):
    d = rollout(*shape, ENDS[ends](*shape), dtype)
    for name, ours, theirs in zip(("advantages", "returns"), our_gae(d), their_gae(d)):
        assert ours.dtype == theirs.dtype == dtype
        parity.same("cleanrl", "compute_gae", f"{name}, {str(dtype)[6:]}", ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_these_lines(script):
    d = rollout(24, 6, ENDS["several per column"](24, 6))
    torch.testing.assert_close(our_gae(d), their_gae(d, script=script), rtol=1e-5, atol=1e-5)
    values, *constants = minibatch(40)
    torch.testing.assert_close(
        fused_cleanrl.value_loss(values, *constants, CLIP), their_loss(values, *constants, script=script), rtol=1e-6, atol=0
    )


@given(rollouts())
def test_gae_of_any_rollout(d):
    torch.testing.assert_close(our_gae(d, d.gamma, d.lam), their_gae(d, d.gamma, d.lam), **d.tolerance)


def test_a_flag_gates_the_step_before_it():
    """done[t + 1], not done[t]: the first flag is of no consequence, and the one after the last step is."""
    d = rollout(6, 2, ENDS["no end"](6, 2))
    expected = our_gae(d)
    d.dones[0] ^= True
    torch.testing.assert_close(our_gae(d), expected, rtol=0, atol=0)
    d.last_dones = torch.tensor([True, False])
    advantages, _ = our_gae(d)
    torch.testing.assert_close(advantages[-1, 0], d.rewards[-1, 0] - d.values[-1, 0])
    torch.testing.assert_close(advantages[:, 1], expected[0][:, 1], rtol=0, atol=0)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["float32", "float64"])
@pytest.mark.parametrize("clip_vloss", [True, False], ids=["clipped", "unclipped"])
@pytest.mark.parametrize("size", [1, 7, 512])
def test_value_loss(parity, size, clip_vloss, dtype, tolerance):
    values, *constants = minibatch(size, dtype=dtype)
    ours = loss_and_gradient(fused_cleanrl.value_loss(values, *constants, CLIP, clip_vloss), values)
    theirs = loss_and_gradient(their_loss(values, *constants, clip_vloss), values)
    for name, a, b in zip(("loss", "gradient"), ours, theirs):
        assert a.dtype == b.dtype == dtype
        parity.same("cleanrl", "value_loss", f"{name}, {str(dtype)[6:]}", a, b, rtol=10 * tolerance, atol=tolerance / size)


@pytest.mark.parametrize("size", [2, 7, 512])
def test_explained_variance(parity, size):
    values, _, returns = minibatch(size)
    values = values.detach()
    ours, theirs = fused_cleanrl.explained_variance(values, returns), their_explained_variance(values, returns)
    parity.same("cleanrl", "explained_variance", "value", ours, theirs, rtol=1e-5, atol=1e-5)
    constant = torch.full((size,), 0.5)
    assert fused_cleanrl.explained_variance(values, constant).isnan() and np.isnan(their_explained_variance(values, constant))


# --- the differences on purpose: CleanRL's side first, then ours ------------------------------------------------------------------


def test_difference_values_inside_the_range(parity):
    values, old = inside_the_range(512, clip=CLIP)
    returns = values.detach().clone()
    assert 0 < their_loss(values, old, returns) < 1e-12
    assert fused_cleanrl.value_loss(values, old, returns, CLIP) == 0
    parity.differs("cleanrl", "value_loss", "values inside the clip range", theirs="moved by a last bit", ours="the value itself")


def test_difference_gradient_at_ties(parity):
    """Clip range 0.5 around 0.5: the return half way between the value and the clipped one."""
    values, old, returns = torch.tensor([1.5], requires_grad=True), torch.tensor([0.5]), torch.tensor([1.25])
    theirs = loss_and_gradient(their_loss(values, old, returns, clip_coef=0.5), values)
    ours = loss_and_gradient(fused_cleanrl.value_loss(values, old, returns, 0.5), values)
    assert ours[0] == theirs[0] and theirs[1] == 0.5 * 0.25 and ours[1] == 0.25
    parity.differs("cleanrl", "value_loss", "tie of the two losses", theirs="half the gradient", ours="the whole gradient")


def test_difference_gradient_on_a_bound(parity):
    """Clip range 0.5 around 0.5: the value on the bound. Whether torch.clamp passes the gradient there depends on torch's version."""
    values, old, returns = torch.tensor([1.0], requires_grad=True), torch.tensor([0.5]), torch.tensor([3.0])
    theirs = loss_and_gradient(their_loss(values, old, returns, clip_coef=0.5), values)
    ours = loss_and_gradient(fused_cleanrl.value_loss(values, old, returns, 0.5), values)
    assert ours[0] == theirs[0] and -2 <= theirs[1] <= -1 and ours[1] == -2
    parity.differs("cleanrl", "value_loss", "bounds of the range", theirs="half the gradient or all, by torch's version", ours="all")


def test_difference_returns_that_do_not_vary(parity):
    """0.1 seven times: their float32 mean is another number, so that their variance is not quite 0."""
    values, constant = minibatch(7)[0].detach(), torch.full((7,), 0.1)
    assert their_explained_variance(values, constant) < -1e10
    assert fused_cleanrl.explained_variance(values, constant).isnan()
    parity.differs("cleanrl", "explained_variance", "equal returns", theirs="NaN, or a huge number by rounding", ours="NaN")


def test_difference_empty_minibatch(parity):
    values, *constants = minibatch(0)
    assert their_loss(values, *constants).isnan()
    loss, gradient = loss_and_gradient(fused_cleanrl.value_loss(values, *constants, CLIP), values)
    assert loss == 0 and gradient.shape == (0,)
    parity.differs("cleanrl", "value_loss", "empty mini-batch", theirs="loss NaN", ours="loss 0")


def test_difference_constants_and_broadcasting(parity):
    values, old, returns = minibatch(5)
    assert torch.autograd.grad(their_loss(values, old, returns.requires_grad_()), returns)[0].any()
    with pytest.raises(ValueError, match="requires_grad"):
        fused_cleanrl.value_loss(values, old, returns, CLIP)
    column = returns.detach()[:, None]
    assert their_loss(values, old, column).isfinite()
    with pytest.raises(ValueError, match="one shape"):
        fused_cleanrl.value_loss(values, old, column, CLIP)
    parity.differs("cleanrl", "value_loss", "returns that require grad", theirs="gradient passed on", ours="error")
    parity.differs("cleanrl", "value_loss", "[B] beside [B, 1]", theirs="broadcast to [B, B]", ours="error")


def test_difference_half_precision(parity):
    """In bf16, 100 + 0.2 is 100: the range has no width."""
    values, old, returns = (torch.full((3,), x, dtype=torch.bfloat16) for x in (100.5, 100.0, 104.0))
    theirs, ours = their_loss(values, old, returns, clip_coef=0.2), fused_cleanrl.value_loss(values, old, returns, 0.2)
    assert (theirs.dtype, ours.dtype) == (torch.bfloat16, torch.float32)
    assert theirs == 0.5 * 4.0**2 and ours.item() == pytest.approx(0.5 * 3.8**2, rel=1e-5)
    parity.differs("cleanrl", "value_loss", "bf16 throughout", theirs="computed in bf16", ours="computed in float32")


def test_difference_discount_above_one(parity):
    d = rollout(4, 2, ENDS["no end"](4, 2))
    assert their_gae(d, gamma=1.01)[0].isfinite().all()
    with pytest.raises(ValueError, match="gamma"):
        our_gae(d, gamma=1.01)
    parity.differs("cleanrl", "compute_gae", "gamma or lambda outside of [0, 1]", theirs="accepted", ours="error")


# --- the page ---------------------------------------------------------------------------------------------------------------------


def test_the_page():
    (snippet,) = peers.snippets("cleanrl")
    d = rollout(16, 4, ENDS["several per column"](16, 4))
    values, *_ = minibatch(64)
    args = SimpleNamespace(gamma=GAMMA, gae_lambda=LAM, clip_coef=CLIP, clip_vloss=True)
    scope = dict(
        args=args, rewards=d.rewards, values=d.values, dones=d.dones.float(), next_done=d.last_dones.float(),
        next_value=d.last_values.reshape(1, -1), newvalue=values, mb_inds=np.arange(64),
    )  # fmt: skip
    exec(snippet, scope)
    advantages, returns = their_gae(d)
    torch.testing.assert_close(scope["advantages"], advantages, rtol=1e-5, atol=1e-5)
    b_values, b_returns = d.values.reshape(-1), returns.reshape(-1)
    torch.testing.assert_close(scope["v_loss"], their_loss(values, b_values, b_returns), rtol=1e-5, atol=1e-6)
    assert scope["explained_var"] == pytest.approx(their_explained_variance(b_values, b_returns), rel=1e-4)
