"""fused_critic.integrations.rl_games beside rl_games' own code, out of its wheel.

Functions are executed from the source; the real A2CBase collects rollouts (play_steps, play_steps_rnn) of an environment with time limits, with and
without install(). The stand-in: tensorboardX.
"""

from __future__ import annotations

from types import SimpleNamespace

import peers
import pytest
import torch
from fused_critic.integrations import _adapter
from fused_critic.integrations import rl_games as fused_rl_games
from hypothesis import given
from rollouts import ENDS, GAMMA, LAM, SHAPES, inside_the_range, loss_and_gradient, minibatch, rollout, rollouts
from wheel_import import SilentWriter, importable

CLIP = 0.3
CASES = [(shape, ends, 1) for shape in SHAPES for ends in ENDS] + [(shape, "several per column", 3) for shape in SHAPES]
A2C, LOSSES = "rl_games/common/a2c_common.py", "rl_games/common/common_losses.py"


@pytest.fixture(scope="module")
def theirs():
    values = peers.functions("rl_games", A2C, ["A2CBase.discount_values", "A2CBase.discount_values_masks"], torch=torch)
    losses = peers.functions("rl_games", LOSSES, ["critic_loss", "default_critic_loss"], torch=torch)
    masks = peers.functions("rl_games", "rl_games/algos_torch/torch_ext.py", ["apply_masks"], torch=torch)
    return SimpleNamespace(**vars(values), **vars(losses), **vars(masks))


def arguments(d, value_size=1, gamma=GAMMA, tau=LAM):
    """What play_steps() hands to discount_values(), as its first argument too."""
    t, n = d.rewards.shape
    generator = torch.Generator().manual_seed(2)

    def heads(x):
        """More values per step: other ones."""
        more = torch.randn(*x.shape, value_size - 1, generator=generator, dtype=torch.float64).to(x.dtype)
        return torch.cat([x[..., None], more], dim=-1)

    agent = SimpleNamespace(horizon_length=t, gamma=gamma, tau=tau)
    return agent, d.last_dones.float(), heads(d.last_values), d.dones.float(), heads(d.values), heads(d.rewards)


def some_steps(*shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(4)) < 0.7
    mask[0] = True
    return mask


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["float32", "float64"])
@pytest.mark.parametrize("shape, ends, value_size", CASES, ids=str)
def test_discount_values(parity, theirs, shape, ends, value_size, dtype, tolerance):
    given_to_both = arguments(rollout(*shape, ENDS[ends](*shape), dtype), value_size)
    ours, expected = fused_rl_games.discount_values(*given_to_both), theirs.discount_values(*given_to_both)
    assert (ours.shape, ours.dtype) == (expected.shape, expected.dtype) == ((*shape, value_size), dtype)
    parity.same("rl_games", "A2CBase.discount_values", f"advantages, {str(dtype)[6:]}", ours, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["float32", "float64"])
@pytest.mark.parametrize("mask", ["all", "none", "some"])
@pytest.mark.parametrize("shape, ends, value_size", CASES, ids=str)
def test_discount_values_masks(parity, theirs, shape, ends, mask, value_size, dtype, tolerance):
    masks = {"all": torch.ones(shape), "none": torch.zeros(shape), "some": some_steps(*shape).float()}[mask]
    given_to_both = (*arguments(rollout(*shape, ENDS[ends](*shape), dtype), value_size), masks)
    ours, expected = fused_rl_games.discount_values_masks(*given_to_both), theirs.discount_values_masks(*given_to_both)
    assert (ours.shape, ours.dtype) == (expected.shape, expected.dtype)
    parity.same(
        "rl_games", "A2CBase.discount_values_masks", f"advantages, {str(dtype)[6:]}", ours, expected, rtol=tolerance, atol=tolerance
    )


@given(d=rollouts())
def test_discount_values_of_any_rollout(theirs, d):
    given_to_both = arguments(d, gamma=d.gamma, tau=d.lam)
    torch.testing.assert_close(fused_rl_games.discount_values(*given_to_both), theirs.discount_values(*given_to_both), **d.tolerance)
    given_to_both += (d.mask,)
    ours, expected = fused_rl_games.discount_values_masks(*given_to_both), theirs.discount_values_masks(*given_to_both)
    torch.testing.assert_close(ours, expected, **d.tolerance)


def test_a_flag_gates_the_step_before_it():
    """done[t + 1], not done[t]: the first flag is of no consequence, and the one after the last step is."""
    d = rollout(6, 2, ENDS["no end"](6, 2))
    expected = fused_rl_games.discount_values(*arguments(d))
    d.dones[0] ^= True
    torch.testing.assert_close(fused_rl_games.discount_values(*arguments(d)), expected, rtol=0, atol=0)
    d.last_dones = torch.tensor([True, False])
    advantages = fused_rl_games.discount_values(*arguments(d))[..., 0]
    torch.testing.assert_close(advantages[-1, 0], d.rewards[-1, 0] - d.values[-1, 0])
    torch.testing.assert_close(advantages[:, 1], expected[:, 1, 0], rtol=0, atol=0)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["float32", "float64"])
@pytest.mark.parametrize("clip_value", [True, False], ids=["clipped", "unclipped"])
@pytest.mark.parametrize("shape", [(1, 1), (512, 1), (64, 3), (64,)], ids=str)
def test_critic_loss(parity, theirs, shape, clip_value, dtype, tolerance):
    values, old, returns = minibatch(*shape, dtype=dtype)
    for name in ("critic_loss", "default_critic_loss"):
        model = (None,) if name == "critic_loss" else ()
        given_to_both = (*model, old, values, CLIP, returns, clip_value)
        ours, expected = getattr(fused_rl_games, name)(*given_to_both), getattr(theirs, name)(*given_to_both)
        assert (ours.shape, ours.dtype) == (expected.shape, expected.dtype) == (shape, dtype)
        weights = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
        gradients = [torch.autograd.grad(loss, values, weights)[0] for loss in (ours, expected)]
        rtol = 10 * tolerance
        parity.same("rl_games", name, f"losses, {str(dtype)[6:]}", ours, expected, rtol=rtol, atol=tolerance)
        parity.same("rl_games", name, f"gradient, {str(dtype)[6:]}", *gradients, rtol=rtol, atol=tolerance)


def test_critic_loss_under_rnn_masks(parity, theirs):
    """The trainer's own apply_masks() divides by masked positions too."""
    values, old, returns = minibatch(48, 1)
    mask = some_steps(48).float()

    def loss(critic_loss):
        (masked,), count = theirs.apply_masks([critic_loss(None, old, values, CLIP, returns, True)], mask)
        assert count == 48
        return loss_and_gradient(masked, values)

    ours, expected = loss(fused_rl_games.critic_loss), loss(theirs.critic_loss)
    assert (ours[1][mask == 0] == 0).all()
    for name, a, b in zip(("loss", "gradient"), ours, expected):
        parity.same("rl_games", "critic_loss", f"{name} under rnn_masks", a, b, rtol=1e-5, atol=1e-7)


def test_critic_loss_compiles():
    """rl_games may compile the model's step: no graph break."""
    values, old, returns = minibatch(64, 1)
    compiled = torch.compile(fused_rl_games.critic_loss, fullgraph=True, backend="eager")
    given_to_both = (None, old, values, CLIP, returns, True)
    ours, expected = (loss_and_gradient(f(*given_to_both).mean(), values) for f in (compiled, fused_rl_games.critic_loss))
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-8)


# --- the differences on purpose: rl_games' side first, then ours ------------------------------------------------------------------


@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_difference_garbage_under_the_mask(parity, theirs, garbage):
    """In the reward and the value of a masked step, whose predecessor ends its episode and so does not ask for that value."""
    d = rollout(6, 2, ENDS["no end"](6, 2))
    d.ends[2] = True
    d.dones[3] = True
    masks = torch.ones(6, 2)
    masks[3, 0] = 0
    expected = fused_rl_games.discount_values_masks(*arguments(d), masks)
    d.rewards[3, 0] = d.values[3, 0] = garbage
    own = theirs.discount_values_masks(*arguments(d), masks)[..., 0]
    assert own[:4, 0].isnan().all() and own[:, 1].isfinite().all()
    torch.testing.assert_close(fused_rl_games.discount_values_masks(*arguments(d), masks), expected, rtol=0, atol=0)
    parity.differs(
        "rl_games", "A2CBase.discount_values_masks", "NaN in a masked step", theirs="carried to earlier steps", ours="never used"
    )


def test_difference_fractional_mask(parity, theirs):
    d, masks = rollout(6, 2, ENDS["no end"](6, 2)), some_steps(6, 2).float()
    whole, halves = (theirs.discount_values_masks(*arguments(d), m) for m in (masks, masks / 2))
    assert not torch.allclose(halves, whole, rtol=1e-2)
    ours = fused_rl_games.discount_values_masks(*arguments(d), masks / 2)
    torch.testing.assert_close(ours, fused_rl_games.discount_values_masks(*arguments(d), masks), rtol=0, atol=0)
    parity.differs("rl_games", "A2CBase.discount_values_masks", "fractional mask", theirs="a factor", ours="valid wherever non-zero")


def test_difference_discount_above_one(parity, theirs):
    given_to_both = arguments(rollout(4, 2, ENDS["no end"](4, 2)), gamma=1.01)
    assert theirs.discount_values(*given_to_both).isfinite().all()
    with pytest.raises(ValueError, match="gamma"):
        fused_rl_games.discount_values(*given_to_both)
    parity.differs("rl_games", "A2CBase.discount_values", "gamma or tau outside of [0, 1]", theirs="accepted", ours="error")


def test_difference_values_inside_the_range(parity, theirs):
    values, old = inside_the_range(512, 1, clip=CLIP)
    returns = values.detach().clone()
    own = theirs.default_critic_loss(old, values, CLIP, returns, True)
    assert own.any() and own.max() < 1e-12
    assert (fused_rl_games.default_critic_loss(old, values, CLIP, returns, True) == 0).all()
    parity.differs("rl_games", "default_critic_loss", "values inside the clip range", theirs="moved by a last bit", ours="the value itself")


def test_difference_gradient_at_ties(parity, theirs):
    """Clip range 0.5 around 0.5: the return half way between the value and the clipped one."""
    values, old, returns = torch.tensor([[1.5]], requires_grad=True), torch.tensor([[0.5]]), torch.tensor([[1.25]])
    expected = loss_and_gradient(theirs.default_critic_loss(old, values, 0.5, returns, True), values)
    ours = loss_and_gradient(fused_rl_games.default_critic_loss(old, values, 0.5, returns, True), values)
    assert ours[0] == expected[0] and expected[1] == 0.25 and ours[1] == 0.5
    parity.differs("rl_games", "default_critic_loss", "tie of the two losses", theirs="half the gradient", ours="the whole gradient")


def test_difference_gradient_on_a_bound(parity, theirs):
    """Clip range 0.5 around 0.5: the value on the bound. Whether clamp passes the gradient there depends on torch's version."""
    values, old, returns = torch.tensor([[1.0]], requires_grad=True), torch.tensor([[0.5]]), torch.tensor([[3.0]])
    expected = loss_and_gradient(theirs.default_critic_loss(old, values, 0.5, returns, True), values)
    ours = loss_and_gradient(fused_rl_games.default_critic_loss(old, values, 0.5, returns, True), values)
    assert ours[0] == expected[0] and -4 <= expected[1] <= -2 and ours[1] == -4
    parity.differs(
        "rl_games", "default_critic_loss", "bounds of the range", theirs="half the gradient or all, by torch's version", ours="all"
    )


def test_empty_minibatch_is_the_same(theirs):
    """Losses per element: none. Their mean is taken elsewhere."""
    values, old, returns = minibatch(0, 1)
    for function in (theirs.default_critic_loss, fused_rl_games.default_critic_loss):
        assert function(old, values, CLIP, returns, True).shape == (0, 1)


def test_difference_constants_and_broadcasting(parity, theirs):
    values, old, returns = minibatch(5, 1)
    assert torch.autograd.grad(theirs.default_critic_loss(old, values, CLIP, returns.requires_grad_(), True).sum(), returns)[0].any()
    with pytest.raises(ValueError, match="requires_grad"):
        fused_rl_games.default_critic_loss(old, values, CLIP, returns, True)
    flat = returns.detach()[:, 0]
    assert theirs.default_critic_loss(old, values, CLIP, flat, True).shape == (5, 5)
    with pytest.raises(ValueError, match="one shape"):
        fused_rl_games.default_critic_loss(old, values, CLIP, flat, True)
    parity.differs("rl_games", "default_critic_loss", "returns that require grad", theirs="gradient passed on", ours="error")
    parity.differs("rl_games", "default_critic_loss", "[B] beside [B, 1]", theirs="broadcast to [B, B]", ours="error")


def test_difference_half_precision(parity, theirs):
    """In bf16, 100 + 0.2 is 100: the range has no width."""
    values, old, returns = (torch.full((3, 1), x, dtype=torch.bfloat16) for x in (100.5, 100.0, 104.0))
    expected = theirs.default_critic_loss(old, values, 0.2, returns, True)
    ours = fused_rl_games.default_critic_loss(old, values, 0.2, returns, True)
    assert (expected.dtype, ours.dtype) == (torch.bfloat16, torch.float32)
    assert (expected == 4.0**2).all()
    torch.testing.assert_close(ours, torch.full((3, 1), 3.8**2), rtol=1e-5, atol=0)
    parity.differs("rl_games", "default_critic_loss", "bf16 throughout", theirs="computed in bf16", ours="computed in float32")


# --- the real trainer -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    with importable("rl_games", {"tensorboardX": {"SummaryWriter": SilentWriter}}):
        yield
    fused_rl_games.uninstall()


def collect(recurrent):
    """The batch that the real A2CBase collects in an environment of two kinds of ends. Of the constructor, which builds networks, environments
    and writers, only what the collection reads is done here."""
    from rl_games.common.a2c_common import A2CBase

    n, t = 5, 12
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.zeros(t, n, 1) for name in ("values", "rewards")}
    tensors["dones"] = torch.zeros(t, n, dtype=torch.uint8)
    tensors["obses"] = torch.zeros(t, n, 3)
    silent = SilentWriter()

    class Agent(A2CBase):
        def __init__(self):
            self.horizon_length, self.seq_length, self.num_agents, self.batch_size = t, 4, 1, t * n
            self.gamma, self.tau, self.value_bootstrap, self.ppo_device = GAMMA, LAM, True, "cpu"
            self.use_action_masks = self.has_central_value = self.zero_rnn_on_done = False
            self.update_list, self.tensor_list = ["values"], ["values", "obses", "dones"]
            self.game_rewards = self.game_shaped_rewards = self.game_lengths = self.algo_observer = silent
            self.current_rewards, self.current_shaped_rewards, self.current_lengths = torch.zeros(n, 1), torch.zeros(n, 1), torch.zeros(n)
            self.rewards_shaper, self.dones = (lambda rewards: 0.5 * rewards), torch.ones(n, dtype=torch.uint8)
            self.obs = {"obs": torch.randn(n, 3, generator=generator)}
            self.rnn_states, self.mb_rnn_states = [torch.zeros(1, n, 2)], [torch.zeros(t // 4, 1, n, 2)]
            self.experience_buffer = SimpleNamespace(
                tensor_dict=tensors,
                update_data=lambda name, step, x: tensors[name][step].copy_(x),
                get_transformed_list=lambda change, names: {name: change(tensors[name]) for name in names},
            )

        def get_action_values(self, obs):
            return {"values": obs["obs"].sum(1, keepdim=True), "actions": None, "rnn_states": self.rnn_states}

        def get_values(self, obs):
            return obs["obs"].sum(1, keepdim=True)

        def cast_obs(self, x):
            return x

        def env_step(self, actions):
            time_outs, fell = (torch.rand(n, generator=generator) < 0.15 for _ in range(2))
            obs, rewards = torch.randn(n, 3, generator=generator), torch.randn(n, 1, generator=generator)
            return {"obs": obs}, rewards, (time_outs | fell).to(torch.uint8), {"time_outs": time_outs}

        train = update_epoch = save = restore = lambda self, *arguments: None  # abstract there, and not called

    agent = Agent()
    batch = agent.play_steps_rnn() if recurrent else agent.play_steps()
    assert tensors["dones"][1:].any() and agent.dones.any(), "episodes have to end within the rollout and at its end"
    return batch


@pytest.mark.parametrize("recurrent", [False, True], ids=["play_steps", "play_steps_rnn"])
def test_the_page_reaches_the_real_agent(parity, real, recurrent):
    from rl_games.common import common_losses
    from rl_games.common.a2c_common import A2CBase

    own, expected = common_losses.critic_loss, collect(recurrent)
    (snippet,) = peers.snippets("rl_games")
    exec(snippet, {})
    assert A2CBase.discount_values is fused_rl_games.discount_values and common_losses.critic_loss is fused_rl_games.critic_loss
    ours = collect(recurrent)
    fused_rl_games.uninstall()
    assert A2CBase.discount_values is not fused_rl_games.discount_values and common_losses.critic_loss is own
    where = "A2CBase.play_steps_rnn" if recurrent else "A2CBase.play_steps"
    parity.same("rl_games", where, "returns with time-outs", ours["returns"], expected["returns"], rtol=1e-5, atol=1e-5)


def test_install_and_uninstall(real):
    from rl_games.common import common_losses
    from rl_games.common.a2c_common import A2CBase, ContinuousA2CBase

    names = ["discount_values", "discount_values_masks"], ["critic_loss", "default_critic_loss"]
    own = [getattr(ContinuousA2CBase, name) for name in names[0]] + [getattr(common_losses, name) for name in names[1]]
    ours = [getattr(fused_rl_games, name) for name in (*names[0], *names[1])]
    assert [_adapter.signature_of(f) for f in own] == [_adapter.signature_of(f) for f in ours]
    assert all(finding.fits for finding in fused_rl_games.ADAPTER.examine())

    def current():
        return [getattr(ContinuousA2CBase, name) for name in names[0]] + [getattr(common_losses, name) for name in names[1]]

    with fused_rl_games.install():
        assert current() == ours and A2CBase.discount_values is ours[0]
    assert current() == own


def test_install_refuses_another_signature(real, monkeypatch):
    from rl_games.common import common_losses
    from rl_games.common.a2c_common import A2CBase

    def critic_loss(value_preds_batch, values, curr_e_clip, return_batch, clip_value):
        pass

    own = A2CBase.discount_values
    monkeypatch.setattr(common_losses, "critic_loss", critic_loss)
    with pytest.raises(RuntimeError, match=r"(?s)common_losses:critic_loss.*\(value_preds_batch.*\(model"):
        fused_rl_games.install()
    assert common_losses.critic_loss is critic_loss and A2CBase.discount_values is own
