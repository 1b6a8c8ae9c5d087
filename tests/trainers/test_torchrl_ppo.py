"""TorchRL as installed: its GAE, ours, and ClipPPOLoss with either, on real tensordicts; PPO trains the same policy with both."""

from __future__ import annotations

import copy
import importlib.metadata
import pickle
import sys
from pathlib import Path

import fused_critic
import pytest
import torch
from fused_critic.integrations import torchrl as fused_torchrl

pytest.importorskip("torchrl")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "trainers"))
import torchrl_ppo  # noqa: E402
from tensordict import TensorDict  # noqa: E402
from tensordict.nn import TensorDictModule  # noqa: E402
from torchrl.modules import OneHotCategorical, ProbabilisticActor, ValueOperator  # noqa: E402
from torchrl.objectives import ClipPPOLoss, ValueEstimators  # noqa: E402
from torchrl.objectives.value import GAE, MultiAgentGAE  # noqa: E402

DISCOUNTS = dict(gamma=0.99, lmbda=0.95)
B, T = 4, 19
CLOSE = dict(rtol=1e-5, atol=1e-5)


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


def rollout(dtype=torch.float32, agents=(), seed=0):
    """What a collector leaves: terminations, truncations, and a task of each row."""
    generator = torch.Generator().manual_seed(seed)
    observations = torch.randn(B, T + 1, *agents, 3, generator=generator, dtype=dtype)
    done = torch.rand(B, T, 1, generator=generator) < 0.2
    terminated = done & (torch.rand(B, T, 1, generator=generator) < 0.5)
    action = torch.nn.functional.one_hot(torch.randint(0, 2, (B, T), generator=generator), 2)
    following = {
        "observation": observations[:, 1:], "reward": torch.randn(B, T, 1, generator=generator, dtype=dtype), "done": done,
        "terminated": terminated, "truncated": done & ~terminated,
    }  # fmt: skip
    entries = {"observation": observations[:, :-1], "action": action, "task": torch.arange(B)[:, None].expand(B, T) % 2, "next": following}
    return TensorDict(entries, [B, T], names=[None, "time"])


def networks(dtype=torch.float32):
    torch.manual_seed(0)
    actor = ProbabilisticActor(
        TensorDictModule(torch.nn.Linear(3, 2, dtype=dtype), in_keys=["observation"], out_keys=["logits"]),
        in_keys=["logits"], distribution_class=OneHotCategorical, return_log_prob=True,
    )  # fmt: skip
    return actor, ValueOperator(torch.nn.Linear(3, 1, dtype=dtype), in_keys=["observation"])


def entries(batch):
    return {key: value for key, value in batch.items(include_nested=True, leaves_only=True)}


def assert_same(ours, theirs):
    ours, theirs = entries(ours), entries(theirs)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype and ours[key].requires_grad == value.requires_grad, key
        torch.testing.assert_close(ours[key], value, **CLOSE, msg=lambda text: f"{key}: {text}")


@pytest.fixture
def calls(monkeypatch):
    """Of fused_critic.gae and fused_critic.reverse_scan."""
    made = []
    for name in ("gae", "reverse_scan"):
        function = getattr(fused_critic, name)
        monkeypatch.setattr(fused_critic, name, lambda *x, _name=name, _function=function, **y: made.append(_name) or _function(*x, **y))
    return made


def test_fits_the_installed_version():
    assert all(finding.fits for finding in fused_torchrl.ADAPTER.examine()), importlib.metadata.version("torchrl")


OPTIONS = {
    "default": {},
    "vectorised": dict(vectorized=True),
    "average_gae": dict(average_gae=True),
    "average_gae, groups": dict(average_gae=True, group_key="task"),
    "differentiable": dict(differentiable=True),
    "shifted": dict(shifted=True, shifted_budget=2),
    "shifted, average_gae": dict(shifted=True, average_gae=True),
    "auto_reset_env": dict(auto_reset_env=True),
    "chunks": dict(num_chunks=2),
    "no vmap": dict(deactivate_vmap=True),
    "time_dim": dict(time_dim=0),
    "tensors": {name: torch.tensor(value) for name, value in DISCOUNTS.items()},
    "device": dict(device="cpu"),
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("method", ["forward", "value_estimate"])
def test_gae(calls, method, options):
    _, critic = networks()
    ours, theirs = (cls(**{**DISCOUNTS, "value_network": critic, **OPTIONS[options]}) for cls in (fused_torchrl.GAE, GAE))
    assert ours.in_keys == theirs.in_keys and ours.out_keys == theirs.out_keys
    if method == "value_estimate":
        torch.testing.assert_close(ours.value_estimate(rollout()), theirs.value_estimate(rollout()), **CLOSE)
    else:
        assert_same(ours(rollout()), theirs(rollout()))
    assert calls == ["gae"]


def test_gae_in_float64_and_without_a_network(calls):
    batch = rollout(torch.float64)
    batch["state_value"], batch["next", "state_value"] = torch.randn(2, B, T, 1, dtype=torch.float64)
    discounts = {name: torch.tensor(value, dtype=torch.float64) for name, value in DISCOUNTS.items()}
    ours, theirs = (cls(**discounts, value_network=None)(batch.clone()) for cls in (fused_torchrl.GAE, GAE))
    torch.testing.assert_close(ours["advantage"], theirs["advantage"], rtol=1e-12, atol=1e-12)
    assert calls == ["gae"]


def test_gae_of_multi_step_transitions(calls):
    """gamma ** steps_to_next_obs is a discount per step: the reverse scan."""
    _, critic = networks()
    results = []
    for cls in (fused_torchrl.GAE, GAE):
        batch = rollout()
        batch["steps_to_next_obs"] = torch.randint(1, 4, (B, T, 1), generator=torch.Generator().manual_seed(1))
        results.append(cls(**DISCOUNTS, value_network=critic)(batch))
    assert_same(*results)
    assert calls == ["reverse_scan"]


def test_gae_with_keys_of_ones_own_and_as_a_function():
    _, critic = networks()
    results = []
    for cls in (fused_torchrl.GAE, GAE):
        gae = cls(**DISCOUNTS, value_network=critic)
        batch = rollout()
        results.append(
            gae(
                observation=batch["observation"], next_observation=batch["next", "observation"], next_reward=batch["next", "reward"],
                next_done=batch["next", "done"], next_terminated=batch["next", "terminated"],
            )
        )  # fmt: skip
        gae.set_keys(advantage="adv", value_target="target", reward="r")
        batch.rename_key_(("next", "reward"), ("next", "r"))
        results[-1] += tuple(gae(batch)[key] for key in ("adv", "target"))
    torch.testing.assert_close(*results, **CLOSE)


def test_gradient_of_a_differentiable_gae():
    gradients = []
    for cls in (fused_torchrl.GAE, GAE):
        batch = rollout()
        batch["state_value"] = (value := torch.randn(B, T, 1, generator=torch.Generator().manual_seed(1)).requires_grad_())
        batch["next", "state_value"] = torch.ones(B, T, 1)
        advantage = cls(**DISCOUNTS, value_network=None, differentiable=True)(batch)["advantage"]
        gradients.append(torch.autograd.grad(advantage.square().sum(), value)[0])
    torch.testing.assert_close(*gradients, **CLOSE)


def test_gae_is_copied_pickled_and_loads_theirs():
    ours, theirs = (cls(gamma=gamma, lmbda=0.95, value_network=None) for cls, gamma in ((fused_torchrl.GAE, 0.5), (GAE, 0.99)))
    ours.load_state_dict(theirs.state_dict())
    assert ours.gamma == theirs.gamma
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(copied) is fused_torchrl.GAE and copied.gamma == ours.gamma


def test_gae_compiles_into_one_graph_with_the_operator():
    targets = []

    def backend(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    batch = rollout()
    batch["state_value"], batch["next", "state_value"] = torch.randn(2, B, T, 1)
    gae = fused_torchrl.GAE(**DISCOUNTS, value_network=None)
    expected = gae(batch.clone())
    compiled = torch.compile(gae, fullgraph=True, backend=backend)(batch.clone())
    torch.testing.assert_close(compiled["advantage"], expected["advantage"], rtol=0, atol=0)
    assert "fused_critic.gae.tensor" in targets


@pytest.mark.parametrize("way", ["instance", "class", "advantage module", "install"])
@pytest.mark.parametrize("loss_critic_type", ["l2", "smooth_l1"])
def test_clip_ppo_loss(calls, way, loss_critic_type):
    """All entries of the loss, and the gradients of both networks."""
    found = []
    for ours in (True, False):
        actor, critic = networks()
        loss = ClipPPOLoss(actor, critic, clip_value=0.2, loss_critic_type=loss_critic_type)
        batch = actor(rollout())
        batch["action_log_prob"] = batch["action_log_prob"].detach()
        cls = fused_torchrl.GAE if ours else GAE
        if way == "instance":
            loss.make_value_estimator(cls(**DISCOUNTS, value_network=critic))
        elif way == "class":
            loss.make_value_estimator(cls, **DISCOUNTS, value_network=critic)
        elif way == "advantage module":
            cls(**DISCOUNTS, value_network=critic)(batch)
        else:
            loss.make_value_estimator(ValueEstimators.GAE, **DISCOUNTS)
        # Advantages come from an older critic than the one that is trained, so that clipping has something to do.
        with fused_torchrl.install() if ours and way == "install" else torch.enable_grad():
            if way != "advantage module":
                loss.value_estimator(batch)
        batch = batch.detach().clone()
        batch["state_value"] += 0.3 * torch.randn(B, T, 1, generator=torch.Generator().manual_seed(2))
        entries = loss(batch)
        total = entries["loss_objective"] + entries["loss_critic"] + entries["loss_entropy"]
        found.append((entries.detach(), torch.autograd.grad(total, list(loss.parameters()))))
    torch.testing.assert_close(found[0][1], found[1][1], **CLOSE)
    assert_same(found[0][0], found[1][0])
    assert 0 < found[0][0]["value_clip_fraction"] < 1
    assert calls == ["gae"], "once, by ours"


@pytest.mark.parametrize("loss_critic_type", ["l2", "l1", "smooth_l1"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_critic_loss_is_that_of_clip_ppo_loss(loss_critic_type, reduction):
    actor, critic = networks()
    loss = ClipPPOLoss(actor, critic, clip_value=0.2, loss_critic_type=loss_critic_type, critic_coeff=0.7, reduction=reduction)
    batch = GAE(**DISCOUNTS, value_network=critic)(actor(rollout())).detach().reshape(-1)
    batch["state_value"] += 0.3 * torch.randn(B * T, 1, generator=torch.Generator().manual_seed(2))
    theirs = loss(batch.clone())
    ours = fused_torchrl.critic_loss(
        batch["value_target"], critic(batch.clone())["state_value"], batch["state_value"], clip_value=0.2,
        loss_critic_type=loss_critic_type, critic_coeff=0.7, reduction=reduction,
    )  # fmt: skip
    torch.testing.assert_close(ours.loss.reshape(theirs["loss_critic"].shape), theirs["loss_critic"], **CLOSE)
    torch.testing.assert_close(ours.value_clip_fraction, theirs["value_clip_fraction"])
    torch.testing.assert_close(ours.explained_variance, theirs["explained_variance"].squeeze(), **CLOSE)


def test_install_reaches_multi_agent_gae(calls):
    torch.manual_seed(0)
    critic = ValueOperator(torch.nn.Linear(3, 1), in_keys=["observation"])
    module = MultiAgentGAE(**DISCOUNTS, value_network=critic, average_gae=True)
    theirs = module(rollout(agents=(5,)))
    assert not calls
    with fused_torchrl.install():
        assert_same(module(rollout(agents=(5,))), theirs)
    assert calls == ["gae"] and theirs["advantage"].shape == (B, T, 5, 1)


@pytest.mark.parametrize("vectorized", [None, True])
def test_training_is_the_same(vectorized):
    """Three rollouts with their updates: the same actions, so equal returns, and parameters that differ by rounding."""
    ours, theirs = torchrl_ppo.both(3, seed=0, horizon=64, vectorized=vectorized)
    assert ours.returns == theirs.returns and len(ours.returns) == 3
    torch.testing.assert_close(torch.tensor(ours.critic_losses), torch.tensor(theirs.critic_losses), rtol=1e-4, atol=0)
    torch.testing.assert_close(ours.parameters, theirs.parameters, rtol=1e-3, atol=1e-4)
    earlier = torchrl_ppo.train(GAE, 1, seed=0, horizon=64).parameters
    assert not torch.allclose(ours.parameters, earlier, rtol=1e-2, atol=1e-3), "the tolerance is far below what training changes"
