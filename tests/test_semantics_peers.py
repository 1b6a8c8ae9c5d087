"""docs/semantics.md, the trainers: the call that the page documents gives the numbers of that trainer's own formula.

The formulas are written here as plain torch in float64, each from the source that its section of the page names; the calls are run from
the page itself. Compared are advantages and returns at valid positions, the loss, and its gradient. The data are random, with gaps in the
masks, a row without a valid token, and ends of episodes.
"""

from types import SimpleNamespace

import pytest
import semantics_page
import torch
from torch.nn import functional as F

B, T = 5, 9
GAMMA, LAM, CLIP = 0.93, 0.87, 0.2
TINY = 1e-8  # what several trainers add to a denominator; the tolerance below allows for it, not for another formula
RTOL, ATOL = 1e-6, 1e-7


# --- data ---------------------------------------------------------------------------------------------------------------------------


def randn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flags(*shape, share, seed):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def critic(*shape, seed=0):
    """old_values, and values near to them: some inside the range, some outside, on either side of the returns."""
    old_values = randn(*shape, seed=seed)
    return old_values, old_values + 0.3 * randn(*shape, seed=seed + 1)


def language_data(empty_row=True, seed=0):
    """[B, T] with gaps in the mask."""
    old_values, values = critic(B, T, seed=seed)
    mask = flags(B, T, share=0.65, seed=seed + 2)
    mask[0] = torch.arange(T) < 6  # padded on the right, the usual case
    if empty_row:
        mask[-1] = False
    return SimpleNamespace(old_values=old_values, values=values, rewards=randn(B, T, seed=seed + 3), mask=mask)


def rollout_data(seed=0):
    """[T, B] of classic reinforcement learning. `ends[t]`: the step from t ended the episode."""
    old_values, values = critic(T, B, seed=seed)
    ends = flags(T, B, share=0.25, seed=seed + 2)
    return SimpleNamespace(
        old_values=old_values, values=values, rewards=randn(T, B, seed=seed + 3), ends=ends, last_values=randn(B, seed=seed + 4)
    )


# --- the formulas' common parts -----------------------------------------------------------------------------------------------------


def squares(values, old_values, returns, clip):
    """The greater of the squares of the plain and of the clipped error."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def recursion(delta, decay):
    """A_t = delta_t + decay_t A_{t+1}, from the last index of the first dimension on."""
    following, found = torch.zeros_like(delta[0]), []
    for d, f in zip(delta.flip(0), decay.flip(0)):
        following = d + f * following
        found.append(following)
    return torch.stack(found[::-1])


def plain_gae(rewards, values, last=0.0, ends=None, gamma=GAMMA, lam=LAM):
    """Of [T, B]: `last` is the value behind the last step; `ends` cut both the value and the trace."""
    following = torch.cat([values[1:], torch.zeros_like(values[:1]) + last])
    proceed = torch.ones_like(values) if ends is None else 1 - ends.double()
    return recursion(rewards + gamma * proceed * following - values, gamma * lam * proceed)


def carry_gae(rewards, values, mask, last=0.0, gamma=GAMMA, lam=LAM):
    """Of [B, T], carrying advantage and next value over masked positions."""
    advantage, following, found = torch.zeros(len(values)).double(), torch.zeros(len(values)).double() + last, []
    for t in reversed(range(values.shape[1])):
        here, m = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * advantage, mask[:, t].double()
        advantage, following = m * here + (1 - m) * advantage, m * values[:, t] + (1 - m) * following
        found.append(advantage)
    return torch.stack(found[::-1], dim=1)


def whiten(x, mask=None, tiny=0.0, correction=1):
    """The root of the variance plus 1e-8, as in trl and its descendants; `tiny` in the means' denominators."""
    mask = torch.ones_like(x) if mask is None else mask.double()
    n = mask.sum()
    mean = (x * mask).sum() / (n + tiny)
    variance = ((x - mean) ** 2 * mask).sum() / (n + tiny) * n / (n - correction)
    return (x - mean) * torch.rsqrt(variance + 1e-8)


def standardise(x):
    """Of classic reinforcement learning."""
    return (x - x.mean()) / (x.std() + 1e-8)


def row_means(loss, mask, tiny=0.0):
    return (loss * mask).sum(-1) / (mask.sum(-1) + tiny).clamp(min=TINY)


# --- running the page's call --------------------------------------------------------------------------------------------------------


def call(section, device, /, **inputs):
    """What the section's python block leaves behind. Its `values` are a leaf that requires grad."""
    (block,) = (block for block in semantics_page.blocks() if block.section == section and block.language == "python")
    space = {}
    exec(semantics_page.preamble(), space)
    for name, value in inputs.items():
        space[name] = value.to(device) if isinstance(value, torch.Tensor) else value
    leaf = space["values"].clone().requires_grad_()
    space["values"] = leaf
    exec(block.code, space)
    return SimpleNamespace(**{**space, "leaf": leaf})


def close(got, expected, where=None):
    got = got.detach().cpu().double()
    assert got.shape == expected.shape
    if where is not None:
        got, expected = got[where], expected[where]
    torch.testing.assert_close(got, expected.detach().double(), rtol=RTOL, atol=ATOL)


def agree(got, advantages, returns, loss, values, where=None):
    """`loss`: a function of the values, whose gradient is compared too."""
    close(got.advantages, advantages, where)
    close(got.returns, returns, where)
    leaf = values.clone().requires_grad_()
    expected = loss(leaf)
    close(got.loss, expected)
    close(torch.autograd.grad(got.loss, got.leaf)[0], torch.autograd.grad(expected, leaf)[0])


# --- trainers of language models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [None, (1.0, 37.0, 11.0), (4.0, 37.0, 11.0)], ids=["local", "global", "ranks"])
@pytest.mark.parametrize("mode", ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"])
def test_verl(device, mode, counts):
    d = language_data()
    m = d.mask.double()
    dp_size, tokens, rows = counts or (1.0, None, None)
    carried = carry_gae(d.rewards, d.old_values, d.mask)
    returns = carried + d.old_values
    factor = 20.0 if counts else None

    def loss(values):
        errors = squares(values, d.old_values, returns, CLIP)
        by_row, filled = (errors * m).sum(-1), (m.sum(-1) > 0).double()
        if mode == "token-mean":
            reduced = (errors * m).sum() / (tokens or m.sum())
        elif mode == "token-sum":
            reduced = (errors * m).sum()
        elif mode == "seq-mean-token-mean":
            reduced = (by_row / (m.sum(-1) + TINY) * filled).sum() / (rows or filled.sum())
        else:
            reduced = (by_row * filled).sum() / (rows or filled.sum()) / ((factor or T) if mode.endswith("norm") else 1)
        return 0.5 * reduced * dp_size

    got = call(
        "verl", device, rewards=d.rewards, values=d.values, old_values=d.old_values, mask=d.mask, gamma=GAMMA, lam=LAM, clip=CLIP,
        loss_agg_mode=mode, dp_size=dp_size, batch_num_tokens=tokens, global_batch_size=rows, loss_scale_factor=factor,
    )  # fmt: skip
    agree(got, whiten(carried, d.mask, tiny=TINY), returns, loss, d.values, d.mask)
    clipped = d.old_values + (d.values - d.old_values).clamp(-CLIP, CLIP)
    fraction = (((clipped - returns) ** 2 > (d.values - returns) ** 2).double() * m).sum() / (m.sum() + TINY)
    close(got.stats.clip_fraction, fraction)


@pytest.mark.parametrize("token_level_loss", [True, False])
@pytest.mark.parametrize("clip", [CLIP, None])
def test_openrlhf(device, token_level_loss, clip):
    d = language_data()
    m = d.mask.double()
    advantages = plain_gae((d.rewards * m).T, (d.old_values * m).T).T
    returns = advantages + d.old_values * m
    mean = (advantages * m).sum() / m.sum()
    variance = ((advantages - mean) ** 2 * m).sum() / m.sum()

    def loss(values):
        errors = (values - returns) ** 2 if clip is None else squares(values, d.old_values, returns, clip)
        if token_level_loss:
            return 0.5 * (errors * m).sum() / m.sum()
        filled = (m.sum(-1) > 0).double()
        return 0.5 * ((errors * m).sum(-1) / (m.sum(-1) + TINY) * filled).sum() / filled.sum()

    got = call(
        "OpenRLHF", device, rewards=d.rewards, values=d.values, old_values=d.old_values, mask=d.mask, gamma=GAMMA, lam=LAM, clip=clip,
        token_level_loss=token_level_loss, dp_size=1, batch_num_tokens=None, global_batch_size=None,
    )  # fmt: skip
    agree(got, (advantages - mean) * variance.clamp(min=1e-8).rsqrt(), returns, loss, d.values, d.mask)


def test_trl(device):
    d = language_data()
    lengths = torch.tensor([4, 0, 8, 6, 3])  # index of the last token
    position = torch.arange(T).expand(B, T)
    mask, mask_p1 = position <= lengths[:, None], position <= lengths[:, None] + 1
    old_values, rewards = d.old_values.masked_fill(~mask_p1, 0), d.rewards.masked_fill(~mask_p1, 0)
    advantages = plain_gae(rewards.T, old_values.T).T
    returns = advantages + old_values
    vf_coef = 0.1

    def loss(values):
        errors = squares(values.masked_fill(~mask_p1, 0), old_values, returns, CLIP)
        return vf_coef * 0.5 * (errors * mask_p1).sum() / mask_p1.sum()

    got = call(
        "TRL", device, rewards=rewards, values=d.values, old_values=old_values, mask=mask, mask_p1=mask_p1, gamma=GAMMA, lam=LAM, clip=CLIP,
        vf_coef=vf_coef,
    )  # fmt: skip
    close(got.returns, returns, mask_p1)
    agree(got, whiten(advantages, mask), returns, loss, d.values, mask)


def turn_gae(rewards, values, mask, turn_ids, last):
    """Of [B, T], with turns as time steps: summed rewards, the value at a turn's first token."""
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    for b in range(len(values)):
        advantage, following = 0.0, last[b]
        for turn in turn_ids[b][mask[b]].unique().flip(0):
            (tokens,) = torch.where(mask[b] & (turn_ids[b] == turn))
            value = values[b, tokens[0]]
            advantage = rewards[b, tokens].sum() + GAMMA * following - value + GAMMA * LAM * advantage
            advantages[b, tokens], returns[b, tokens], following = advantage, advantage + value, value
    return advantages, returns


@pytest.mark.parametrize("criterion", ["mse", "huber"])
@pytest.mark.parametrize("unit", ["token", "turn"])
def test_areal(device, unit, criterion):
    d = language_data(empty_row=False)
    scale = 20.0  # errors on both sides of huber's delta
    old_values, values, rewards = scale * d.old_values, scale * d.values, scale * d.rewards
    lengths = torch.tensor([T, 5, T, 7, 8])
    attention = torch.arange(T) < lengths[:, None]
    loss_mask = (d.mask & attention).double()
    loss_mask[:, 0] = 0  # the prompt
    mask = loss_mask.roll(-1, -1)
    bootstrap = old_values[:, -1] * (lengths == T)
    turn_ids = None
    if unit == "token":
        advantages = carry_gae(rewards[:, :-1], old_values[:, :-1], mask[:, :-1], bootstrap)
        returns = advantages + old_values[:, :-1]
    else:
        turn_ids = torch.arange(T - 1).expand(B, -1) // 3
        advantages, returns = turn_gae(rewards[:, :-1], old_values[:, :-1], mask[:, :-1].bool(), turn_ids, bootstrap)
    target = F.pad(returns, (0, 1))

    def shape(error):
        if criterion == "mse":
            return 0.5 * error**2
        return torch.where(error.abs() < 10, 0.5 * error**2, 10 * (error.abs() - 5))

    def loss(new):
        clipped = old_values + (new - old_values).clamp(-CLIP, CLIP)
        return torch.where(mask.bool(), torch.maximum(shape(new - target), shape(clipped - target)), 0).sum() / mask.count_nonzero()

    got = call(
        "AReaL", device, rewards=rewards, values=values, old_values=old_values, loss_mask=loss_mask, attention_mask=attention, gamma=GAMMA,
        lam=LAM, clip=CLIP, criterion=criterion, turn_ids=turn_ids,
    )  # fmt: skip
    agree(got, advantages, returns, loss, values, mask[:, :-1].bool())


def test_nemo_rl(device):
    d = language_data()
    alpha, lam_value, scale, tokens = 0.5, 1.0, 0.7, torch.tensor(41.0)
    lam = (1 - 1 / (alpha * d.mask.sum(1).double()).clamp(min=1)).clamp(0, 1)
    advantages = carry_gae(d.rewards, d.old_values, d.mask, lam=lam)
    returns = carry_gae(d.rewards, d.old_values, d.mask, lam=lam_value) + d.old_values
    samples = torch.tensor([1.0, 1, 0, 1, 1]).double()
    m = d.mask * samples[:, None]

    def loss(values):
        return 0.5 * scale * (squares(values, d.old_values, returns, CLIP) * m).sum() / (tokens + TINY)

    got = call(
        "NeMo-RL", device, rewards=d.rewards, values=d.values, old_values=d.old_values, mask=d.mask, sample_mask=samples, gamma=GAMMA,
        clip=CLIP, length_adaptive_alpha=alpha, gae_lambda_value=lam_value, scale=scale, global_valid_toks=tokens,
    )  # fmt: skip
    agree(got, advantages, returns, loss, d.values, d.mask)


@pytest.mark.parametrize("clip", [CLIP, None])
def test_roll(device, clip):
    d = language_data()
    m = d.mask.double()
    advantages = plain_gae((d.rewards * m).T, (d.old_values * m).T).T
    returns = advantages + d.old_values * m

    def loss(values):
        errors = (values - returns) ** 2 if clip is None else squares(values, d.old_values, returns, clip)
        return 0.5 * row_means(errors, m, TINY).mean()

    got = call(
        "ROLL", device, rewards=d.rewards, values=d.values, old_values=d.old_values, mask=d.mask, gamma=GAMMA, lam=LAM, clip=clip,
        whiten_advantages=True,
    )  # fmt: skip
    agree(got, whiten(advantages, d.mask, tiny=TINY), returns, loss, d.values, d.mask)


def packed_data():
    d = language_data()
    lengths = torch.tensor([9, 4, 7, 2, 5])
    keep = torch.arange(T) < lengths[:, None]
    bounds = F.pad(lengths.cumsum(0), (1, 0))
    return SimpleNamespace(**{name: x[keep] for name, x in vars(d).items()}, bounds=bounds)


def segments(x, bounds):
    return [x[a:b] for a, b in zip(bounds.tolist(), bounds.tolist()[1:])]


def sum_of_sample_means(errors, mask, bounds):
    return sum((e * m).sum() / m.sum().clamp(min=1) for e, m in zip(segments(errors, bounds), segments(mask.double(), bounds)))


def test_slime(device):
    d = packed_data()
    advantages = torch.cat([plain_gae(r, v) for r, v in zip(segments(d.rewards, d.bounds), segments(d.old_values, d.bounds))])
    returns = advantages + d.old_values

    def loss(values):
        return sum_of_sample_means(squares(values, d.old_values, returns, CLIP), d.mask, d.bounds) / 16

    got = call(
        "slime", device, rewards=d.rewards, values=d.values, old_values=d.old_values, mask=d.mask, cu_seqlens=d.bounds, gamma=GAMMA,
        lam=LAM, clip=CLIP, dp_group=None, global_batch_size=16,
    )  # fmt: skip
    agree(got, whiten(advantages, d.mask), returns, loss, d.values, d.mask)


def test_miles(device):
    d = packed_data()
    terminal = randn(B, seed=77)
    advantages, returns = torch.zeros_like(d.rewards), torch.zeros_like(d.rewards)
    parts = (d.rewards, d.old_values, d.mask, advantages, returns)
    for s, (r, v, m, a, target) in enumerate(zip(*(segments(x, d.bounds) for x in parts))):
        if m.any():
            trainable = r[m].clone()
            trainable[-1] += terminal[s]
            a[m] = plain_gae(trainable, v[m])
            target[m] = a[m] + v[m]

    def loss(values):
        return sum_of_sample_means(squares(values, d.old_values, returns, CLIP), d.mask, d.bounds) / 16

    got = call(
        "miles", device, kl_rewards=d.rewards, terminal_rewards=terminal, values=d.values, old_values=d.old_values, mask=d.mask,
        cu_seqlens=d.bounds, gamma=GAMMA, lam=LAM, clip=CLIP, global_batch_size=16,
    )  # fmt: skip
    agree(got, advantages, returns, loss, d.values)  # it too leaves 0 at masked positions


def test_skyrl(device):
    d = language_data()
    advantages = plain_gae(d.rewards.T, d.old_values.T).T
    returns = advantages + d.old_values
    m = d.mask.double()

    def loss(values):
        errors = squares(values, d.old_values, returns, CLIP)
        return 0.5 * ((errors * m).sum(-1) / m.sum(-1).clamp(min=1)).mean()

    got = call("SkyRL", device, rewards=d.rewards, values=d.values, old_values=d.old_values, mask=d.mask, gamma=GAMMA, lam=LAM, clip=CLIP)
    agree(got, whiten(advantages, d.mask), returns, loss, d.values, d.mask)


def test_deepspeed_chat(device):
    d = language_data()
    start, lengths = 2, torch.tensor([7, 3, 9, 5, 4])
    mask = (torch.arange(T) < lengths[:, None]) & (torch.arange(T) >= start)
    zeroed = torch.arange(T) >= lengths[:, None] + 1
    rewards, old_values = d.rewards.masked_fill(zeroed, 0), d.old_values.masked_fill(zeroed, 0)
    advantages = plain_gae(rewards[:, start:].T, old_values[:, start:].T).T
    returns = advantages + old_values[:, start:]
    m = mask[:, start:].double()

    def loss(values):
        return 0.5 * (squares(values[:, start:], old_values[:, start:], returns, CLIP) * m).sum() / m.sum()

    got = call(
        "DeepSpeed-Chat",
        device,
        rewards=rewards,
        values=d.values,
        old_values=old_values,
        mask=mask,
        start=start,
        gamma=GAMMA,
        lam=LAM,
        clip=CLIP,
    )
    agree(got, advantages, returns, loss, d.values)


# --- classic reinforcement learning -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["l2", "l1", "smooth_l1"])
def test_torchrl(device, kind):
    old_values, values = critic(B, T)
    rewards, following = randn(B, T, seed=3), randn(B, T, seed=4)
    terminated = flags(B, T, share=0.2, seed=5)
    done = terminated | flags(B, T, share=0.2, seed=6)
    delta = rewards + GAMMA * ~terminated * following - old_values
    advantages = recursion(delta.T, (GAMMA * LAM * ~done).double().T).T
    returns = advantages + old_values
    distance = {"l2": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}[kind]

    def loss(new):
        clipped = old_values + (new - old_values).clamp(-CLIP, CLIP)
        return 0.8 * torch.maximum(distance(returns, new, reduction="none"), distance(returns, clipped, reduction="none")).mean()

    got = call(
        "TorchRL", device, rewards=rewards, values=values, old_values=old_values, next_values=following, terminated=terminated, done=done,
        gamma=GAMMA, lam=LAM, clip=CLIP, loss_critic_type=kind, critic_coeff=0.8,
    )  # fmt: skip
    agree(got, advantages, returns, loss, values)


def starts_of(ends):
    """The flag of the state at t instead of the step from t: shifted by one, and what is left over behind the last step."""
    return torch.cat([torch.ones_like(ends[:1]), ends[:-1]]), ends[-1]


def test_stable_baselines3(device):
    d = rollout_data()
    starts, last = starts_of(d.ends)
    advantages = plain_gae(d.rewards, d.old_values, d.last_values, d.ends)
    returns = advantages + d.old_values

    def loss(values):
        return 0.5 * F.mse_loss(returns, d.old_values + (values - d.old_values).clamp(-CLIP, CLIP))

    got = call(
        "Stable-Baselines3", device, rewards=d.rewards, values=d.values, old_values=d.old_values, episode_starts=starts, last_dones=last,
        last_values=d.last_values, gamma=GAMMA, lam=LAM, clip=CLIP, vf_coef=0.5,
    )  # fmt: skip
    agree(got, advantages, returns, loss, d.values)


def test_cleanrl(device):
    d = rollout_data()
    dones, next_done = starts_of(d.ends)
    advantages = plain_gae(d.rewards, d.old_values, d.last_values, d.ends)
    returns = advantages + d.old_values
    got = call(
        "CleanRL", device, rewards=d.rewards, values=d.values, old_values=d.old_values, dones=dones.double(), next_done=next_done.double(),
        next_value=d.last_values, gamma=GAMMA, lam=LAM, clip=CLIP, vf_coef=0.5,
    )  # fmt: skip
    agree(got, advantages, returns, lambda values: 0.5 * 0.5 * squares(values, d.old_values, returns, CLIP).mean(), d.values)


def test_rsl_rl(device):
    d = rollout_data()
    time_outs = d.ends & flags(T, B, share=0.5, seed=9)
    rewards = d.rewards + GAMMA * d.old_values * time_outs
    advantages = plain_gae(rewards, d.old_values, d.last_values, d.ends)
    returns = advantages + d.old_values
    got = call(
        "rsl_rl", device, rewards=d.rewards, values=d.values, old_values=d.old_values, dones=d.ends, time_outs=time_outs.double(),
        last_values=d.last_values, gamma=GAMMA, lam=LAM, clip=CLIP, value_loss_coef=0.6,
    )  # fmt: skip
    agree(got, standardise(advantages), returns, lambda values: 0.6 * squares(values, d.old_values, returns, CLIP).mean(), d.values)


@pytest.mark.parametrize("time_limit_bootstrap", [False, True])
def test_skrl(device, time_limit_bootstrap):
    d = rollout_data()
    truncated = flags(T, B, share=0.2, seed=9)
    proceed = ~(d.ends | truncated) if time_limit_bootstrap else ~d.ends
    following = torch.cat([d.old_values[1:], d.last_values[None]])
    advantages, advantage = torch.zeros_like(d.rewards), torch.zeros(B).double()
    for t in reversed(range(T)):
        advantage = d.rewards[t] - d.old_values[t] + GAMMA * proceed[t] * (following[t] + LAM * advantage)
        advantages[t] = advantage
    returns = advantages + d.old_values

    def loss(values):
        return 1.5 * F.mse_loss(returns, d.old_values + (values - d.old_values).clip(-CLIP, CLIP))

    got = call(
        "skrl", device, rewards=d.rewards, values=d.values, old_values=d.old_values, terminated=d.ends, truncated=truncated,
        time_limit_bootstrap=time_limit_bootstrap, last_values=d.last_values, gamma=GAMMA, lam=LAM, clip=CLIP, value_loss_scale=1.5,
    )  # fmt: skip
    agree(got, standardise(advantages), returns, loss, d.values)


@pytest.mark.parametrize("masked", [False, True])
def test_rl_games(device, masked):
    d = rollout_data()
    mask = flags(T, B, share=0.7, seed=9) if masked else torch.ones(T, B, dtype=torch.bool)
    dones, last = starts_of(d.ends)
    proceed = 1 - d.ends.double()
    following = torch.cat([d.old_values[1:], d.last_values[None]])
    delta = d.rewards + GAMMA * proceed * following - d.old_values
    advantages = recursion(delta * mask, GAMMA * LAM * proceed * mask)
    returns = advantages + d.old_values

    def loss(values):
        return 0.5 * 2.0 * (squares(values, d.old_values, returns, CLIP) * mask).sum() / mask.numel()

    got = call(
        "rl_games", device, rewards=d.rewards, values=d.values, old_values=d.old_values, mask=mask, dones=dones, last_dones=last,
        last_values=d.last_values, gamma=GAMMA, lam=LAM, clip=CLIP, critic_coef=2.0,
    )  # fmt: skip
    agree(got, advantages, returns, loss, d.values, mask)


def test_sample_factory(device):
    old_values = randn(B, T + 1, seed=0)
    values, rewards = old_values[:, :-1] + 0.3 * randn(B, T, seed=1), randn(B, T, seed=2)
    valids = flags(B, T + 1, share=0.75, seed=3)
    valids[:, -1] = valids[:, -2]
    dones, ratios = flags(B, T, share=0.2, seed=4).double(), randn(B, T, seed=5).exp()
    v = valids.double()
    delta = (rewards - old_values[:, :-1]) * v[:, :-1] + (1 - dones) * GAMMA * old_values[:, 1:] * v[:, 1:]
    advantages = recursion(delta.T, ((GAMMA * LAM * v + (1 - v))[:, :-1] * (1 - dones)).T).T
    returns = advantages + v[:, :-1] * old_values[:, :-1]

    def loss(new):
        return 0.5 * squares(new, old_values[:, :-1], returns, CLIP)[valids[:, :-1]].mean()

    rho_hat, c_hat = 1.1, 0.9
    got = call(
        "sample-factory", device, rewards=rewards, values=values, old_values=old_values, valids=valids, dones=dones, ratios=ratios,
        gamma=GAMMA, lam=LAM, clip=CLIP, value_loss_coeff=0.5, vtrace_rho=rho_hat, vtrace_c=c_hat,
    )  # fmt: skip
    agree(got, advantages, returns, loss, values)

    following = target = (old_values[:, -2] - rewards[:, -1]) / GAMMA
    for t in reversed(range(T)):
        rho, c, proceed = ratios[:, t].clamp(max=rho_hat), ratios[:, t].clamp(max=c_hat), GAMMA * (1 - dones[:, t])
        value, reward = old_values[:, t], rewards[:, t]
        close(got.pg_advantages[:, t], rho * (reward + proceed * target - value))
        target = value + rho * (reward + proceed * following - value) + proceed * c * (target - following)
        close(got.targets[:, t], target)
        following = value


def test_rllib(device):
    n = 30
    old_values, values = critic(n)
    rewards = randn(n, seed=3)
    last_of_episode = torch.tensor([6, 7, 15, 29])  # the additional steps
    loss_mask = torch.ones(n, dtype=torch.bool)
    loss_mask[last_of_episode] = False
    terminated, truncated = torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)
    truncated[last_of_episode] = True
    terminated[[5, 14]] = True
    truncated[20] = True
    following = torch.cat([old_values[1:], torch.zeros(1).double()])
    delta = rewards + GAMMA * ~terminated * following - old_values
    advantages = recursion(delta, (GAMMA * LAM * ~(terminated | truncated)).double())
    returns = advantages + old_values
    bound = 0.8

    def loss(new):
        return 0.9 * ((new - returns) ** 2).clamp(0, bound)[loss_mask].mean()

    got = call(
        "RLlib", device, rewards=rewards, values=values, old_values=old_values, terminated=terminated, truncated=truncated,
        loss_mask=loss_mask, gamma=GAMMA, lam=LAM, vf_clip_param=bound, vf_loss_coeff=0.9,
    )  # fmt: skip
    agree(got, (advantages - advantages.mean()) / advantages.std(correction=0).clamp(min=1e-4), returns, loss, values)


def test_pufferlib(device):
    old_values, values = critic(B, T)
    rewards, dones, importance = randn(B, T, seed=3), flags(B, T, share=0.2, seed=4).double(), randn(B, T, seed=5).exp()
    rho_clip, c_clip = 1.2, 0.8
    advantages, last = torch.zeros(B, T).double(), torch.zeros(B).double()
    for t in reversed(range(T - 1)):
        proceed = 1 - dones[:, t + 1]
        delta = importance[:, t].clamp(max=rho_clip) * (rewards[:, t + 1] + GAMMA * old_values[:, t + 1] * proceed - old_values[:, t])
        last = delta + GAMMA * LAM * importance[:, t].clamp(max=c_clip) * last * proceed
        advantages[:, t] = last
    returns = advantages + old_values
    got = call(
        "PufferLib", device, rewards=rewards, values=values, old_values=old_values, dones=dones, importance=importance, gamma=GAMMA,
        lam=LAM, clip=CLIP, rho_clip=rho_clip, c_clip=c_clip, vf_coef=2.0,
    )  # fmt: skip
    agree(got, advantages, returns, lambda new: 2.0 * 0.5 * squares(new, old_values, returns, CLIP).mean(), values)


# --- the one-line recurrences of the page -------------------------------------------------------------------------------------------


def test_recurrences(device):
    """Discounted returns, TD(lambda) and eligibility traces from reverse_scan, as the page's table writes them."""
    text = semantics_page.PAGE.read_text(encoding="utf-8")
    returns_call, td_call, traces_call = (
        line.split("| `")[1].split("` |")[0] for line in text.splitlines() if line.startswith("| ") and "| `reverse_scan(" in line
    )
    r, v_next, done, bootstrap = randn(B, T, seed=0), randn(B, T, seed=1), flags(B, T, share=0.2, seed=2).double(), randn(B, seed=3)
    v_next[:, -1] = bootstrap
    done_before = F.pad(done[:, :-1], (1, 0))
    space = {}
    exec(semantics_page.preamble(), space)
    tensors = {"r": r, "x": r, "V_next": v_next, "done": done, "done_before": done_before, "bootstrap": bootstrap}
    space.update({name: x.to(device) for name, x in tensors.items()}, gamma=GAMMA, lam=LAM)
    discounted = td = bootstrap
    for t in reversed(range(T)):
        proceed = GAMMA * (1 - done[:, t])
        discounted = r[:, t] + proceed * discounted
        td = r[:, t] + proceed * ((1 - LAM) * v_next[:, t] + LAM * td)
        close(eval(returns_call, space)[:, t], discounted)
        close(eval(td_call, space)[:, t], td)
    trace = torch.zeros(B).double()
    for t in range(T):
        trace = r[:, t] + GAMMA * LAM * (1 - done_before[:, t]) * trace
        close(eval(traces_call, space)[:, t], trace)


def test_every_trainer_of_the_table_has_a_call_and_a_test():
    text = semantics_page.PAGE.read_text(encoding="utf-8")
    table = text.split("### At a glance")[1].split("###")[0]
    trainers = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")][1:]
    sections = {block.section for block in semantics_page.blocks()}
    assert len(trainers) == 19 and set(trainers) <= sections
    for trainer in trainers:
        assert f"test_{trainer.lower().replace('-', '_')}" in globals(), trainer
