"""fused_critic.integrations.skrl beside skrl's own code, out of its wheel.

Functions and lines are executed from the source; skrl's real trainer trains Pendulum with its real PPO, with and without install(). The stand-in:
skrl's writer of tensorboard files.
"""

from __future__ import annotations

import importlib
import logging
from types import SimpleNamespace

import gymnasium
import peers
import pytest
import torch
import torch.nn.functional as F
from fused_critic.integrations import _adapter
from fused_critic.integrations import skrl as fused_skrl
from hypothesis import given
from rollouts import ENDS, GAMMA, LAM, SHAPES, inside_the_range, loss_and_gradient, minibatch, near_constant, rollout, rollouts
from wheel_import import SilentWriter, importable

CLIP, SCALE = 0.3, 2.5
AGENTS = ["agents/torch/a2c/a2c", "agents/torch/amp/amp", "agents/torch/ppo/ppo", "agents/torch/rpo/rpo", "agents/torch/trpo/trpo",
          "multi_agents/torch/ippo/ippo", "multi_agents/torch/mappo/mappo"]  # fmt: skip
RNN_AGENTS = ["agents/torch/a2c/a2c_rnn", "agents/torch/ppo/ppo_rnn", "agents/torch/rpo/rpo_rnn", "agents/torch/trpo/trpo_rnn"]
WITH_THE_LINES_OF_THE_LOSS = [x for x in AGENTS + RNN_AGENTS if x.rsplit("/", 1)[1].startswith(("ppo", "rpo", "amp"))]


def their_gae(agent):
    return peers.functions("skrl", f"skrl/{agent}.py", ["compute_gae"], torch=torch).compute_gae


@pytest.fixture(scope="module")
def theirs():
    return their_gae("agents/torch/ppo/ppo")


def memory(d):
    """The tensors of skrl's memory."""
    truncated = ~d.ends & (torch.rand(d.ends.shape, generator=torch.Generator().manual_seed(5)) < 0.3)
    return dict(
        rewards=d.rewards[..., None], values=d.values[..., None], terminated=d.ends[..., None], truncated=truncated[..., None],
        last_values=d.last_values[:, None],
    )  # fmt: skip


def without_truncation(tensors):
    return {"next_values" if name == "last_values" else name: x for name, x in tensors.items() if name != "truncated"}


def numbers(gamma=GAMMA, lam=LAM):
    return dict(discount_factor=gamma, lambda_coefficient=lam)


def their_loss(predicted_values, sampled_values, sampled_returns, value_clip=CLIP, agent="agents/torch/ppo/ppo"):
    scope = dict(
        self=SimpleNamespace(cfg=SimpleNamespace(value_clip=value_clip, value_loss_scale=SCALE)), predicted_values=predicted_values,
        sampled_values=sampled_values, sampled_returns=sampled_returns, torch=torch, F=F,
    )  # fmt: skip
    exec(peers.statements("skrl", f"skrl/{agent}.py", "if self.cfg.value_clip > 0", "value_loss = "), scope)
    return scope["value_loss"]


def our_loss(*tensors, value_clip=CLIP):
    return fused_skrl.value_loss(*tensors, value_clip, SCALE)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["float32", "float64"])
@pytest.mark.parametrize("time_limit_bootstrap", [False, True], ids=["terminated", "terminated or truncated"])
@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compute_gae(parity, theirs, shape, ends, time_limit_bootstrap, dtype, tolerance):
    arguments = dict(memory(rollout(*shape, ENDS[ends](*shape), dtype)), **numbers(), time_limit_bootstrap=time_limit_bootstrap)
    ours, expected = fused_skrl.compute_gae(**arguments), theirs(**arguments)
    assert [(x.shape, x.dtype) for x in ours] == [(x.shape, x.dtype) for x in expected]
    single = shape == (1, 1)  # test_difference_single_advantage
    for name, a, b in list(zip(("returns", "advantages"), ours, expected))[: 1 if single else 2]:
        parity.same("skrl", "compute_gae", f"{name}, {str(dtype)[6:]}", a, b, rtol=tolerance, atol=tolerance)


def test_defaults(theirs):
    tensors = memory(rollout(24, 6, ENDS["several per column"](24, 6)))
    torch.testing.assert_close(fused_skrl.compute_gae(**tensors), theirs(**tensors), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_compute_gae_of_recurrent_agents(parity, shape, ends):
    arguments = dict(without_truncation(memory(rollout(*shape, ENDS[ends](*shape)))), **numbers())
    ours, expected = fused_skrl.compute_gae_rnn(**arguments), their_gae("agents/torch/ppo/ppo_rnn")(**arguments)
    for name, a, b in zip(("returns", "advantages"), ours, expected):
        parity.same("skrl", "compute_gae (recurrent)", f"{name}, float32", a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("agent", AGENTS + RNN_AGENTS)
def test_every_agent_has_one_of_the_two(agent):
    ours = fused_skrl.compute_gae_rnn if agent in RNN_AGENTS else fused_skrl.compute_gae
    tensors, own = memory(rollout(24, 6, ENDS["several per column"](24, 6))), their_gae(agent)
    tensors = without_truncation(tensors) if agent in RNN_AGENTS else tensors
    torch.testing.assert_close(ours(**tensors), own(**tensors), rtol=1e-5, atol=1e-5)
    assert _adapter.signature_of(own) == _adapter.signature_of(ours)


@given(d=rollouts())
def test_compute_gae_of_any_rollout(theirs, d):
    arguments = dict(memory(d), truncated=d.mask[..., None], **numbers(d.gamma, d.lam), time_limit_bootstrap=True)
    ours, expected = fused_skrl.compute_gae(**arguments), theirs(**arguments)
    torch.testing.assert_close(ours[0], expected[0], **d.tolerance)
    if d.rewards.numel() > 1:
        torch.testing.assert_close(ours[1], expected[1], rtol=1e-9, atol=1e-9)


def test_a_flag_gates_its_own_step_and_truncation_only_with_bootstrap():
    """terminated[t], not [t + 1]; a truncated step goes on into the next episode unless time_limit_bootstrap is set."""
    d = rollout(6, 2, ENDS["last step"](6, 2))
    tensors = memory(d)
    returns, _ = fused_skrl.compute_gae(**tensors)
    torch.testing.assert_close(returns[-1], tensors["rewards"][-1])
    tensors["terminated"], tensors["truncated"] = torch.zeros_like(tensors["terminated"]), tensors["terminated"]
    torch.testing.assert_close(fused_skrl.compute_gae(**tensors, time_limit_bootstrap=True)[0], returns, rtol=0, atol=0)
    goes_on = tensors["rewards"][-1] + 0.99 * tensors["last_values"]
    torch.testing.assert_close(fused_skrl.compute_gae(**tensors)[0][-1], goes_on)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["float32", "float64"])
@pytest.mark.parametrize("value_clip", [CLIP, 0.0], ids=["clipped", "unclipped"])
@pytest.mark.parametrize("size", [1, 7, 512])
def test_value_loss(parity, size, value_clip, dtype, tolerance):
    values, *constants = minibatch(size, 1, dtype=dtype)
    ours = loss_and_gradient(our_loss(values, *constants, value_clip=value_clip), values)
    expected = loss_and_gradient(their_loss(values, *constants, value_clip=value_clip), values)
    for name, a, b in zip(("loss", "gradient"), ours, expected):
        assert a.dtype == b.dtype == dtype
        parity.same("skrl", "value_loss", f"{name}, {str(dtype)[6:]}", a, b, rtol=10 * tolerance, atol=tolerance / size)


@pytest.mark.parametrize("agent", WITH_THE_LINES_OF_THE_LOSS)
def test_every_agent_with_these_lines(agent):
    values, *constants = minibatch(40, 1)
    torch.testing.assert_close(our_loss(values, *constants), their_loss(values, *constants, agent=agent), rtol=1e-6, atol=0)


# --- the differences on purpose: skrl's side first, then ours ---------------------------------------------------------------------


def test_difference_single_advantage(parity, theirs):
    tensors = memory(rollout(1, 1, ENDS["no end"](1, 1)))
    assert theirs(**tensors)[1].isnan().all()
    assert (fused_skrl.compute_gae(**tensors)[1] == 0).all()
    parity.differs("skrl", "compute_gae", "a single advantage", theirs="NaN", ours="0")


def test_difference_equal_advantages(parity, theirs):
    """Rewards of 0.1, values of 0, every step an end: all advantages are 0.1, whose mean in float32 is another number."""
    tensors = memory(rollout(1000, 1, ENDS["every step"](1000, 1)))
    tensors.update(rewards=near_constant(1000)[:, None, None], values=torch.zeros(1000, 1, 1))
    assert (theirs(**tensors)[1].abs() > 0.1).all()
    assert (fused_skrl.compute_gae(**tensors)[1] == 0).all()
    parity.differs("skrl", "compute_gae", "equal advantages", theirs="rounding, blown up to 0.4", ours="0")


def test_small_advantages_are_scaled_as_there(parity, theirs):
    """The 1e-8 is added to the deviation, not to the variance: with a deviation of 1e-5 that would be a factor of ten."""
    tensors = memory(rollout(24, 6, ENDS["every step"](24, 6)))
    tensors.update(rewards=1e-5 * tensors["rewards"], values=torch.zeros(24, 6, 1))
    ours, expected = fused_skrl.compute_gae(**tensors)[1], theirs(**tensors)[1]
    assert 0.9 < expected.std() < 1.1
    parity.same("skrl", "compute_gae", "advantages of deviation 1e-5", ours, expected, rtol=1e-5, atol=1e-5)


def test_difference_discount_above_one(parity, theirs):
    tensors = memory(rollout(4, 2, ENDS["no end"](4, 2)))
    assert theirs(**tensors, discount_factor=1.01)[0].isfinite().all()
    with pytest.raises(ValueError, match="gamma"):
        fused_skrl.compute_gae(**tensors, discount_factor=1.01)
    parity.differs("skrl", "compute_gae", "gamma or lambda outside of [0, 1]", theirs="accepted", ours="error")


def test_difference_half_precision(parity, theirs):
    """Buffers of bfloat16: the same dtypes come out, of a recursion in float32 instead of bfloat16."""
    tensors = memory(rollout(130, 3, ENDS["no end"](130, 3)))
    half = {name: x.bfloat16() if x.is_floating_point() else x for name, x in tensors.items()}
    exact = theirs(**{name: x.double() if x.is_floating_point() else x for name, x in half.items()})[0]
    ours, expected = fused_skrl.compute_gae(**half), theirs(**half)
    assert [x.dtype for x in ours] == [x.dtype for x in expected] == [torch.bfloat16] * 2
    assert (ours[0] - exact).abs().max() < 0.5 * (expected[0] - exact).abs().max()
    torch.testing.assert_close(ours[0].double(), exact, rtol=2**-8, atol=1e-6)  # one rounding to bfloat16
    parity.differs("skrl", "compute_gae", "bf16 throughout", theirs="computed in bf16", ours="computed in float32, rounded once")


def test_difference_values_inside_the_range(parity):
    values, old = inside_the_range(512, 1, clip=CLIP)
    returns = values.detach().clone()
    assert 0 < their_loss(values, old, returns) < 1e-12
    assert our_loss(values, old, returns) == 0
    parity.differs("skrl", "value_loss", "values inside the clip range", theirs="moved by a last bit", ours="the value itself")


def test_difference_gradient_on_a_bound(parity):
    """Clip range 0.5 around 0.5: the value on the bound. Whether torch.clip passes the gradient there depends on torch's version."""
    values, old, returns = torch.tensor([[1.0]], requires_grad=True), torch.tensor([[0.5]]), torch.tensor([[3.0]])
    expected = loss_and_gradient(their_loss(values, old, returns, value_clip=0.5), values)
    ours = loss_and_gradient(our_loss(values, old, returns, value_clip=0.5), values)
    whole = -4 * SCALE
    assert ours[0] == expected[0] and expected[1] in (0, whole) and ours[1] == whole
    parity.differs("skrl", "value_loss", "bounds of the range", theirs="no gradient or all, by torch's version", ours="all")


def test_difference_empty_minibatch(parity):
    values, *constants = minibatch(0, 1)
    assert their_loss(values, *constants).isnan()
    loss, gradient = loss_and_gradient(our_loss(values, *constants), values)
    assert loss == 0 and gradient.shape == (0, 1)
    parity.differs("skrl", "value_loss", "empty mini-batch", theirs="loss NaN", ours="loss 0")


def test_difference_constants_and_broadcasting(parity):
    values, old, returns = minibatch(5, 1)
    assert torch.autograd.grad(their_loss(values, old, returns.requires_grad_()), returns)[0].any()
    with pytest.raises(ValueError, match="requires_grad"):
        our_loss(values, old, returns)
    flat = returns.detach()[:, 0]
    with pytest.warns(UserWarning, match="target size"):
        assert their_loss(values, old, flat).isfinite()
    with pytest.raises(ValueError, match="one shape"):
        our_loss(values, old, flat)
    parity.differs("skrl", "value_loss", "returns that require grad", theirs="gradient passed on", ours="error")
    parity.differs("skrl", "value_loss", "[B] beside [B, 1]", theirs="broadcast to [B, B], with a warning", ours="error")


# --- the real trainer -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    with importable("skrl", {"skrl.utils.tensorboard": {"SummaryWriter": SilentWriter}}):
        importlib.import_module("skrl")
        logging.getLogger("skrl").handlers.clear()  # its trainers log at the interpreter's exit, when pytest has closed the stream
        yield
    fused_skrl.uninstall()


def make_agent(env, time_limit_bootstrap):
    from skrl.agents.torch.ppo import PPO
    from skrl.memories.torch import RandomMemory
    from skrl.models.torch import DeterministicMixin, GaussianMixin, Model

    spaces = dict(observation_space=env.observation_space, action_space=env.action_space, device="cpu")

    class Policy(GaussianMixin, Model):
        def __init__(self):
            Model.__init__(self, **spaces)
            GaussianMixin.__init__(self)
            self.net, self.log_std = torch.nn.Linear(3, 1), torch.nn.Parameter(torch.zeros(1))

        def compute(self, inputs, role):
            return self.net(inputs["observations"]), {"log_std": self.log_std}

    class Value(DeterministicMixin, Model):
        def __init__(self):
            Model.__init__(self, **spaces)
            DeterministicMixin.__init__(self)
            self.net = torch.nn.Linear(3, 1)

        def compute(self, inputs, role):
            return self.net(inputs["observations"]), {}

    cfg = {
        "rollouts": 16, "learning_epochs": 2, "mini_batches": 2, "time_limit_bootstrap": time_limit_bootstrap,
        "experiment": {"write_interval": 0, "checkpoint_interval": 0},
    }  # fmt: skip
    return PPO(
        models={"policy": Policy(), "value": Value()}, memory=RandomMemory(memory_size=16, num_envs=4, device="cpu"), cfg=cfg, **spaces
    )


def train(install, time_limit_bootstrap):
    """The parameters after three updates, by the page's snippet, which installs; or without installing."""
    from skrl.envs.wrappers.torch import wrap_env

    (snippet,) = peers.snippets("skrl")
    lines = [line for line in snippet.splitlines() if install or "fused_skrl" not in line]
    torch.manual_seed(0)
    # Episodes of seven steps: every rollout of sixteen has cut-off ones within.
    env = wrap_env(gymnasium.make_vec("Pendulum-v1", num_envs=4, max_episode_steps=7), verbose=False)
    env.reset = lambda reset=env._env.reset: (torch.tensor(reset(seed=0)[0]), {})
    agent = make_agent(env, time_limit_bootstrap)
    exec("\n".join(lines), dict(env=env, agent=agent))
    module = importlib.import_module("skrl.agents.torch.ppo.ppo")
    assert (module.compute_gae is fused_skrl.compute_gae) == install
    fused_skrl.uninstall()
    return torch.cat([p.detach().flatten() for p in (*agent.policy.parameters(), *agent.value.parameters())])


@pytest.mark.parametrize("time_limit_bootstrap", [False, True])
def test_the_page_trains_the_real_agent(parity, real, time_limit_bootstrap):
    ours, expected = train(True, time_limit_bootstrap), train(False, time_limit_bootstrap)
    assert expected.isfinite().all()
    # Adam divides by gradients' sizes, so that rounding shows wherever a gradient is small.
    parity.same("skrl", "SequentialTrainer.train", "parameters after 3 updates", ours, expected, rtol=1e-4, atol=1e-5)
    assert (train(False, not time_limit_bootstrap) - expected).abs().max() > 1e-3, "the flag has to make a difference here"


def test_install_and_uninstall(real):
    modules = [importlib.import_module(f"skrl.{agent.replace('/', '.')}") for agent in AGENTS + RNN_AGENTS]
    own = [module.compute_gae for module in modules]
    assert len(set(own)) == 11 and all(finding.fits for finding in fused_skrl.ADAPTER.examine())
    with fused_skrl.install():
        assert [module.compute_gae for module in modules] == 7 * [fused_skrl.compute_gae] + 4 * [fused_skrl.compute_gae_rnn]
    assert [module.compute_gae for module in modules] == own


def test_install_refuses_another_signature(real, monkeypatch):
    ppo, a2c = (importlib.import_module(f"skrl.agents.torch.{name}.{name}") for name in ("ppo", "a2c"))
    own = a2c.compute_gae

    def compute_gae(rewards, dones, values, next_values, discount_factor=0.99, lambda_coefficient=0.95):
        pass

    monkeypatch.setattr(ppo, "compute_gae", compute_gae)
    with pytest.raises(RuntimeError, match=r"(?s)ppo.ppo:compute_gae.*dones.*terminated"):
        fused_skrl.install()
    assert ppo.compute_gae is compute_gae and a2c.compute_gae is own
