"""AReaL's critic loss, and the GAE inside of its PPOActor, executed from its wheel, beside fused_critic.integrations.areal."""

from __future__ import annotations

import functools
import sys
import types
from types import SimpleNamespace

import peers
import pytest
import torch
from fused_critic.integrations import areal as fused_areal

CLIP = 0.3
LOSS, GAE = "ppo_critic_loss_fn", "PPOActor._compute_advantages"


@pytest.fixture(scope="module")
def areal():
    """ppo_critic_loss_fn; compute_advantages(self, data), PPOActor's method; KLEstimator."""
    losses = peers.functions(
        "areal",
        "areal/utils/functional/functional.py",
        ["_huber_loss", "_mse_loss", "ppo_critic_loss_fn"],
        torch=torch,
        functools=functools,
    )
    actor = peers.functions("areal", "areal/trainer/ppo/actor.py", ["PPOActor._compute_advantages"], torch=torch)
    estimator = peers.functions("areal", "areal/utils/data.py", ["KLEstimator"], torch=torch)
    return SimpleNamespace(ppo_critic_loss_fn=losses.ppo_critic_loss_fn, compute_advantages=actor._compute_advantages, **vars(estimator))


def make(shape=(6, 40), seed=0):
    """Values (a leaf), old values, targets, mask: the first row empty, the second full where there are several."""
    g = torch.Generator().manual_seed(seed)
    values, targets, noise = (torch.randn(shape, generator=g) for _ in range(3))
    mask = torch.rand(shape, generator=g) < 0.7
    if len(shape) == 2 and shape[0] > 1:
        mask[0], mask[1] = False, True
    elif not mask.any():
        mask[...] = True
    return values.requires_grad_(), (values + 0.5 * noise).detach(), targets, mask


def loss_and_gradient(function, values, *arguments, **keywords):
    loss, stat = function(values, *arguments, **keywords)
    return loss.detach(), torch.autograd.grad(loss, values)[0], stat


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("loss_fn_type, scale", [("mse", 1), ("huber", 1), ("huber", 20)])
@pytest.mark.parametrize("shape", [(6, 40), (1, 1), (3, 257), (500,)], ids=str)
def test_loss(parity, areal, shape, loss_fn_type, scale, masked):
    """scale 20: errors on both sides of huber's delta, which is 10."""
    values, old_values, targets, mask = make(shape)
    arguments = (values, old_values, scale * targets, CLIP, mask if masked else None, loss_fn_type)
    ours, theirs = (loss_and_gradient(x.ppo_critic_loss_fn, *arguments) for x in (fused_areal, areal))
    where = mask if masked else torch.ones_like(mask)
    # The loss is float32's sum of up to 771 tokens; its value and what is divided by the count agree to a few roundings.
    parity.same("areal", LOSS, "loss", ours[0], theirs[0], rtol=1e-6, atol=1e-6)
    parity.same("areal", LOSS, "gradient", ours[1], theirs[1], rtol=1e-6, atol=1e-7)
    assert list(ours[2]) == list(theirs[2]) and ours[2]["clip_mask"].dtype == torch.bool
    assert not any(x.requires_grad for x in ours[2].values())
    # Inside the range nothing is clipped, but AReaL's rounding makes it appear so here and there (the difference below).
    outside = (values - old_values).abs() > CLIP
    parity.same("areal", LOSS, "stat: clip_mask", ours[2]["clip_mask"], theirs[2]["clip_mask"], rtol=0, atol=0, where=outside)
    assert not ours[2]["clip_mask"][~outside].any()
    parity.same("areal", LOSS, "stat: loss", ours[2]["loss"], theirs[2]["loss"], rtol=2e-6, atol=1e-6, where=where)


def test_loss_of_inference_tensors(parity, areal):
    values, *_ = make()
    with torch.inference_mode():
        _, old_values, targets, mask = make()
    arguments = (values, old_values, targets, CLIP, mask.clone())
    theirs = loss_and_gradient(areal.ppo_critic_loss_fn, *arguments)
    ours = loss_and_gradient(fused_areal.ppo_critic_loss_fn, *arguments)
    parity.same("areal", LOSS, "gradient", ours[1], theirs[1], rtol=1e-6, atol=1e-7)


def test_loss_fn_type(areal):
    for function in (areal.ppo_critic_loss_fn, fused_areal.ppo_critic_loss_fn):
        with pytest.raises(NotImplementedError, match="smooth_l1"):
            function(*make()[:3], CLIP, loss_fn_type="smooth_l1")


def rollout(areal, shape=(6, 24), kl_ctl=0.1, discount=0.97, gae_lambda=0.9, seed=0, values=True):
    """An actor and a batch; one row fills the whole width (no end of sequence), prompts and tool output are masked."""
    g = torch.Generator().manual_seed(seed)
    batch, width = shape
    lengths = torch.randint(max(width // 2, 2), width + 1, (batch, 1), generator=g)
    lengths[-1] = width
    attention_mask = (torch.arange(width) < lengths).long()
    prompts = torch.randint(1, max(width // 4, 2), (batch, 1), generator=g)
    loss_mask = attention_mask * (torch.arange(width) >= prompts) * (torch.rand(shape, generator=g) < 0.8)
    data = dict(
        input_ids=torch.ones(shape, dtype=torch.int64), attention_mask=attention_mask, loss_mask=loss_mask.long(),
        rewards=torch.randn(batch, generator=g), logprobs=torch.randn(shape, generator=g), ref_logp=torch.randn(shape, generator=g),
    )  # fmt: skip
    if values:
        data["values"] = torch.randn(shape, generator=g)
    config = SimpleNamespace(overlong_reward_penalty=False, use_decoupled_loss=False, recompute_logprob=False)
    actor = SimpleNamespace(
        config=config, reward_bias=0.1, reward_scaling=2.0, reward_clip=5.0, reward_norm=None, kl_ctl=kl_ctl, kl_estimator=areal.KLEstimator("k1"),
        mask_no_eos_with_zero=False, discount=discount, gae_lambda=gae_lambda, adv_norm=None,
    )  # fmt: skip
    return actor, data


def both(areal, actor, data):
    """Advantages and returns of both, and AReaL's mask."""
    theirs = areal.compute_advantages(actor, dict(data))
    values = data.get("values", torch.zeros(data["input_ids"].shape))
    no_eos = data["attention_mask"].sum(-1) == data["attention_mask"].shape[1]
    ours = fused_areal.compute_gae(theirs["tot_rewards"], values, theirs["loss_mask"], no_eos, actor.discount, actor.gae_lambda)
    return ours, (theirs["advantages"], theirs["returns"]), theirs["loss_mask"].bool()


@pytest.mark.parametrize("discount, gae_lambda", [(0.97, 0.9), (1.0, 1.0), (1.0, 0.95), (0.9, 0.0)])
@pytest.mark.parametrize("shape", [(6, 24), (1, 2), (2, 3), (3, 257)], ids=str)
@pytest.mark.parametrize("values", [True, False], ids=["values", "no values"])
def test_gae(parity, areal, values, shape, discount, gae_lambda):
    actor, data = rollout(areal, shape, discount=discount, gae_lambda=gae_lambda, values=values)
    ours, theirs, mask = both(areal, actor, data)
    assert mask.any() or shape[0] == 1
    for name, x, y in zip(("advantages", "returns"), ours, theirs):
        # The recursion's rounding grows with the length of a row.
        parity.same("areal", GAE, name, x, y, rtol=1e-5, atol=1e-5, where=mask)
        assert x.dtype == y.dtype == torch.float32 and not x.requires_grad
        assert not x[~mask].any()


def test_gae_where_the_first_token_is_trained_on(parity, areal):
    """The rolled mask is valid at the last position then, which has advantage 0 and its value as return."""
    actor, data = rollout(areal)
    data["loss_mask"][:, 0] = 1
    ours, theirs, mask = both(areal, actor, data)
    assert mask[:, -1].all()
    for name, x, y in zip(("advantages", "returns"), ours, theirs):
        parity.same("areal", GAE, name, x, y, rtol=1e-5, atol=1e-5, where=mask)


# --- the differences on purpose -----------------------------------------------------------------------------------------------------


def test_difference_garbage_under_the_mask(parity, areal):
    values, old_values, targets, mask = make()
    clean = loss_and_gradient(fused_areal.ppo_critic_loss_fn, values, old_values, targets, CLIP, mask)
    dirty = [torch.where(mask, x.detach(), float("nan")) for x in (values, old_values, targets)]
    dirty[0].requires_grad_()
    theirs = loss_and_gradient(areal.ppo_critic_loss_fn, *dirty, CLIP, mask)
    assert theirs[0].isfinite() and theirs[1][~mask].isnan().all()
    ours = loss_and_gradient(fused_areal.ppo_critic_loss_fn, *dirty, CLIP, mask)
    torch.testing.assert_close(ours[:2], clean[:2], rtol=0, atol=0)
    parity.differs("areal", LOSS, "NaN at masked tokens", theirs="gradient NaN there", ours="never used; gradient 0")

    actor, data = rollout(areal)
    clean, _, mask = both(areal, actor, data)
    behind = torch.nn.functional.pad(~mask[:, :-1], (0, 1))  # but the last position, whose value bootstraps
    data["values"] = torch.where(behind, float("nan"), data["values"])
    ours, theirs, _ = both(areal, actor, data)
    assert theirs[0][mask].isnan().any()
    torch.testing.assert_close(ours, clean, rtol=0, atol=0)
    parity.differs("areal", GAE, "NaN at masked tokens", theirs="NaN before them in the row", ours="never used")


def test_difference_nothing_valid(parity, areal):
    values, old_values, targets, mask = make()
    assert loss_and_gradient(areal.ppo_critic_loss_fn, values, old_values, targets, CLIP, mask & False)[0].isnan()
    loss, gradient, stat = loss_and_gradient(fused_areal.ppo_critic_loss_fn, values, old_values, targets, CLIP, mask & False)
    assert loss == 0 and not gradient.any() and not stat["clip_mask"].any()
    parity.differs("areal", LOSS, "nothing valid", theirs="loss NaN", ours="loss 0, gradient 0")


def test_difference_rounding_of_the_clip(parity, areal):
    """Inside the range old + (value - old) is the value, but for rounding: AReaL counts the token as clipped where that is further off."""
    old, value = torch.tensor([1.0]), torch.tensor([0.10000000149011612])
    assert old + (value - old) != value
    arguments = (value.clone().requires_grad_(), old, value - 1e-4, 2.0)
    theirs, ours = (loss_and_gradient(x.ppo_critic_loss_fn, *arguments) for x in (areal, fused_areal))
    assert theirs[0] > ours[0] and theirs[2]["clip_mask"].all() and not ours[2]["clip_mask"].any()
    torch.testing.assert_close(theirs[0], ours[0], rtol=1e-3, atol=0)
    parity.differs("areal", LOSS, "rounding of the clip", theirs="counts values inside the range as clipped", ours="exact")


def test_difference_masked_tokens(parity, areal):
    values, old_values, targets, mask = make()
    arguments = (values, old_values, targets, CLIP, mask)
    assert areal.ppo_critic_loss_fn(*arguments)[1]["loss"][~mask].all()
    assert not fused_areal.ppo_critic_loss_fn(*arguments)[1]["loss"][~mask].any()
    parity.differs("areal", LOSS, "stat: loss at masked tokens", theirs="as computed", ours="0")
    ours, theirs, mask = both(areal, *rollout(areal))
    assert theirs[0][~mask].any() and not ours[0][~mask].any() and not ours[1][~mask].any()
    parity.differs("areal", GAE, "masked tokens", theirs="what the recursion carries", ours="0")


def test_difference_gradient_at_ties(parity, areal):
    """The target half way between a value and its clipped one."""
    arguments = (torch.tensor([1.5], requires_grad=True), torch.tensor([0.5]), torch.tensor([1.25]), 0.5)
    theirs, ours = (loss_and_gradient(x.ppo_critic_loss_fn, *arguments)[1] for x in (areal, fused_areal))
    assert ours == 0.25 and 0 < theirs < ours
    parity.differs("areal", LOSS, "ties of the two losses", theirs="half of the gradient", ours="the whole gradient")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_difference_dtypes(parity, areal, dtype):
    values, old_values, targets, mask = make()
    arguments = (values.detach().to(dtype).requires_grad_(), old_values, targets, CLIP, mask)
    with pytest.raises(AssertionError):
        areal.ppo_critic_loss_fn(*arguments)
    exact = areal.ppo_critic_loss_fn(arguments[0].detach().float(), *arguments[1:])[0]
    torch.testing.assert_close(fused_areal.ppo_critic_loss_fn(*arguments)[0], exact, rtol=1e-6, atol=1e-7, check_dtype=False)
    parity.differs("areal", LOSS, "values that are not float32", theirs="AssertionError", ours="accepted")


def test_difference_integer_mask(parity, areal):
    values, old_values, targets, mask = make()
    with pytest.raises(RuntimeError, match="boolean"):
        areal.ppo_critic_loss_fn(values, old_values, targets, CLIP, mask.long())
    ours, theirs = (
        f(values, old_values, targets, CLIP, m)[0]
        for f, m in [(fused_areal.ppo_critic_loss_fn, mask.long()), (areal.ppo_critic_loss_fn, mask)]
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    parity.differs("areal", LOSS, "integer mask", theirs="RuntimeError", ours="valid wherever non-zero")


def test_difference_what_is_refused(parity, areal):
    values, old_values, targets, mask = make()
    for constants in [(old_values, targets[:, :1]), (old_values, targets.clone().requires_grad_())]:
        assert loss_and_gradient(areal.ppo_critic_loss_fn, values, *constants, CLIP, mask)[0].isfinite()
        with pytest.raises((ValueError, RuntimeError), match="value_loss"):
            fused_areal.ppo_critic_loss_fn(values, *constants, CLIP, mask)
    parity.differs("areal", LOSS, "broadcasting, targets that require grad", theirs="accepted", ours="error")
    with pytest.raises(ValueError, match="gamma"):
        both(areal, *rollout(areal, discount=1.01))
    parity.differs("areal", GAE, "discount or gae_lambda above 1", theirs="accepted", ours="error")


# --- install() and the page ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def installable(areal, monkeypatch):
    """Modules of AReaL's names around its own loss."""
    own = {"ppo_critic_loss_fn": areal.ppo_critic_loss_fn}
    contents = {
        **{name: {} for name in ("areal", "areal.utils", "areal.trainer", "areal.trainer.ppo")},
        **{name: own for name in ("areal.utils.functional", "areal.utils.functional.functional", "areal.trainer.ppo.critic")},
    }
    for name, content in contents.items():
        module = types.ModuleType(name)
        vars(module).update(content, __path__=[])
        monkeypatch.setitem(sys.modules, name, module)
    yield [sys.modules[name] for name, content in contents.items() if content]
    fused_areal.uninstall()


def test_install(areal, installable):
    with fused_areal.install():
        assert all(module.ppo_critic_loss_fn is fused_areal.ppo_critic_loss_fn for module in installable)
    assert all(module.ppo_critic_loss_fn is areal.ppo_critic_loss_fn for module in installable)


def test_page(areal, installable):
    scope = {}
    for block in peers.snippets("areal"):
        exec(block, scope)
    assert scope["ppo_critic_loss_fn"] is fused_areal.ppo_critic_loss_fn
    theirs, _ = areal.ppo_critic_loss_fn(scope["predictions"], scope["values"], scope["returns"], 0.2, scope["loss_mask"].bool())
    torch.testing.assert_close(scope["loss"], theirs, rtol=1e-6, atol=1e-7)
    assert scope["advantages"][1, -2] != 0, "the row that was cut off is bootstrapped"
