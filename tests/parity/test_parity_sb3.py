"""Stable-Baselines3's RolloutBuffer and value loss, executed from its wheel, beside fused_critic.integrations.sb3."""

from __future__ import annotations

import sys
import types
from types import SimpleNamespace

import numpy as np
import peers
import pytest
import torch
from fused_critic.integrations import _adapter
from fused_critic.integrations import sb3 as fused_sb3
from torch.nn import functional as F

TRAINER = "stable_baselines3"
GAMMA, LAM = 0.99, 0.95
SHAPES = [(64, 4), (1, 1), (1, 3), (2048, 1), (257, 8), (5, 300)]


class BaseBuffer:
    """What RolloutBuffer uses of its base class: observations of three numbers, one action."""

    def __init__(self, buffer_size, observation_space, action_space, device="auto", n_envs=1):
        self.buffer_size, self.n_envs = buffer_size, n_envs
        self.observation_space, self.obs_shape, self.action_dim = observation_space, observation_space.shape, 1
        self.action_space = action_space

    def reset(self):
        self.pos, self.full = 0, False


class DictSpace(dict):
    shape = property(lambda self: {key: space.shape for key, space in self.items()})


SPACE = SimpleNamespace(shape=(3,), dtype=np.float32)


@pytest.fixture(scope="module")
def sb3():
    """SB3's own classes and functions."""
    scope = dict(np=np, th=torch, BaseBuffer=BaseBuffer)
    buffers = peers.functions(TRAINER, "stable_baselines3/common/buffers.py", ["RolloutBuffer", "DictRolloutBuffer"], **scope)
    utils = peers.functions(TRAINER, "stable_baselines3/common/utils.py", ["explained_variance"], np=np)
    return SimpleNamespace(**vars(buffers), **vars(utils), value_loss=value_loss_of_train())


def value_loss_of_train():
    """The statements of PPO.train() that compute the value loss, as a function with the signature of ours."""
    code = peers.statements(TRAINER, "stable_baselines3/ppo/ppo.py", "if self.clip_range_vf is None", "value_loss = ")

    def value_loss(values, old_values, returns, clip_range_vf=None):
        scope = dict(th=torch, F=F, values=values, clip_range_vf=clip_range_vf)
        scope.update(
            self=SimpleNamespace(clip_range_vf=clip_range_vf), rollout_data=SimpleNamespace(old_values=old_values, returns=returns)
        )
        exec(code, scope)
        return scope["value_loss"]

    return value_loss


def filled(cls, shape, seed=0, gamma=GAMMA, lam=LAM, dtype=np.float32, space=SPACE):
    """A full buffer, last_values and dones: what collect_rollouts() leaves."""
    steps, envs = shape
    random = np.random.default_rng(seed)
    buffer = cls(steps, space, SPACE, "cpu", gae_lambda=lam, gamma=gamma, n_envs=envs)
    buffer.rewards, buffer.values = (random.normal(size=shape).astype(dtype) for _ in range(2))
    buffer.episode_starts = (random.random(shape) < 0.1).astype(dtype)
    buffer.episode_starts[0] = 1
    buffer.advantages = np.zeros(shape, dtype)
    return buffer, torch.from_numpy(random.normal(size=(envs, 1)).astype(dtype)), random.random(envs) < 0.5


def computed(buffer, last_values, dones, compute):
    compute(buffer, last_values, dones)
    return torch.from_numpy(buffer.advantages), torch.from_numpy(buffer.returns)


# --- the same results -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma, lam", [(GAMMA, LAM), (1.0, 1.0), (0.9, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "dtype, rtol, atol, suffix", [(np.float32, 1e-6, 4e-6, ""), (np.float64, 1e-13, 1e-13, ", float64")], ids=["float32", "float64"]
)
def test_buffer(sb3, parity, shape, dtype, rtol, atol, suffix, gamma, lam):
    # atol: a few last bits of the advantages, which are up to 20 with these data, and up to 200 undiscounted.
    atol *= 10 if gamma * lam == 1 else 1
    arguments = dict(shape=shape, gamma=gamma, lam=lam, dtype=dtype)
    theirs = computed(*filled(sb3.RolloutBuffer, **arguments), sb3.RolloutBuffer.compute_returns_and_advantage)
    buffer, last_values, dones = filled(sb3.RolloutBuffer, **arguments)
    held = buffer.advantages
    ours = computed(buffer, last_values, dones, fused_sb3.compute_returns_and_advantage)
    assert buffer.advantages is held, "SB3 writes them in place"
    for what, got, expected in zip(("advantages", "returns"), ours, theirs):
        assert got.dtype == expected.dtype
        parity.same(TRAINER, "RolloutBuffer.compute_returns_and_advantage", what + suffix, got, expected, rtol=rtol, atol=atol)


def test_time_limit(sb3, parity):
    """collect_rollouts() adds gamma V(terminal observation) to the reward of a step that the time limit cut off, and marks an end."""
    results = []
    for compute in (sb3.RolloutBuffer.compute_returns_and_advantage, fused_sb3.compute_returns_and_advantage):
        buffer, last_values, dones = filled(sb3.RolloutBuffer, (40, 3))
        buffer.rewards[11, 1] += GAMMA * 7.0
        buffer.episode_starts[12, 1] = 1
        results.append(computed(buffer, last_values, dones, compute))
    for what, got, expected in zip(("advantages", "returns"), *reversed(results)):
        parity.same(TRAINER, "RolloutBuffer.compute_returns_and_advantage", what, got, expected, rtol=1e-6, atol=4e-6)
    assert results[1][1][11, 1] == pytest.approx(float(buffer.rewards[11, 1])), "nothing of the next episode"


@pytest.mark.parametrize("form", ["[N]", "[N, 1]", "float64", "float dones", "column-major"])
def test_forms_of_the_arguments(sb3, form):
    buffer, last_values, dones = filled(sb3.RolloutBuffer, (16, 5))
    expected = computed(buffer, last_values, dones, sb3.RolloutBuffer.compute_returns_and_advantage)
    buffer, last_values, dones = filled(sb3.RolloutBuffer, (16, 5))
    if form == "[N]":
        last_values = last_values.flatten()
    elif form == "float64":
        last_values = last_values.double()
    elif form == "float dones":
        dones = dones.astype(np.float32)
    elif form == "column-major":
        buffer.rewards, buffer.values = np.asfortranarray(buffer.rewards), np.asfortranarray(buffer.values)
    ours = computed(buffer, last_values, dones, fused_sb3.compute_returns_and_advantage)
    assert [x.dtype for x in ours] == [torch.float32] * 2
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("clip_range_vf", [None, 0.2, 0.05, 10.0])
@pytest.mark.parametrize("shape", [(64,), (1,), (2048,)], ids=str)
@pytest.mark.parametrize(
    "dtype, rtol, atol, suffix", [(torch.float32, 1e-5, 1e-6, ""), (torch.float64, 1e-13, 1e-13, ", float64")], ids=["float32", "float64"]
)
def test_value_loss(sb3, parity, shape, clip_range_vf, dtype, rtol, atol, suffix):
    generator = torch.Generator().manual_seed(0)
    old_values, noise, returns = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3))
    results = []
    for value_loss in (fused_sb3.value_loss, sb3.value_loss):
        values = (old_values + 0.2 * noise).requires_grad_()
        loss = value_loss(values, old_values, returns, clip_range_vf)
        (gradient,) = torch.autograd.grad(0.5 * loss, values)
        results.append((loss, gradient))
    for what, got, expected in zip(("loss", "gradient"), *results):
        assert got.dtype == expected.dtype
        parity.same(TRAINER, "PPO.train, value loss", what + suffix, got, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    "dtype, rtol, atol, suffix", [(np.float32, 1e-5, 1e-6, ""), (np.float64, 1e-12, 1e-12, ", float64")], ids=["float32", "float64"]
)
def test_explained_variance(sb3, parity, dtype, rtol, atol, suffix):
    random = np.random.default_rng(0)
    true = (3 + random.normal(size=4096)).astype(dtype)
    pred = (true + 0.3 * random.normal(size=4096)).astype(dtype)
    for y_pred in (pred, true, -pred):
        ours, theirs = (explained_variance(y_pred, true) for explained_variance in (fused_sb3.explained_variance, sb3.explained_variance))
        assert isinstance(ours, float)
        parity.same(TRAINER, "explained_variance", "value" + suffix, ours, theirs, rtol=rtol, atol=atol)
    constant = np.full(16, 2.5, dtype)
    assert np.isnan(sb3.explained_variance(pred[:16], constant)) and np.isnan(fused_sb3.explained_variance(pred[:16], constant))


# --- differences on purpose -------------------------------------------------------------------------------------------------------


def test_difference_nan_after_the_end_of_an_episode(sb3, parity):
    results = []
    for compute in (sb3.RolloutBuffer.compute_returns_and_advantage, fused_sb3.compute_returns_and_advantage):
        buffer, last_values, dones = filled(sb3.RolloutBuffer, (16, 2))
        last_values[0], dones[0] = float("nan"), True
        results.append(computed(buffer, last_values, dones, compute)[0])
    theirs, ours = results
    assert theirs[:, 0].isnan().all()
    assert ours.isfinite().all()
    torch.testing.assert_close(ours[:, 1], theirs[:, 1])
    parity.differs(
        TRAINER,
        "RolloutBuffer.compute_returns_and_advantage",
        "NaN as the value after an end",
        theirs="all earlier steps NaN",
        ours="not used",
    )


def test_difference_fractional_ends(sb3, parity):
    results = []
    for starts in (0.5, 1.0):
        for compute in (sb3.RolloutBuffer.compute_returns_and_advantage, fused_sb3.compute_returns_and_advantage):
            buffer, last_values, dones = filled(sb3.RolloutBuffer, (16, 2))
            buffer.episode_starts[8] = starts
            results.append(computed(buffer, last_values, dones, compute)[0])
    theirs_half, ours_half, theirs, ours = results
    assert not torch.allclose(theirs_half[7], theirs[7])
    assert torch.equal(ours_half, ours)
    parity.differs(TRAINER, "RolloutBuffer.compute_returns_and_advantage", "fractional ends of episodes", theirs="blended", ours="an end")


@pytest.mark.parametrize("name", ["gamma", "gae_lambda"])
def test_difference_discounts_above_one(sb3, parity, name):
    buffer, last_values, dones = filled(sb3.RolloutBuffer, (16, 2))
    setattr(buffer, name, 1.01)
    assert computed(buffer, last_values, dones, sb3.RolloutBuffer.compute_returns_and_advantage)[0].isfinite().all()
    with pytest.raises(ValueError, match="gamma" if name == "gamma" else "lam"):
        fused_sb3.compute_returns_and_advantage(buffer, last_values, dones)
    parity.differs(TRAINER, "RolloutBuffer.compute_returns_and_advantage", "gamma or lambda above 1", theirs="accepted", ours="ValueError")


def test_difference_last_values_that_require_grad(sb3, parity):
    buffer, last_values, dones = filled(sb3.RolloutBuffer, (16, 2))
    expected = computed(buffer, last_values, dones, fused_sb3.compute_returns_and_advantage)[0].clone()
    last_values.requires_grad_()
    with pytest.raises(RuntimeError, match="grad"):
        sb3.RolloutBuffer.compute_returns_and_advantage(buffer, last_values, dones)
    assert torch.equal(computed(buffer, last_values, dones, fused_sb3.compute_returns_and_advantage)[0], expected)
    parity.differs(
        TRAINER, "RolloutBuffer.compute_returns_and_advantage", "last_values that require grad", theirs="RuntimeError", ours="detached"
    )


def test_difference_a_value_inside_of_the_range_is_not_moved(sb3, parity):
    """The value is its return, and the range is wide: the loss is 0. By way of old + (new - old) it is not."""
    generator = torch.Generator().manual_seed(0)
    old_values, values = torch.randn(4096, generator=generator), torch.randn(4096, generator=generator)
    theirs, ours = sb3.value_loss(values, old_values, values, 100.0), fused_sb3.value_loss(values, old_values, values, 100.0)
    assert 0 < theirs < 1e-13
    assert ours == 0
    parity.differs(TRAINER, "PPO.train, value loss", "values inside of the range", theirs="moved by a last bit", ours="not moved")


def test_difference_half_precision(sb3, parity):
    """In bfloat16 100 + 0.2 is 100: the range has no width."""
    values, old_values, returns = (torch.full((8,), x, dtype=torch.bfloat16) for x in (100.5, 100.0, 104.0))
    theirs, ours = sb3.value_loss(values, old_values, returns, 0.2), fused_sb3.value_loss(values, old_values, returns, 0.2)
    assert theirs == 16
    torch.testing.assert_close(ours, torch.tensor(3.8**2))
    parity.differs(TRAINER, "PPO.train, value loss", "bfloat16 throughout", theirs="no range where values are large", ours="float32")


@pytest.mark.parametrize("step", [0.5, -0.5])
def test_difference_gradient_on_a_bound(sb3, parity, step):
    """Theirs is what torch.clamp gives at its bound, which has changed with torch's versions; ours is always the whole gradient."""
    gradients = []
    for value_loss in (sb3.value_loss, fused_sb3.value_loss):
        values = torch.tensor([1.0 + step], requires_grad=True)
        gradients.append(torch.autograd.grad(value_loss(values, torch.tensor([1.0]), torch.tensor([4.0]), 0.5), values)[0].item())
    bound = torch.tensor([step], requires_grad=True)
    (passed,) = torch.autograd.grad(bound.clamp(-0.5, 0.5), bound)
    whole = 2 * (1.0 + step - 4.0)
    assert gradients == [whole * passed.item(), whole]
    parity.differs(TRAINER, "PPO.train, value loss", "gradient on a bound of the range", theirs="torch.clamp's", ours="the whole gradient")


def test_difference_returns_and_old_values_are_constants(sb3, parity):
    values, old_values, returns = torch.randn(3, 8)
    for index in (1, 2):
        arguments = [x.clone().requires_grad_(i == index) for i, x in enumerate((values, old_values, returns))]
        assert torch.autograd.grad(sb3.value_loss(*arguments, 1.0), arguments[index])[0].any()
        with pytest.raises(ValueError, match="requires_grad"):
            fused_sb3.value_loss(*arguments, 1.0)
    parity.differs(
        TRAINER, "PPO.train, value loss", "returns or old values that require grad", theirs="gradient passed on", ours="ValueError"
    )


# --- install ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def installable(sb3, monkeypatch):
    """SB3 of empty packages around its own buffers."""
    for name in ("stable_baselines3", "stable_baselines3.common", "stable_baselines3.common.buffers"):
        module = types.ModuleType(name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    buffers = sys.modules["stable_baselines3.common.buffers"]
    buffers.RolloutBuffer, buffers.DictRolloutBuffer = sb3.RolloutBuffer, sb3.DictRolloutBuffer
    yield buffers
    fused_sb3.uninstall()


def test_signature_is_theirs(sb3):
    theirs = sb3.RolloutBuffer.compute_returns_and_advantage
    assert _adapter.signature_of(theirs) == _adapter.signature_of(fused_sb3.compute_returns_and_advantage)


def test_install_reaches_subclasses_and_instances(installable):
    theirs = installable.RolloutBuffer.compute_returns_and_advantage
    plain, last_values, dones = filled(installable.RolloutBuffer, (16, 2))
    nested = filled(installable.DictRolloutBuffer, (16, 2), space=DictSpace(state=SPACE))[0]
    plain.compute_returns_and_advantage(last_values, dones)
    expected = plain.returns.copy()
    with fused_sb3.install():
        for buffer in (plain, nested):
            assert buffer.compute_returns_and_advantage.__func__ is fused_sb3.compute_returns_and_advantage
            buffer.compute_returns_and_advantage(last_values, dones)
            np.testing.assert_allclose(buffer.returns, expected, rtol=1e-6, atol=4e-6)
    assert installable.RolloutBuffer.compute_returns_and_advantage is theirs
    assert "compute_returns_and_advantage" not in vars(installable.DictRolloutBuffer)


def test_install_refuses_another_signature(installable, monkeypatch):
    def other(self, last_values, dones, episode_starts):
        pass

    monkeypatch.setattr(installable.RolloutBuffer, "compute_returns_and_advantage", other)
    with pytest.raises(RuntimeError, match="episode_starts"):
        fused_sb3.install()
    assert installable.RolloutBuffer.compute_returns_and_advantage is other


def test_the_pages_snippets_run(installable):
    space = {}
    for snippet in peers.snippets("sb3"):
        exec(snippet, space)
    assert space["values"].grad.any() and np.isfinite(space["explained"])
