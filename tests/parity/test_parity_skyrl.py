"""SkyRL's critic functions, executed from the wheel's source, and ours on the same data.

install() is tried on SkyRL's own module, whole and unmodified, imported with stand-ins for ray and what else is heavy. Every difference
on purpose is a test of its own.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any, Optional

import fused_critic
import peers
import pytest
import torch
from fused_critic.integrations import _adapter
from fused_critic.integrations import skyrl as fused_skyrl

SHAPES = [(6, 40), (1, 9), (5, 1), (64, 128)]
GAMMA, LAMBD, CLIP = 0.99, 0.95, 0.2
LOSS, GAE = "ppo_critic_loss", "compute_gae_advantage_return"
UTILS = "skyrl/backends/skyrl_train/utils"
PPO_UTILS = "skyrl.backends.skyrl_train.utils.ppo_utils"
MASK_DTYPES = [torch.bool, torch.int64, torch.float32]


@pytest.fixture(scope="module")
def skyrl():
    helpers = peers.functions("skyrl", f"{UTILS}/torch_utils.py", ["masked_mean"], torch=torch)
    names = ["masked_var", "masked_whiten", LOSS, GAE]
    return peers.functions("skyrl", f"{UTILS}/ppo_utils.py", names, torch=torch, masked_mean=helpers.masked_mean, Optional=Optional)


def config(value_clip: float | None = CLIP) -> types.SimpleNamespace:
    return types.SimpleNamespace(value_clip=value_clip)


def batch(shape, dtype=torch.float32, value_dtype=None, seed=0):
    """values, old values, returns, mask: gaps and padding, a row without tokens, a full row. Two tokens at least, for whitening."""
    generator = torch.Generator().manual_seed(seed)
    values, returns, noise = (torch.randn(shape, generator=generator) for _ in range(3))
    mask = torch.rand(shape, generator=generator) < 0.6
    if len(mask) > 2:
        mask[0] = False
    mask[-1] = True
    mask[1:2] = True
    return values.to(value_dtype or dtype), (values + 0.4 * noise).to(dtype), returns.to(dtype), mask


def loss_and_gradient(ppo_critic_loss, values, *arguments, **keywords):
    values = values.detach().requires_grad_()
    loss, clipfrac = ppo_critic_loss(values, *arguments, **keywords)
    return loss, clipfrac, torch.autograd.grad(loss, values)[0]


# --- the same -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [LOSS, GAE])
def test_signatures(skyrl, name):
    assert _adapter.signature_of(getattr(skyrl, name)) == _adapter.signature_of(getattr(fused_skyrl, name))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mask_dtype", [*MASK_DTYPES, None], ids=str)
@pytest.mark.parametrize("clip", [CLIP, 0.0, None], ids=["clip", "range 0", "no clip"])
def test_loss(skyrl, parity, shape, mask_dtype, clip):
    """In float64, where the rounding of old + (value - old) is below the tolerance: which branch is greater agrees too."""
    values, old_values, returns, mask = batch(shape, torch.float64)
    arguments = (values, old_values, returns, config(clip), None if mask_dtype is None else mask.to(mask_dtype))
    theirs, ours = (loss_and_gradient(module.ppo_critic_loss, *arguments) for module in (skyrl, fused_skyrl))
    assert type(ours[1]) is type(theirs[1])
    parity.same("skyrl", LOSS, "loss, float64", ours[0], theirs[0], rtol=1e-12, atol=1e-12)
    parity.same("skyrl", LOSS, "gradient, float64", ours[2], theirs[2], rtol=1e-12, atol=1e-12)
    if clip is None:
        assert ours[1] is None
    elif clip > 0:
        parity.same("skyrl", LOSS, "clip fraction", ours[1], theirs[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_loss_in_float32_and_of_half_precision_models(skyrl, parity, shape, value_dtype):
    """Old values and returns are float32, the values what the model computes in. Both compute in float32."""
    values, old_values, returns, mask = batch(shape, value_dtype=value_dtype)
    arguments = (values, old_values, returns, config(), mask.long())
    theirs, ours = (loss_and_gradient(module.ppo_critic_loss, *arguments) for module in (skyrl, fused_skyrl))
    assert ours[0].dtype == theirs[0].dtype == torch.float32 and ours[2].dtype == theirs[2].dtype == value_dtype
    name = str(value_dtype).removeprefix("torch.")
    parity.same("skyrl", LOSS, f"loss, {name} values", ours[0], theirs[0], rtol=1e-5, atol=1e-7)
    # Theirs is a sum of two branches' parts, each rounded: a unit in the last place of the gradient's dtype.
    rtol = 1e-5 if value_dtype == torch.float32 else torch.finfo(value_dtype).eps
    atol = 1e-6 if value_dtype == torch.float16 else 1e-7
    parity.same("skyrl", LOSS, f"gradient, {name} values", ours[2], theirs[2], rtol=rtol, atol=atol)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0] * shape[1] > 5], ids=str)
@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("gamma, lambd", [(GAMMA, LAMBD), (1.0, 1.0), (0.0, 0.5)])
def test_gae(skyrl, parity, shape, mask_dtype, dtype, gamma, lambd):
    values, _, rewards, mask = batch(shape, dtype)
    arguments = {"token_level_rewards": rewards, "values": values, "response_mask": mask.to(mask_dtype), "gamma": gamma, "lambd": lambd}
    others = {"index": None, "grpo_norm_by_std": True, "config": config()}  # SkyRL passes them to every estimator
    theirs, ours = (module.compute_gae_advantage_return(**arguments, **others) for module in (skyrl, fused_skyrl))
    assert all(x.dtype == dtype for x in (*theirs, *ours))
    if dtype == torch.float32:
        precisions = ((1e-4, 1e-5), (1e-4, 1e-5))
    else:  # an integer mask's n / (n - 1) is a quotient of integers, which torch rounds to float32
        precisions = ((torch.finfo(torch.float32).eps, 1e-9), (1e-11, 1e-11))
    name = str(dtype).removeprefix("torch.")
    for what, ours_is, theirs_is, (rtol, atol), where in zip(("advantages", "returns"), ours, theirs, precisions, (mask, None)):
        parity.same("skyrl", GAE, f"{what}, {name}", ours_is, theirs_is, rtol=rtol, atol=atol, where=where)


# --- different on purpose -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["values", "old_values", "returns"])
@pytest.mark.parametrize("leftover", [float("nan"), float("inf")])
def test_difference_nan_at_masked_tokens(skyrl, parity, which, leftover):
    tensors = dict(zip(("values", "old_values", "returns", "mask"), batch((6, 40))))
    mask = tensors.pop("mask")
    clean = loss_and_gradient(fused_skyrl.ppo_critic_loss, **tensors, config=config(), loss_mask=mask)
    tensors[which] = tensors[which].masked_fill(~mask, leftover)
    theirs, ours = (
        loss_and_gradient(module.ppo_critic_loss, **tensors, config=config(), loss_mask=mask) for module in (skyrl, fused_skyrl)
    )
    assert theirs[0].isnan()
    assert torch.equal(ours[0], clean[0]) and ours[1] == clean[1] and torch.equal(ours[2], clean[2]) and not ours[2][~mask].any()
    parity.differs("skyrl", LOSS, "NaN or inf at masked tokens", theirs="loss NaN", ours="never used")


def test_nan_at_masked_tokens_reaches_gae_in_both(skyrl):
    """Both read every position. mask_mode "skip", which is not SkyRL's recursion, does not."""
    values, _, rewards, mask = batch((6, 40))
    values = values.masked_fill(~mask, float("nan"))
    theirs, ours = (module.compute_gae_advantage_return(rewards, values, mask, GAMMA, LAMBD) for module in (skyrl, fused_skyrl))
    assert theirs[0][mask].isnan().all() and ours[0][mask].isnan().all()
    assert torch.equal(theirs[1].isnan(), ours[1].isnan())
    assert fused_critic.gae(rewards, values, mask, gamma=GAMMA, lam=LAMBD, whiten=True).advantages.isfinite().all()


@pytest.mark.parametrize("tokens", [0, 1])
def test_difference_whitening_of_fewer_than_two_tokens(skyrl, parity, tokens):
    values, _, rewards, mask = batch((2, 5))
    mask = torch.zeros_like(mask)
    mask[0, :tokens] = True
    with pytest.raises(ValueError, match="mask"):
        skyrl.compute_gae_advantage_return(rewards, values, mask, GAMMA, LAMBD)
    advantages, returns = fused_skyrl.compute_gae_advantage_return(rewards, values, mask, GAMMA, LAMBD)
    _, expected = skyrl.compute_gae_advantage_return(rewards, values, torch.ones_like(mask), GAMMA, LAMBD)
    assert not advantages.any()
    torch.testing.assert_close(returns, expected)
    parity.differs("skyrl", GAE, "fewer than two valid tokens", theirs="ValueError", ours="advantages 0")


def test_difference_advantages_at_masked_tokens(skyrl, parity):
    values, _, rewards, mask = batch((6, 40))
    theirs, ours = (module.compute_gae_advantage_return(rewards, values, mask, GAMMA, LAMBD) for module in (skyrl, fused_skyrl))
    assert theirs[0][~mask].all() and not ours[0][~mask].any()
    parity.differs("skyrl", GAE, "advantages at masked tokens", theirs="whitened leftovers", ours="0")


def test_bool_mask_is_taken_by_both(skyrl):
    values, old_values, returns, mask = batch((6, 40))
    for module in (skyrl, fused_skyrl):
        as_bool, as_float = (module.ppo_critic_loss(values, old_values, returns, config(), m) for m in (mask, mask.float()))
        torch.testing.assert_close(as_bool, as_float)
        as_bool, as_float = (module.compute_gae_advantage_return(returns, values, m, GAMMA, LAMBD) for m in (mask, mask.float()))
        torch.testing.assert_close(as_bool, as_float)


def test_nothing_valid_is_a_loss_of_0_in_both(skyrl):
    values, old_values, returns, mask = batch((6, 40))
    for module in (skyrl, fused_skyrl):
        loss, clipfrac, gradient = loss_and_gradient(module.ppo_critic_loss, values, old_values, returns, config(), torch.zeros_like(mask))
        assert loss == 0 and clipfrac == 0 and not gradient.any()


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_difference_empty_batch(skyrl, parity, shape):
    empty = torch.zeros(shape)
    theirs, _ = skyrl.ppo_critic_loss(empty, empty, empty, config(None))
    assert theirs.isnan()
    assert fused_skyrl.ppo_critic_loss(empty, empty, empty, config(None)) == (0, None)
    parity.differs("skyrl", LOSS, "no rows, or no tokens", theirs="NaN", ours="0")


def test_difference_rounding_of_the_clip(skyrl, parity):
    """Values within their range: old + (value - old) is another number than the value for some, and greater losses count as clipped."""
    generator = torch.Generator().manual_seed(0)
    values, old_values = 0.19 * torch.rand(2, 100, 100, generator=generator).square()
    returns = torch.randn(100, 100, generator=generator)
    assert ((values - old_values).abs() < CLIP).all()
    theirs, ours = (loss_and_gradient(module.ppo_critic_loss, values, old_values, returns, config()) for module in (skyrl, fused_skyrl))
    assert 0 < theirs[1] < 0.05
    assert ours[1] == 0
    torch.testing.assert_close(ours[2], (values - returns) / values.numel(), rtol=1e-6, atol=0)
    parity.differs("skyrl", LOSS, "inside of the clip range", theirs="`old + (value - old)`, rounded", ours="the value")


def test_difference_weights_that_sum_up_to_less_than_1(skyrl, parity):
    """Of one row with one token: its loss is 0.5 * 2**2."""
    values, returns, weights = torch.tensor([[1.0, 5.0]]), torch.tensor([[3.0, 0.0]]), torch.tensor([[0.25, 0.0]])
    assert skyrl.ppo_critic_loss(values, values, returns, config(None), weights)[0] == 0.25 * 2
    assert fused_skyrl.ppo_critic_loss(values, values, returns, config(None), weights)[0] == 2
    parity.differs("skyrl", LOSS, "weights of a row that sum up to less than 1", theirs="divided by 1", ours="divided by their sum")


def test_difference_half_precision_throughout(skyrl, parity):
    half = batch((6, 40), torch.bfloat16)
    theirs, ours = (module.ppo_critic_loss(*half[:3], config(), half[3]) for module in (skyrl, fused_skyrl))
    exact, _ = skyrl.ppo_critic_loss(*(x.double() for x in half[:3]), config(), half[3])
    assert abs(theirs[0] / exact - 1) > 1e-3 and ours[0].dtype == torch.float32
    torch.testing.assert_close(ours[0].double(), exact, rtol=1e-5, atol=0)
    parity.differs("skyrl", LOSS, "bf16 throughout", theirs="computed in bf16", ours="computed in float32")
    values, _, rewards, mask = half
    theirs, ours = (module.compute_gae_advantage_return(rewards, values, mask, GAMMA, LAMBD) for module in (skyrl, fused_skyrl))
    exact = skyrl.compute_gae_advantage_return(rewards.double(), values.double(), mask, GAMMA, LAMBD)
    assert all(x.dtype == torch.bfloat16 for x in theirs) and all(x.dtype == torch.float32 for x in ours)
    torch.testing.assert_close([x[mask].double() for x in ours], [x[mask] for x in exact], rtol=1e-4, atol=1e-5)
    parity.differs("skyrl", GAE, "bf16 throughout", theirs="computed and returned in bf16", ours="computed and returned in float32")


def test_difference_float64_beside_an_integer_mask(skyrl, parity):
    """n / (n - 1) of the variance is float32 of integers; of a float64 mask it is exact in SkyRL too."""
    values, _, rewards, mask = batch((6, 40), torch.float64)
    theirs, ours = (module.compute_gae_advantage_return(rewards, values, mask.long(), GAMMA, LAMBD) for module in (skyrl, fused_skyrl))
    exact = skyrl.compute_gae_advantage_return(rewards, values, mask.double(), GAMMA, LAMBD)
    assert all(x.dtype == torch.float64 for x in (*theirs, *ours))
    assert 1e-10 < (theirs[0][mask] / exact[0][mask] - 1).abs().max() < torch.finfo(torch.float32).eps
    torch.testing.assert_close(ours[0][mask], exact[0][mask], rtol=1e-12, atol=1e-12)
    parity.differs("skyrl", GAE, "float64 beside an integer mask", theirs="n / (n - 1) in float32", ours="in float64")


@pytest.mark.parametrize("value, old, ret", [(1.5, 0.5, 1.25), (0.5, 0.0, 3.0)], ids=["equal losses", "on the bound"])
def test_difference_gradient_at_ties(skyrl, parity, value, old, ret):
    """Clip range 0.5: the return half way between the value and its clipped value, and the value on the bound of the range."""
    arguments = (*(torch.tensor([[x]]) for x in (value, old, ret)), config(0.5))
    theirs, ours = (loss_and_gradient(module.ppo_critic_loss, *arguments) for module in (skyrl, fused_skyrl))
    assert ours[0] == theirs[0] and ours[2] == value - ret
    if value == 1.5:
        assert 0 < theirs[2] / ours[2] < 1
        parity.differs("skyrl", LOSS, "ties of the two losses", theirs="a part of the gradient", ours="the whole gradient")
    else:  # what torch.clamp passes on at its bounds is another thing in another version of torch
        assert 0 < theirs[2] / ours[2] <= 1
        parity.differs("skyrl", LOSS, "bounds of the range", theirs="torch.clamp's gradient, by torch's version", ours="the whole gradient")


def test_difference_returns_and_old_values_are_constants(skyrl, parity):
    values, *constants, mask = batch((6, 40))
    for index in range(2):
        old_values, returns = (x.clone().requires_grad_(i == index) for i, x in enumerate(constants))
        theirs, _ = skyrl.ppo_critic_loss(values, old_values, returns, config(), mask)
        assert torch.autograd.grad(theirs, (old_values, returns)[index])[0].any()
        with pytest.raises(ValueError, match="requires_grad"):
            fused_skyrl.ppo_critic_loss(values, old_values, returns, config(), mask)
    parity.differs("skyrl", LOSS, "returns or old values that require grad", theirs="gradient passed on", ours="error")


def test_difference_no_broadcasting_and_no_negative_range(skyrl, parity):
    values, old_values, returns, mask = batch((6, 40))
    for arguments in ((values, old_values, returns[:, :1], config(), mask), (values, old_values, returns, config(-CLIP), mask)):
        assert skyrl.ppo_critic_loss(*arguments)[0].isfinite()
        with pytest.raises(ValueError, match="value_loss"):
            fused_skyrl.ppo_critic_loss(*arguments)
    parity.differs("skyrl", LOSS, "broadcasting, negative value_clip", theirs="accepted", ours="error")


# --- install() into SkyRL's module ------------------------------------------------------------------------------------------------------


@pytest.fixture
def ppo_utils(monkeypatch):
    """SkyRL's module, imported from the wheel. Its packages' own imports are left out; ray, never started, and others are stand-ins."""
    if sys.version_info < (3, 11):
        pytest.skip("SkyRL needs Python 3.11")
    root = peers.root("skyrl")

    def module(name: str, folder: bool = False, **attributes: Any) -> None:
        stand_in: Any = types.ModuleType(name)
        if folder:
            stand_in.__path__ = [str(root / name.replace(".", "/"))]
        vars(stand_in).update(attributes)
        monkeypatch.setitem(sys.modules, name, stand_in)

    for package in ("skyrl", "skyrl.backends", "skyrl.backends.skyrl_train", "skyrl.backends.skyrl_train.utils", "skyrl.train"):
        module(package, folder=True)
    module("skyrl.train.config", AlgorithmConfig=object)
    module("ray", remote=lambda cls: cls, is_initialized=lambda: False)
    module("jaxtyping", Float=dict, Integer=dict)  # subscripted in annotations
    module("loguru", logger=None)
    module("omegaconf", DictConfig=dict)
    yield importlib.import_module(PPO_UTILS)
    fused_skyrl.uninstall()
    for name in [name for name in sys.modules if name.partition(".")[0] == "skyrl"]:
        del sys.modules[name]


def test_install_and_uninstall(ppo_utils):
    worker: Any = types.ModuleType("skyrl.backends.skyrl_train.workers.worker")
    worker.ppo_critic_loss = ppo_utils.ppo_critic_loss
    sys.modules[worker.__name__] = worker
    theirs = ppo_utils.ppo_critic_loss, ppo_utils.compute_gae_advantage_return
    assert ppo_utils.AdvantageEstimatorRegistry.get("gae") is theirs[1]
    assert all(finding.fits and not finding.installed for finding in fused_skyrl.ADAPTER.examine())
    for _ in range(2):
        with fused_skyrl.install():
            assert ppo_utils.ppo_critic_loss is worker.ppo_critic_loss is fused_skyrl.ppo_critic_loss
            assert ppo_utils.compute_gae_advantage_return is fused_skyrl.compute_gae_advantage_return
            assert ppo_utils.AdvantageEstimatorRegistry.get("gae") is fused_skyrl.compute_gae_advantage_return
            assert all(finding.installed for finding in fused_skyrl.ADAPTER.examine())
        assert (ppo_utils.ppo_critic_loss, ppo_utils.compute_gae_advantage_return) == theirs
        assert worker.ppo_critic_loss is theirs[0] and ppo_utils.AdvantageEstimatorRegistry.get("gae") is theirs[1]


def test_installed_estimator_through_skyrls_own_call(ppo_utils):
    values, _, rewards, mask = batch((6, 40))
    arguments = (rewards, mask.long(), None, ppo_utils.AdvantageEstimator.GAE, config(), values, True, GAMMA, LAMBD)
    theirs = ppo_utils.compute_advantages_and_returns(*arguments)
    with fused_skyrl.install():
        ours = ppo_utils.compute_advantages_and_returns(*arguments)
    assert not ours[0][~mask].any() and theirs[0][~mask].all(), "ours was called"
    torch.testing.assert_close(ours[0][mask], theirs[0][mask], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-5)


def test_install_refuses_another_signature(ppo_utils, monkeypatch):
    monkeypatch.setattr(ppo_utils, LOSS, lambda values, old_values, returns, config, mask=None: None)
    with pytest.raises(RuntimeError) as error:
        fused_skyrl.install()
    assert "mask=None" in str(error.value) and "loss_mask" in str(error.value) and "0.3.0" in str(error.value)
    assert ppo_utils.compute_gae_advantage_return is not fused_skyrl.compute_gae_advantage_return


def test_the_page(ppo_utils, monkeypatch):
    """Its blocks: the one line, and a critic's worker. The stand-in for ray's decorator returns the class."""
    installed, worker = peers.snippets("skyrl")
    exec(installed, {})
    assert ppo_utils.AdvantageEstimatorRegistry.get("gae") is fused_skyrl.compute_gae_advantage_return

    class FSDPCriticWorkerBase:
        def __init__(self, cfg):
            self.critic_loss_fn = None

    fsdp_worker: Any = types.ModuleType("skyrl.backends.skyrl_train.workers.fsdp.fsdp_worker")
    fsdp_worker.FSDPCriticWorkerBase = FSDPCriticWorkerBase
    for name in ("skyrl.backends.skyrl_train.workers", "skyrl.backends.skyrl_train.workers.fsdp"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, fsdp_worker.__name__, fsdp_worker)
    sys.modules["skyrl.backends.skyrl_train.workers.fsdp"].fsdp_worker = fsdp_worker
    monkeypatch.setattr(sys.modules["ray"], "remote", lambda num_gpus: lambda cls: cls)
    exec(worker, {})
    assert fsdp_worker.CriticWorker(cfg=None).critic_loss_fn is fused_skyrl.ppo_critic_loss
