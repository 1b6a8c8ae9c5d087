"""fused_critic.integrations.rsl_rl beside rsl_rl's own code, out of its wheel.

Methods and lines are executed from the source; whole iterations of the real OnPolicyRunner train a small environment with and without
install(). Stand-ins: TensorDict (below), tensorboard and git.
"""

from __future__ import annotations

from types import SimpleNamespace

import peers
import pytest
import torch
from fused_critic.integrations import _adapter
from fused_critic.integrations import rsl_rl as fused_rsl_rl
from hypothesis import given
from rollouts import ENDS, GAMMA, LAM, SHAPES, inside_the_range, loss_and_gradient, minibatch, near_constant, rollout, rollouts
from wheel_import import SilentWriter, importable

CLIP = 0.3
PPO = "rsl_rl/algorithms/ppo.py"


@pytest.fixture(scope="module")
def theirs():
    return peers.functions("rsl_rl_lib", PPO, ["PPO.compute_returns", "PPO.process_env_step"], torch=torch)


def algorithm(d, gamma=GAMMA, lam=LAM, per_mini_batch=False):
    """What compute_returns() reads of a PPO: its storage, its critic, its numbers. The critic has a hidden state, which a call changes."""
    t, n = d.rewards.shape
    storage = SimpleNamespace(
        num_transitions_per_env=t, rewards=d.rewards[..., None].clone(), values=d.values[..., None].clone(),
        dones=d.ends[..., None].to(torch.uint8), returns=torch.full((t, n, 1), torch.nan, dtype=d.rewards.dtype), advantages=None,
    )  # fmt: skip
    return SimpleNamespace(
        storage=storage, critic=Critic(d.last_values[:, None]), gamma=gamma, lam=lam, normalize_advantage_per_mini_batch=per_mini_batch
    )


class Critic:
    def __init__(self, last_values):
        self.last_values, self.hidden_state = last_values.requires_grad_(), "after the rollout"

    def get_hidden_state(self):
        return self.hidden_state

    def __call__(self, obs):
        self.hidden_state = "after the last observation"
        return self.last_values

    def reset(self, hidden_state):
        self.hidden_state = hidden_state


def returns_and_advantages(compute_returns, d, **options):
    alg = algorithm(d, **options)
    returns = alg.storage.returns
    assert compute_returns(alg, None) is None
    assert alg.storage.returns is returns and alg.critic.hidden_state == "after the rollout"
    assert not alg.storage.advantages.requires_grad
    return returns, alg.storage.advantages


def their_loss(values, old_values, returns, use_clipped_value_loss=True, clip_param=CLIP):
    scope = dict(
        self=SimpleNamespace(use_clipped_value_loss=use_clipped_value_loss, clip_param=clip_param), values=values,
        batch=SimpleNamespace(values=old_values, returns=returns), torch=torch,
    )  # fmt: skip
    exec(peers.statements("rsl_rl_lib", PPO, "if self.use_clipped_value_loss"), scope)
    return scope["value_loss"]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["float32", "float64"])
@pytest.mark.parametrize("per_mini_batch", [False, True], ids=["normalised", "raw"])
@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compute_returns(parity, theirs, shape, ends, per_mini_batch, dtype, tolerance):
    d = rollout(*shape, ENDS[ends](*shape), dtype)
    ours = returns_and_advantages(fused_rsl_rl.compute_returns, d, per_mini_batch=per_mini_batch)
    expected = returns_and_advantages(theirs.compute_returns, d, per_mini_batch=per_mini_batch)
    assert [(x.shape, x.dtype) for x in ours] == [(x.shape, x.dtype) for x in expected]
    single = shape == (1, 1) and not per_mini_batch  # test_difference_single_advantage
    for name, a, b in list(zip(("returns", "advantages"), ours, expected))[: 1 if single else 2]:
        parity.same("rsl_rl_lib", "PPO.compute_returns", f"{name}, {str(dtype)[6:]}", a, b, rtol=tolerance, atol=tolerance)


@given(d=rollouts())
def test_compute_returns_of_any_rollout(theirs, d):
    options = dict(gamma=d.gamma, lam=d.lam, per_mini_batch=True)
    ours = returns_and_advantages(fused_rsl_rl.compute_returns, d, **options)
    torch.testing.assert_close(ours, returns_and_advantages(theirs.compute_returns, d, **options), **d.tolerance)


def test_a_flag_gates_its_own_step():
    """done[t], not done[t + 1]: the last one keeps the value behind the rollout out."""
    d = rollout(6, 2, ENDS["no end"](6, 2))
    expected = returns_and_advantages(fused_rsl_rl.compute_returns, d)[0]
    d.ends = torch.zeros(6, 2, dtype=torch.bool)
    d.ends[-1, 0] = True
    returns = returns_and_advantages(fused_rsl_rl.compute_returns, d)[0]
    assert returns[-1, 0, 0] == d.rewards[-1, 0]
    torch.testing.assert_close(returns[:, 1], expected[:, 1], rtol=0, atol=0)


def test_time_outs(parity, theirs):
    """The real process_env_step() adds gamma V_t where an episode was cut off; both then see it as ended."""
    d = rollout(24, 6, ENDS["several per column"](24, 6))
    time_outs = d.ends & (torch.rand(24, 6, generator=torch.Generator().manual_seed(3)) < 0.5)
    recorded = []
    alg = SimpleNamespace(
        transition=SimpleNamespace(clear=lambda: None), rnd=None, gamma=GAMMA, device="cpu",
        storage=SimpleNamespace(add_transition=lambda transition: recorded.append(transition.rewards)),
        actor=SimpleNamespace(reset=lambda dones: None), critic=SimpleNamespace(reset=lambda dones: None),
    )  # fmt: skip
    for t in range(24):
        alg.transition.values = d.values[t, :, None]
        theirs.process_env_step(alg, None, d.rewards[t], d.ends[t], {"time_outs": time_outs[t]})
    rewards = torch.stack(recorded)
    torch.testing.assert_close(rewards, d.rewards + GAMMA * d.values * time_outs)
    d.rewards = rewards
    ours, expected = (returns_and_advantages(f, d) for f in (fused_rsl_rl.compute_returns, theirs.compute_returns))
    for name, a, b in zip(("returns", "advantages"), ours, expected):
        parity.same("rsl_rl_lib", "PPO.compute_returns", f"{name} with time-outs", a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["float32", "float64"])
@pytest.mark.parametrize("clipped", [True, False], ids=["clipped", "unclipped"])
@pytest.mark.parametrize("shape", [(1, 1), (512, 1), (24, 6, 1)], ids=str)
def test_value_loss(parity, shape, clipped, dtype, tolerance):
    values, *constants = minibatch(*shape, dtype=dtype)
    ours = loss_and_gradient(fused_rsl_rl.value_loss(values, *constants, CLIP, clipped), values)
    expected = loss_and_gradient(their_loss(values, *constants, clipped), values)
    for name, a, b in zip(("loss", "gradient"), ours, expected):
        assert a.dtype == b.dtype == dtype
        parity.same("rsl_rl_lib", "value_loss", f"{name}, {str(dtype)[6:]}", a, b, rtol=10 * tolerance, atol=tolerance / values.numel())


# --- the differences on purpose: rsl_rl's side first, then ours -------------------------------------------------------------------


def test_difference_single_advantage(parity, theirs):
    d = rollout(1, 1, ENDS["no end"](1, 1))
    assert returns_and_advantages(theirs.compute_returns, d)[1].isnan().all()
    assert (returns_and_advantages(fused_rsl_rl.compute_returns, d)[1] == 0).all()
    parity.differs("rsl_rl_lib", "PPO.compute_returns", "normalising a single advantage", theirs="NaN", ours="0")


def test_difference_equal_advantages(parity, theirs):
    """Rewards of 0.1, values of 0, every step an end: all advantages are 0.1, whose mean in float32 is another number."""
    d = rollout(1000, 1, ENDS["every step"](1000, 1))
    d.rewards, d.values = near_constant(1000)[:, None], torch.zeros(1000, 1)
    assert (returns_and_advantages(theirs.compute_returns, d)[1].abs() > 0.1).all()
    assert (returns_and_advantages(fused_rsl_rl.compute_returns, d)[1] == 0).all()
    parity.differs("rsl_rl_lib", "PPO.compute_returns", "equal advantages", theirs="rounding, blown up to 0.4", ours="0")


def test_difference_gamma_beside_float64(parity, theirs):
    """1 - dones is float32 there, whatever the buffers are, and so is its product with gamma."""
    d = rollout(2, 1, ENDS["no end"](2, 1), torch.float64)
    exact = d.rewards[1, 0] + 0.99 * d.last_values[0]
    assert 1e-10 < abs(returns_and_advantages(theirs.compute_returns, d, gamma=0.99)[0][1, 0, 0] - exact) < 1e-6
    assert abs(returns_and_advantages(fused_rsl_rl.compute_returns, d, gamma=0.99)[0][1, 0, 0] - exact) < 1e-15
    parity.differs("rsl_rl_lib", "PPO.compute_returns", "float64 buffers", theirs="gamma rounded to float32", ours="gamma in float64")


def test_difference_discount_above_one(parity, theirs):
    d = rollout(4, 2, ENDS["no end"](4, 2))
    assert returns_and_advantages(theirs.compute_returns, d, gamma=1.01)[0].isfinite().all()
    with pytest.raises(ValueError, match="gamma"):
        returns_and_advantages(fused_rsl_rl.compute_returns, d, gamma=1.01)
    parity.differs("rsl_rl_lib", "PPO.compute_returns", "gamma or lambda outside of [0, 1]", theirs="accepted", ours="error")


def test_difference_values_inside_the_range(parity):
    values, old = inside_the_range(512, 1, clip=CLIP)
    returns = values.detach().clone()
    assert 0 < their_loss(values, old, returns) < 1e-12
    assert fused_rsl_rl.value_loss(values, old, returns, CLIP) == 0
    parity.differs("rsl_rl_lib", "value_loss", "values inside the clip range", theirs="moved by a last bit", ours="the value itself")


def test_difference_gradient_at_ties(parity):
    """Clip range 0.5 around 0.5: the return half way between the value and the clipped one."""
    values, old, returns = torch.tensor([[1.5]], requires_grad=True), torch.tensor([[0.5]]), torch.tensor([[1.25]])
    expected = loss_and_gradient(their_loss(values, old, returns, clip_param=0.5), values)
    ours = loss_and_gradient(fused_rsl_rl.value_loss(values, old, returns, 0.5), values)
    assert ours[0] == expected[0] and expected[1] == 0.25 and ours[1] == 0.5
    parity.differs("rsl_rl_lib", "value_loss", "tie of the two losses", theirs="half the gradient", ours="the whole gradient")


def test_difference_gradient_on_a_bound(parity):
    """Clip range 0.5 around 0.5: the value on the bound. Whether clamp passes the gradient there depends on torch's version."""
    values, old, returns = torch.tensor([[1.0]], requires_grad=True), torch.tensor([[0.5]]), torch.tensor([[3.0]])
    expected = loss_and_gradient(their_loss(values, old, returns, clip_param=0.5), values)
    ours = loss_and_gradient(fused_rsl_rl.value_loss(values, old, returns, 0.5), values)
    assert ours[0] == expected[0] and -4 <= expected[1] <= -2 and ours[1] == -4
    parity.differs("rsl_rl_lib", "value_loss", "bounds of the range", theirs="half the gradient or all, by torch's version", ours="all")


def test_difference_empty_minibatch(parity):
    values, *constants = minibatch(0, 1)
    assert their_loss(values, *constants).isnan()
    loss, gradient = loss_and_gradient(fused_rsl_rl.value_loss(values, *constants, CLIP), values)
    assert loss == 0 and gradient.shape == (0, 1)
    parity.differs("rsl_rl_lib", "value_loss", "empty mini-batch", theirs="loss NaN", ours="loss 0")


def test_difference_constants_and_broadcasting(parity):
    values, old, returns = minibatch(5, 1)
    assert torch.autograd.grad(their_loss(values, old, returns.requires_grad_()), returns)[0].any()
    with pytest.raises(ValueError, match="requires_grad"):
        fused_rsl_rl.value_loss(values, old, returns, CLIP)
    flat = returns.detach()[:, 0]
    assert their_loss(values, old, flat).isfinite()
    with pytest.raises(ValueError, match="one shape"):
        fused_rsl_rl.value_loss(values, old, flat, CLIP)
    parity.differs("rsl_rl_lib", "value_loss", "returns that require grad", theirs="gradient passed on", ours="error")
    parity.differs("rsl_rl_lib", "value_loss", "[B] beside [B, 1]", theirs="broadcast to [B, B]", ours="error")


def test_difference_half_precision(parity):
    """In bf16, 100 + 0.2 is 100: the range has no width."""
    values, old, returns = (torch.full((3, 1), x, dtype=torch.bfloat16) for x in (100.5, 100.0, 104.0))
    expected, ours = their_loss(values, old, returns, clip_param=0.2), fused_rsl_rl.value_loss(values, old, returns, 0.2)
    assert (expected.dtype, ours.dtype) == (torch.bfloat16, torch.float32)
    assert expected == 4.0**2 and ours.item() == pytest.approx(3.8**2, rel=1e-5)
    parity.differs("rsl_rl_lib", "value_loss", "bf16 throughout", theirs="computed in bf16", ours="computed in float32")


# --- the real trainer -------------------------------------------------------------------------------------------------------------


class TensorDict(dict):
    """What rsl_rl uses of tensordict's."""

    def __init__(self, data, batch_size=None, device=None):
        super().__init__(data)
        self.batch_size = batch_size if batch_size is not None else next(iter(data.values())).shape[:1]

    def _each(self, function):
        return TensorDict({key: function(x) for key, x in self.items()})

    def __getitem__(self, key):
        return dict.__getitem__(self, key) if isinstance(key, str) else self._each(lambda x: x[key])

    def copy_(self, other):
        for key, x in self.items():
            x.copy_(other[key])

    def flatten(self, *dims):
        return self._each(lambda x: x.flatten(*dims))

    def to(self, device):
        return self


class Environment:
    """A point in the plane that is to be held at the origin; it ends far away, and is cut off after nine steps."""

    num_envs, num_actions, max_episode_length, device, cfg = 16, 2, 9, "cpu", {}

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)
        self.position = torch.randn(self.num_envs, 2, generator=self.generator)
        self.episode_length_buf = torch.arange(self.num_envs) % self.max_episode_length

    def get_observations(self):
        return TensorDict({"policy": self.position.clone()})

    def step(self, actions):
        self.position = self.position + 0.3 * actions.clamp(-2, 2)
        self.episode_length_buf += 1
        rewards = -self.position.norm(dim=1)
        time_outs = self.episode_length_buf >= self.max_episode_length
        dones = time_outs | (rewards < -3)
        self.position = torch.where(dones[:, None], torch.randn(self.num_envs, 2, generator=self.generator), self.position)
        self.episode_length_buf[dones] = 0
        return self.get_observations(), rewards, dones, {"time_outs": time_outs}


def configuration():
    model = {"class_name": "rsl_rl.models:MLPModel", "hidden_dims": [16], "activation": "elu"}
    return {
        "algorithm": {"class_name": "rsl_rl.algorithms:PPO", "schedule": "fixed", "num_learning_epochs": 2, "num_mini_batches": 2},
        "actor": {**model, "distribution_cfg": {"class_name": "rsl_rl.modules:GaussianDistribution"}},
        "critic": dict(model),
        "obs_groups": {"actor": ["policy"], "critic": ["policy"]},
        "num_steps_per_env": 12,
        "save_interval": 100,
        "run_name": "",
    }


@pytest.fixture(scope="module")
def real():
    stand_ins = {"tensordict": {"TensorDict": TensorDict}, "git": {}, "torch.utils.tensorboard": {"SummaryWriter": SilentWriter}}
    with importable("rsl_rl_lib", stand_ins):
        yield
    fused_rsl_rl.uninstall()


def train(install, **algorithm):
    """The parameters after three iterations, by the page's snippet, which installs; or without installing. `algorithm`: of its settings."""
    (snippet,) = peers.snippets("rsl_rl")
    lines = [line for line in snippet.splitlines() if install or "fused_rsl_rl" not in line]
    torch.manual_seed(0)
    scope = dict(env=Environment(), train_cfg=configuration())
    scope["train_cfg"]["algorithm"].update(algorithm)
    exec("\n".join(lines), scope)
    alg = scope["runner"].alg
    assert (type(alg).compute_returns is fused_rsl_rl.compute_returns) == install
    fused_rsl_rl.uninstall()
    return torch.cat([p.detach().flatten() for p in (*alg.actor.parameters(), *alg.critic.parameters())])


def test_the_page_trains_the_real_runner(parity, real):
    ours, expected = train(install=True), train(install=False)
    # Adam divides by gradients' sizes, so that rounding shows wherever a gradient is small.
    parity.same("rsl_rl_lib", "OnPolicyRunner.learn", "parameters after 3 iterations", ours, expected, rtol=1e-4, atol=1e-5)
    assert (train(install=False) == expected).all()
    assert (train(install=False, lam=0.9) - expected).abs().max() > 1e-3, "another critic has to make a difference here"


def test_install_and_uninstall(real):
    from rsl_rl.algorithms.ppo import PPO

    own = PPO.compute_returns

    class Subclass(PPO):
        pass

    assert [finding.fits for finding in fused_rsl_rl.ADAPTER.examine()] == [True]
    with fused_rsl_rl.install():
        assert PPO.compute_returns is Subclass.compute_returns is fused_rsl_rl.compute_returns
    assert PPO.compute_returns is Subclass.compute_returns is own
    assert _adapter.signature_of(own) == _adapter.signature_of(fused_rsl_rl.compute_returns)


def test_install_refuses_another_signature(real, monkeypatch):
    from rsl_rl.algorithms.ppo import PPO

    def compute_returns(self, last_critic_obs):
        pass

    monkeypatch.setattr(PPO, "compute_returns", compute_returns)
    with pytest.raises(RuntimeError, match=r"(?s)last_critic_obs.*obs"):
        fused_rsl_rl.install()
    assert PPO.compute_returns is compute_returns
