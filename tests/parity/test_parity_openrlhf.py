"""OpenRLHF's ValueLoss and get_advantages_and_returns, executed from its wheel, beside fused_critic.integrations.openrlhf."""

from __future__ import annotations

import sys
import types
from types import SimpleNamespace

import peers
import pytest
import torch
from fused_critic.integrations import openrlhf as fused_openrlhf

ROOT = "openrlhf-0.11.2.data/purelib/openrlhf"
CLIP, GAMMA, LAM = 0.3, 0.97, 0.9
SHAPES = [(6, 40), (1, 1), (3, 257), (33, 8)]
LOSS, GAE = "ValueLoss", "get_advantages_and_returns"


@pytest.fixture(scope="module")
def openrlhf():
    """OpenRLHF's own: the module ValueLoss, and the method as a function that takes None for self."""
    helpers = peers.functions("openrlhf", f"{ROOT}/models/utils.py", ["masked_mean"], torch=torch)
    scope = {"torch": torch, "nn": torch.nn, "masked_mean": helpers.masked_mean}
    losses = peers.functions("openrlhf", f"{ROOT}/models/loss.py", ["aggregate_loss", "ValueLoss"], **scope)
    path = f"{ROOT}/trainer/ppo_utils/experience_maker.py"
    maker = peers.functions("openrlhf", path, ["RemoteExperienceMaker.get_advantages_and_returns"], torch=torch)
    return SimpleNamespace(ValueLoss=losses.ValueLoss, get_advantages_and_returns=maker.get_advantages_and_returns)


def make(shape=(6, 40), dtype=torch.float32, value_dtype=None, seed=0):
    """Values (a leaf), old values, returns, mask: gaps, padding behind; the first row empty, the second full where there are several."""
    g = torch.Generator().manual_seed(seed)
    values, returns, noise = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(3))
    old_values = (values + 0.5 * noise).to(dtype)
    mask = (torch.rand(shape, generator=g) < 0.7) & (torch.arange(shape[1]) < torch.randint(1, shape[1] + 1, (shape[0], 1), generator=g))
    if shape[0] > 1:
        mask[0], mask[1] = False, True
    else:
        mask[:] = True
    return values.to(value_dtype or dtype).requires_grad_(), old_values, returns.to(dtype), mask


def loss_and_gradient(ValueLoss, values, *arguments, clip=CLIP, token_level_loss=True, **keywords):
    loss = ValueLoss(clip, token_level_loss)(values, *arguments, **keywords)
    return loss.detach(), torch.autograd.grad(loss, values)[0]


COUNTS = {
    "local": {},
    "dp_size alone": dict(dp_size=4),
    "global": dict(batch_num_tokens=301.0, global_batch_size=11.0, dp_size=4),
    "tensors": dict(batch_num_tokens=torch.tensor(301.0), global_batch_size=torch.tensor(11.0), dp_size=2),
    "tokens alone": dict(batch_num_tokens=301.0, dp_size=4),
}


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("token_level_loss", [True, False], ids=["token mean", "sequence mean"])
@pytest.mark.parametrize("clip", [CLIP, None])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32], ids=str)
def test_value_loss(parity, openrlhf, clip, token_level_loss, counts, mask_dtype):
    values, old_values, returns, mask = make()
    keywords = dict(action_mask=mask.to(mask_dtype), clip=clip, token_level_loss=token_level_loss, **COUNTS[counts])
    ours, theirs = (loss_and_gradient(x.ValueLoss, values, old_values, returns, **keywords) for x in (fused_openrlhf, openrlhf))
    parity.same("openrlhf", LOSS, "loss", ours[0], theirs[0], rtol=1e-6, atol=1e-7)
    parity.same("openrlhf", LOSS, "gradient", ours[1], theirs[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "dtype, value_dtype, rtol, gradient_rtol, atol, suffix",
    [
        (torch.float32, None, 1e-6, 1e-6, 1e-7, ""),
        (torch.float64, None, 1e-12, 1e-12, 1e-15, ", float64"),
        # OpenRLHF adds the two branches' gradients in bf16; ours is rounded once.
        (torch.float32, torch.bfloat16, 1e-6, 2e-2, 1e-7, ", bf16 critic"),
    ],
    ids=["float32", "float64", "bf16 critic"],
)
def test_value_loss_shapes_and_dtypes(parity, openrlhf, shape, dtype, value_dtype, rtol, gradient_rtol, atol, suffix):
    values, old_values, returns, mask = make(shape, dtype, value_dtype)
    for token_level_loss in (True, False):
        keywords = dict(action_mask=mask, token_level_loss=token_level_loss)
        ours, theirs = (loss_and_gradient(x.ValueLoss, values, old_values, returns, **keywords) for x in (fused_openrlhf, openrlhf))
        parity.same("openrlhf", LOSS, "loss" + suffix, ours[0], theirs[0], rtol=rtol, atol=atol)
        parity.same("openrlhf", LOSS, "gradient" + suffix, ours[1], theirs[1], rtol=gradient_rtol, atol=atol)
        assert (ours[0].dtype, ours[1].dtype) == (theirs[0].dtype, theirs[1].dtype)


def test_value_loss_without_mask(parity, openrlhf):
    values, old_values, returns, _ = make()
    ours, theirs = (loss_and_gradient(x.ValueLoss, values, old_values, returns) for x in (fused_openrlhf, openrlhf))
    parity.same("openrlhf", LOSS, "loss, no mask", ours[0], theirs[0], rtol=1e-6, atol=1e-7)
    parity.same("openrlhf", LOSS, "gradient, no mask", ours[1], theirs[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("gamma, lam", [(GAMMA, LAM), (1.0, 0.95), (1.0, 1.0), (0.9, 0.0)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "dtype, tolerance, suffix", [(torch.float32, 1e-5, ""), (torch.float64, 1e-12, ", float64")], ids=["float32", "float64"]
)
@pytest.mark.parametrize("masked", ["bool", "float", "none"])
def test_advantages(parity, openrlhf, masked, dtype, tolerance, suffix, shape, gamma, lam):
    values, rewards, _, mask = make(shape, dtype)
    where = mask if masked != "none" else torch.ones_like(mask)
    action_mask = {"bool": mask, "float": mask.to(dtype), "none": None}[masked]
    check_advantages(parity, openrlhf, (values.detach(), rewards, action_mask, gamma, lam), where, tolerance, suffix)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_advantages_of_a_bf16_critic(parity, openrlhf, shape):
    """Without discount OpenRLHF multiplies bf16 values by 1 alone, which is exact (see the difference below)."""
    values, rewards, _, mask = make(shape, torch.float32, torch.bfloat16)
    check_advantages(parity, openrlhf, (values.detach(), rewards, mask, 1.0, 0.95), mask, 1e-5, ", bf16 critic, gamma 1")


def check_advantages(parity, openrlhf, arguments, where, tolerance, suffix):
    ours, theirs = (x.get_advantages_and_returns(None, *arguments) for x in (fused_openrlhf, openrlhf))
    for name, x, y in zip(("advantages", "returns"), ours, theirs):
        parity.same("openrlhf", GAE, name + suffix, x, y, rtol=tolerance, atol=tolerance, where=where)
        assert x.dtype == y.dtype and not x.requires_grad


# --- the differences on purpose -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token_level_loss", [True, False])
@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_difference_garbage_under_the_mask(parity, openrlhf, garbage, token_level_loss):
    values, old_values, returns, mask = make()
    keywords = dict(action_mask=mask, token_level_loss=token_level_loss)
    clean = loss_and_gradient(fused_openrlhf.ValueLoss, values, old_values, returns, **keywords)
    dirty = [torch.where(mask, x.detach(), garbage) for x in (values, old_values, returns)]
    dirty[0].requires_grad_()
    assert loss_and_gradient(openrlhf.ValueLoss, *dirty, **keywords)[0].isnan()
    ours = loss_and_gradient(fused_openrlhf.ValueLoss, *dirty, **keywords)
    torch.testing.assert_close(ours, clean, rtol=0, atol=0)
    parity.differs("openrlhf", LOSS, "NaN at masked tokens", theirs="loss NaN", ours="never used; gradient 0")

    arguments = (dirty[0].detach(), dirty[2], mask, GAMMA, LAM)
    assert openrlhf.get_advantages_and_returns(None, *arguments)[0][0].isnan().any()
    ours = fused_openrlhf.get_advantages_and_returns(None, *arguments)
    clean = fused_openrlhf.get_advantages_and_returns(None, values.detach(), returns, mask, GAMMA, LAM)
    torch.testing.assert_close(ours, clean, rtol=0, atol=0)
    parity.differs("openrlhf", GAE, "NaN at masked tokens", theirs="NaN before them in the row", ours="never used")


@pytest.mark.parametrize("token_level_loss", [True, False])
def test_difference_nothing_valid(parity, openrlhf, token_level_loss):
    arguments, keywords = make(), dict(token_level_loss=token_level_loss)
    values, old_values, returns, mask = arguments
    assert loss_and_gradient(openrlhf.ValueLoss, values, old_values, returns, action_mask=mask & False, **keywords)[0].isnan()
    loss, gradient = loss_and_gradient(fused_openrlhf.ValueLoss, values, old_values, returns, action_mask=mask & False, **keywords)
    assert loss == 0 and not gradient.any()
    parity.differs("openrlhf", LOSS, "nothing valid, no global count", theirs="loss NaN", ours="loss 0, gradient 0")


def test_difference_rounding_of_the_clip(parity, openrlhf):
    """Inside the range old + (values - old) is values, but for rounding: there a value and its return that are equal have a loss."""
    old, value = torch.tensor([[1.0]]), torch.tensor([[0.10000000149011612]])
    assert old + (value - old) != value
    arguments = (value.clone().requires_grad_(), old, value)
    assert loss_and_gradient(openrlhf.ValueLoss, *arguments, action_mask=torch.ones(1, 1), clip=2.0)[0] > 0
    assert loss_and_gradient(fused_openrlhf.ValueLoss, *arguments, action_mask=torch.ones(1, 1), clip=2.0)[0] == 0
    parity.differs("openrlhf", LOSS, "rounding of the clip", theirs="moves values inside the range by an ulp", ours="exact")


def test_difference_half_precision_throughout(parity, openrlhf):
    """Small differences of large values: old + clamp(values - old) is 100 again in bf16, which has steps of 0.5 there."""
    values = torch.full((1, 4), 100.5, dtype=torch.bfloat16, requires_grad=True)
    old_values, returns = torch.full((1, 4), 100.0, dtype=torch.bfloat16), torch.full((1, 4), 104.0, dtype=torch.bfloat16)
    mask = torch.ones(1, 4, dtype=torch.bool)
    arguments = (values, old_values, returns)
    theirs, _ = loss_and_gradient(openrlhf.ValueLoss, *arguments, action_mask=mask, clip=0.2)
    ours, _ = loss_and_gradient(fused_openrlhf.ValueLoss, *arguments, action_mask=mask, clip=0.2)
    assert theirs.dtype == torch.bfloat16 and theirs == 0.5 * 4.0**2
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, torch.tensor(0.5 * 3.8**2))
    parity.differs("openrlhf", LOSS, "bf16 throughout", theirs="computed and returned in bf16", ours="in float32")

    values, rewards, _, mask = make(dtype=torch.bfloat16)
    arguments = (values.detach(), rewards, mask, GAMMA, LAM)
    exact = openrlhf.get_advantages_and_returns(None, values.detach().double(), rewards.double(), mask, GAMMA, LAM)
    assert openrlhf.get_advantages_and_returns(None, *arguments)[0].dtype == torch.bfloat16
    ours = fused_openrlhf.get_advantages_and_returns(None, *arguments)
    assert all(x.dtype == torch.float32 for x in ours)
    torch.testing.assert_close([x[mask].double() for x in ours], [x[mask] for x in exact], rtol=1e-5, atol=1e-5)
    parity.differs("openrlhf", GAE, "bf16 throughout", theirs="computed and returned in bf16", ours="in float32")


def test_difference_bf16_critic_with_discount(parity, openrlhf):
    """Rewards in float32: OpenRLHF rounds the discounted next value to bf16 before it is added to them."""
    values, rewards, _, mask = make(dtype=torch.float32, value_dtype=torch.bfloat16)
    values = values.detach()
    exact, _ = openrlhf.get_advantages_and_returns(None, values.double(), rewards.double(), mask, GAMMA, LAM)
    theirs, ours = (x.get_advantages_and_returns(None, values, rewards, mask, GAMMA, LAM)[0] for x in (openrlhf, fused_openrlhf))
    assert theirs.dtype == ours.dtype == torch.float32
    assert (theirs - exact)[mask].abs().max() > 1e-3 and (ours - exact)[mask].abs().max() < 1e-5
    parity.differs("openrlhf", GAE, "bf16 values, gamma below 1", theirs="gamma V in bf16", ours="in float32")


def test_difference_masked_tokens(parity, openrlhf):
    values, rewards, _, mask = make()
    arguments = (values.detach(), rewards, mask, GAMMA, LAM)
    assert openrlhf.get_advantages_and_returns(None, *arguments)[0][~mask].any()
    assert not any(x[~mask].any() for x in fused_openrlhf.get_advantages_and_returns(None, *arguments))
    parity.differs("openrlhf", GAE, "masked tokens", theirs="what the recursion carries", ours="0")


def test_difference_fractional_mask(parity, openrlhf):
    values, rewards, _, mask = make()
    halves, arguments = mask * 0.5, (values.detach(), rewards)
    theirs = openrlhf.get_advantages_and_returns(None, *arguments, halves, GAMMA, LAM)[0]
    assert not torch.allclose(theirs[mask], openrlhf.get_advantages_and_returns(None, *arguments, mask, GAMMA, LAM)[0][mask], rtol=1e-2)
    ours = fused_openrlhf.get_advantages_and_returns(None, *arguments, halves, GAMMA, LAM)
    torch.testing.assert_close(ours, fused_openrlhf.get_advantages_and_returns(None, *arguments, mask, GAMMA, LAM), rtol=0, atol=0)
    parity.differs("openrlhf", GAE, "fractional mask", theirs="scales rewards and values", ours="valid wherever non-zero")


def test_difference_gradient_at_ties(parity, openrlhf):
    """The return half way between a value and its clipped one."""
    values, old_values, returns = torch.tensor([[1.5]], requires_grad=True), torch.tensor([[0.5]]), torch.tensor([[1.25]])
    keywords = dict(action_mask=torch.ones(1, 1), clip=0.5)
    theirs = loss_and_gradient(openrlhf.ValueLoss, values, old_values, returns, **keywords)[1]
    ours = loss_and_gradient(fused_openrlhf.ValueLoss, values, old_values, returns, **keywords)[1]
    assert ours == 0.25 and 0 < theirs < ours
    parity.differs("openrlhf", LOSS, "ties of the two losses", theirs="half of the gradient", ours="the whole gradient")


def test_difference_sequence_mean_without_mask(parity, openrlhf):
    values, old_values, returns, mask = make()
    with pytest.raises(AttributeError):
        loss_and_gradient(openrlhf.ValueLoss, values, old_values, returns, token_level_loss=False)
    ours = loss_and_gradient(fused_openrlhf.ValueLoss, values, old_values, returns, token_level_loss=False)
    full = loss_and_gradient(openrlhf.ValueLoss, values, old_values, returns, action_mask=mask | True, token_level_loss=False)
    torch.testing.assert_close(ours, full, rtol=1e-6, atol=1e-7)
    parity.differs("openrlhf", LOSS, "no mask, sequence mean", theirs="AttributeError", ours="all tokens valid")


def test_difference_no_tokens(parity, openrlhf):
    empty = torch.zeros(3, 0)
    with pytest.raises(RuntimeError):
        openrlhf.get_advantages_and_returns(None, empty, empty, empty.bool(), GAMMA, LAM)
    assert all(x.shape == (3, 0) for x in fused_openrlhf.get_advantages_and_returns(None, empty, empty, empty.bool(), GAMMA, LAM))
    parity.differs("openrlhf", GAE, "responses without a token", theirs="RuntimeError", ours="empty results")


def test_difference_what_is_refused(parity, openrlhf):
    values, rewards, returns, mask = make()
    arguments = (values.detach(), rewards, mask, 1.01, LAM)
    assert openrlhf.get_advantages_and_returns(None, *arguments)[0].isfinite().all()
    with pytest.raises(ValueError, match="gamma"):
        fused_openrlhf.get_advantages_and_returns(None, *arguments)
    parity.differs("openrlhf", GAE, "gamma or lambd above 1", theirs="accepted", ours="error")
    keywords = dict(action_mask=mask)
    for constants in [(rewards, returns[:, :1]), (rewards, returns.clone().requires_grad_())]:
        assert loss_and_gradient(openrlhf.ValueLoss, values, *constants, **keywords)[0].isfinite()
        with pytest.raises((ValueError, RuntimeError), match="value_loss"):
            loss_and_gradient(fused_openrlhf.ValueLoss, values, *constants, **keywords)
    parity.differs("openrlhf", LOSS, "broadcasting, returns that require grad", theirs="accepted", ours="error")


# --- install() and the page ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def installable(openrlhf, monkeypatch):
    """Modules of OpenRLHF's names around its own classes, the experience maker without what it needs Ray for."""
    maker = type("RemoteExperienceMaker", (), {"get_advantages_and_returns": torch.no_grad()(openrlhf.get_advantages_and_returns)})
    value_loss = type("ValueLoss", (openrlhf.ValueLoss,), {"forward": openrlhf.ValueLoss.forward})
    contents = {
        **{name: {} for name in ("openrlhf", "openrlhf.trainer", "openrlhf.trainer.ppo_utils")},
        "openrlhf.models": {"ValueLoss": value_loss},
        "openrlhf.models.loss": {"ValueLoss": value_loss},
        "openrlhf.trainer.ppo_utils.experience_maker": {"RemoteExperienceMaker": maker},
    }
    for name, content in contents.items():
        module = types.ModuleType(name)
        vars(module).update(content, __path__=[])
        monkeypatch.setitem(sys.modules, name, module)
    yield SimpleNamespace(ValueLoss=value_loss, RemoteExperienceMaker=maker)
    fused_openrlhf.uninstall()


def test_install(installable):
    """Instances that exist compute by ours while it is installed."""
    values, old_values, returns, mask = make()
    nothing = mask & False
    critic_loss_fn, maker = installable.ValueLoss(CLIP), installable.RemoteExperienceMaker()
    before = [dict(vars(cls)) for cls in (installable.ValueLoss, installable.RemoteExperienceMaker)]
    assert critic_loss_fn(values, old_values, returns, nothing).isnan()
    with fused_openrlhf.install():
        assert critic_loss_fn(values, old_values, returns, nothing) == 0
        advantages, _ = maker.get_advantages_and_returns(old_values, returns, mask, GAMMA, lambd=LAM)
        assert not advantages[~mask].any() and advantages[mask].all()
    assert critic_loss_fn(values, old_values, returns, nothing).isnan()
    assert [dict(vars(cls)) for cls in (installable.ValueLoss, installable.RemoteExperienceMaker)] == before


def test_page(openrlhf, installable):
    scope = {}
    for block in peers.snippets("openrlhf"):
        exec(block, scope)
    assert installable.ValueLoss.forward is fused_openrlhf.ValueLoss.forward
    theirs = openrlhf.ValueLoss(0.2)(scope["values"], scope["old_values"], scope["returns"], scope["action_mask"])
    torch.testing.assert_close(scope["loss"], theirs, rtol=1e-6, atol=1e-7)
