"""PPO for a language model, in miniature: a transformer learns to reverse digits from a reward alone.

The prompt holds 3 to 12 digits; the model has to write them in reverse order and then <eos>. Responses are sampled token by
token and end at <eos>, so they differ in length and what lies behind <eos> is padding that the mask excludes. Up to the first
mistake each token earns its share of 1, so a response's reward is the share of its target that it got right.

The critic's side of PPO is fused_critic.gae and fused_critic.value_loss; everything else is plain PyTorch.

    python examples/ppo_lm.py [--steps N] [--seed N] [--device cpu|cuda] [--plot PATH]
"""

import argparse
import functools
import operator
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import fused_critic
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from tqdm import tqdm

PAD, SEP, EOS, VOCAB = 10, 11, 12, 13  # the digits 0-9 are their own tokens
MIN_DIGITS, MAX_DIGITS = 3, 12
PROMPT_LEN, MAX_RESPONSE = MAX_DIGITS + 1, MAX_DIGITS + 1  # one more than the digits: for SEP, and for EOS

ROLLOUTS = 256  # responses per step
EPOCHS, MINIBATCHES = 3, 4
GAMMA, LAM = 1.0, 0.95
POLICY_CLIP, VALUE_CLIP = 0.2, 0.2
ENTROPY_COEF = 0.003
LEARNING_RATE, FINAL_LEARNING_RATE = 2e-3, 2e-4  # linear in between
SUMMARY_STEPS = 10  # the figures for "start" and "end" are means over so many steps


# ---- the task --------------------------------------------------------------------------------------------------------


def sample_prompts(n: int) -> tuple[Tensor, Tensor]:
    """Prompts [n, PROMPT_LEN]: padding, digits, SEP. Targets [n, MAX_RESPONSE]: the digits backwards, EOS, padding."""
    count = torch.randint(MIN_DIGITS, MAX_DIGITS + 1, (n, 1))
    digits = torch.randint(0, 10, (n, MAX_DIGITS)).masked_fill(torch.arange(MAX_DIGITS) < MAX_DIGITS - count, PAD)
    return F.pad(digits, (0, 1), value=SEP), F.pad(digits.flip(1), (0, 1), value=PAD).scatter(1, count, EOS)


def score(responses: Tensor, targets: Tensor) -> Tensor:
    """The reward of each token, [B, T]: up to the first mistake its share of the target (EOS included), then 0."""
    wanted = targets != PAD
    hits = (responses == targets[:, : responses.shape[1]]) & wanted[:, : responses.shape[1]]
    return hits.int().cumprod(dim=1) / wanted.sum(dim=1, keepdim=True)


# ---- the models ------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        q, *new = self.qkv(self.norm1(x)).unflatten(2, (3 * self.heads, -1)).transpose(1, 2).chunk(3, dim=1)
        kv = torch.stack(new) if past is None else torch.cat([past, torch.stack(new)], dim=3)
        attended = F.scaled_dot_product_attention(q, kv[0], kv[1], is_causal=past is None)  # with a past: one query that sees everything
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x)), kv


class Transformer(nn.Module):
    """A causal transformer: the actor with one output per token of the vocabulary, the critic with a single one."""

    def __init__(
        self, outputs: int, vocab: int = VOCAB, longest: int = PROMPT_LEN + MAX_RESPONSE, dim: int = 64, heads: int = 4, depth: int = 2
    ):
        super().__init__()
        self.token, self.position = nn.Embedding(vocab, dim), nn.Embedding(longest, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        last = nn.Linear(dim, outputs)
        nn.init.normal_(last.weight, std=0.01)  # start with a uniform policy and values near 0
        nn.init.zeros_(last.bias)
        self.head = nn.Sequential(nn.LayerNorm(dim), last)

    def forward(self, tokens: Tensor, cache: list[Tensor | None] | None = None) -> Tensor:
        """tokens [B, L] -> [B, L, outputs]. With a cache, tokens continue those that it was filled with; it is extended in place."""
        cache = [None] * len(self.blocks) if cache is None else cache
        past = cache[0]
        start = 0 if past is None else past.shape[3]
        x: Tensor = self.token(tokens) + self.position.weight[start : start + tokens.shape[1]]
        for i, block in enumerate(self.blocks):
            x, cache[i] = block(x, cache[i])
        outputs: Tensor = self.head(x)
        return outputs


def on_responses(model: Transformer, tokens: Tensor) -> Tensor:
    """The model's outputs at the positions from which the response's tokens are predicted, [B, T, outputs]."""
    outputs: Tensor = model(tokens[:, :-1])
    return outputs[:, PROMPT_LEN - 1 :]


# ---- PPO -------------------------------------------------------------------------------------------------------------


class Rollout(NamedTuple):
    tokens: Tensor  # [B, PROMPT_LEN + T]; the others are [B, T]
    mask: Tensor  # true up to and including EOS
    log_probs: Tensor
    values: Tensor
    rewards: Tensor


@torch.no_grad()
def sample(actor: Transformer, critic: Transformer, n: int, device: torch.device) -> Rollout:
    prompts, targets = (x.to(device) for x in sample_prompts(n))
    written, log_probs = [prompts], []
    mask: list[Tensor] = []
    cache: list[Tensor | None] = [None] * len(actor.blocks)
    alive = torch.ones(n, dtype=torch.bool, device=device)
    while len(mask) < MAX_RESPONSE and alive.any():
        policy = torch.distributions.Categorical(logits=actor(written[-1], cache)[:, -1])
        token = policy.sample()
        mask.append(alive)
        log_probs.append(policy.log_prob(token))
        written.append(torch.where(alive, token, PAD)[:, None])
        alive = alive & (token != EOS)
    tokens = torch.cat(written, dim=1)
    values, rewards = on_responses(critic, tokens).squeeze(-1), score(tokens[:, PROMPT_LEN:], targets)
    return Rollout(tokens, torch.stack(mask, dim=1), torch.stack(log_probs, dim=1), values, rewards)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum()


def update(
    actor: Transformer, critic: Transformer, optimizer: torch.optim.Optimizer, rollout: Rollout
) -> tuple[fused_critic.ValueLossStats, Tensor]:
    """One PPO step on a rollout. Returns the value loss's statistics over the first epoch and the policy's mean entropy."""
    advantages, returns = fused_critic.gae(rollout.rewards, rollout.values, rollout.mask, gamma=GAMMA, lam=LAM, whiten=True)

    stats: fused_critic.ValueLossStats | None = None
    entropies = []
    for epoch in range(EPOCHS):
        for rows in torch.randperm(len(returns), device=returns.device).chunk(MINIBATCHES):
            tokens, mask, old_log_probs, old_values, _ = (x[rows] for x in rollout)
            responses = tokens[:, PROMPT_LEN:]

            log_probs = on_responses(actor, tokens).log_softmax(dim=-1)
            entropy = masked_mean(-(log_probs.exp() * log_probs).sum(dim=-1), mask)
            ratio = (log_probs.gather(2, responses[..., None]).squeeze(-1) - old_log_probs).exp()
            gain = torch.minimum(ratio * advantages[rows], ratio.clamp(1 - POLICY_CLIP, 1 + POLICY_CLIP) * advantages[rows])
            policy_loss = -masked_mean(gain, mask)

            values = on_responses(critic, tokens).squeeze(-1)
            value_loss, batch_stats = fused_critic.value_loss(values, old_values, returns[rows], mask, clip_range=VALUE_CLIP)

            optimizer.zero_grad()
            (policy_loss - ENTROPY_COEF * entropy + value_loss).backward()
            nn.utils.clip_grad_norm_(actor.parameters(), 1.0)
            nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
            optimizer.step()

            entropies.append(entropy.detach())
            if epoch == 0:  # later epochs see returns that the critic was already fitted to
                stats = batch_stats if stats is None else stats + batch_stats
    assert stats is not None
    return stats, torch.stack(entropies).mean()


# ---- what the critic's side costs --------------------------------------------------------------------------------------


def eager_gae(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """GAE and whitening by the formulas that verl uses, in eager PyTorch: a loop over the tokens that carries state over masked ones."""
    mask = mask.to(values.dtype)
    advantage: Tensor | float = 0.0
    next_value: Tensor | float = 0.0
    reversed_advantages = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + GAMMA * next_value - values[:, t]
        step = delta + GAMMA * LAM * advantage
        next_value = mask[:, t] * values[:, t] + (1 - mask[:, t]) * next_value
        advantage = mask[:, t] * step + (1 - mask[:, t]) * advantage
        reversed_advantages.append(advantage)
    advantages = torch.stack(reversed_advantages[::-1], dim=1)
    returns = advantages + values
    count = mask.sum()
    mean = (advantages * mask).sum() / count
    variance = ((advantages - mean).square() * mask).sum() / (count - 1)
    return (advantages - mean) * (variance + 1e-8).rsqrt(), returns


def eager_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The clipped value loss and the clipped fraction by the formulas that verl uses, in eager PyTorch."""
    clipped_values = torch.maximum(torch.minimum(values, old_values + VALUE_CLIP), old_values - VALUE_CLIP)
    unclipped, clipped = (values - returns) ** 2, (clipped_values - returns) ** 2
    losses = torch.where(mask, torch.maximum(unclipped, clipped), 0.0)
    fraction = ((clipped > unclipped) * mask).sum() / (mask.sum() + 1e-8)
    return 0.5 * losses.sum() / mask.sum(), fraction


class Cost(NamedTuple):
    """Seconds that one PPO step spends on the critic's side."""

    gae: float  # whitening included
    value_loss: float  # forward and backward, every minibatch of every epoch
    share: float = 0.0  # of the step's time


def critic_cost(rollout: Rollout, gae: Callable[..., tuple[Tensor, Tensor]], value_loss: Callable[..., Any]) -> Cost:
    def advantages_and_returns() -> tuple[Tensor, Tensor]:
        return gae(rollout.rewards, rollout.values, rollout.mask)

    rows = slice(0, len(rollout.values) // MINIBATCHES)
    values = rollout.values[rows].clone().requires_grad_()
    data = (rollout.values[rows], advantages_and_returns()[1][rows], rollout.mask[rows])

    def forward_backward() -> None:
        values.grad = None
        value_loss(values, *data)[0].backward()

    def median_seconds(function: Callable[[], Any]) -> float:
        timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
        return float(timer.blocked_autorange(min_run_time=0.5).median)

    return Cost(median_seconds(advantages_and_returns), EPOCHS * MINIBATCHES * median_seconds(forward_backward))


def compare_costs(rollout: Rollout, step_seconds: float) -> dict[str, Cost]:
    fused = critic_cost(
        rollout,
        lambda rewards, values, mask: fused_critic.gae(rewards, values, mask, gamma=GAMMA, lam=LAM, whiten=True),
        lambda *tensors: fused_critic.value_loss(*tensors, clip_range=VALUE_CLIP),
    )
    eager = critic_cost(rollout, eager_gae, eager_value_loss)
    other = step_seconds - fused.gae - fused.value_loss
    return {
        name: cost._replace(share=(cost.gae + cost.value_loss) / (other + cost.gae + cost.value_loss))
        for name, cost in {"fused_critic": fused, "the formulas that verl uses,\nin eager PyTorch": eager}.items()
    }


# ---- the run ---------------------------------------------------------------------------------------------------------


def plot(path: Path, rewards: list[float], explained: list[float], costs: dict[str, Cost]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for axes, series, color, title in (
        (left, rewards, "tab:blue", "Mean reward"),
        (middle, explained, "tab:green", "Explained variance of the critic"),
    ):
        axes.plot(series, color=color)
        axes.axhline(1, color="grey", linewidth=0.8, linestyle=":")
        axes.set(title=title, xlabel="PPO step", ylim=(-0.25, 1.05))
    for i, cost in enumerate(costs.values()):
        gae, value_loss = 1e3 * cost.gae, 1e3 * cost.value_loss
        right.bar(i, gae, width=0.6, color="tab:orange", label="GAE and whitening" if i == 0 else None)
        right.bar(i, value_loss, bottom=gae, width=0.6, color="tab:purple", label="value loss, forward and backward" if i == 0 else None)
        right.text(i, gae + value_loss, f"{gae + value_loss:.2f} ms\n{cost.share:.2%} of the step", ha="center", va="bottom")
    right.set(title="GAE and value loss in one PPO step", ylabel="ms", xticks=range(len(costs)), xticklabels=costs)
    right.set_ylim(0, 1.4e3 * max(cost.gae + cost.value_loss for cost in costs.values()))
    right.legend(loc="upper left", frameon=False)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--max-seconds", type=float, default=150, help="stop training after so long, whatever --steps says")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plot", type=Path, default=Path(__file__).parent / "out" / "ppo_lm.png")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    actor, critic = Transformer(VOCAB).to(device), Transformer(1).to(device)
    optimizer = torch.optim.Adam([*actor.parameters(), *critic.parameters()], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, FINAL_LEARNING_RATE / LEARNING_RATE, total_iters=args.steps)

    rewards, all_stats, explained, seconds = [], [], [], []
    progress = tqdm(range(args.steps), unit="step", dynamic_ncols=True)
    for _ in progress:
        start = time.perf_counter()
        rollout = sample(actor, critic, ROLLOUTS, device)
        stats, entropy = update(actor, critic, optimizer, rollout)
        schedule.step()
        summary = stats.to_dict()  # one wait for the device, however many figures are read
        rewards.append(rollout.rewards.sum(dim=1).mean().item())
        all_stats.append(stats)
        explained.append(summary["explained_variance"])
        seconds.append(time.perf_counter() - start)
        progress.set_postfix_str(
            f"reward {rewards[-1]:.3f}, value loss {summary['loss_mean']:.4f}, "
            f"explained variance {explained[-1]:.2f}, entropy {entropy:.2f}"
        )
        if sum(seconds) > args.max_seconds:
            progress.close()
            print(f"stopped after step {len(seconds)} of {args.steps}: --max-seconds {args.max_seconds:g}")
            break

    step_seconds = statistics.median(seconds[-SUMMARY_STEPS:])
    costs = compare_costs(rollout, step_seconds)
    plot(args.plot, rewards, explained, costs)

    def explained_variance(stats: list[fused_critic.ValueLossStats]) -> float:
        # Statistics merge exactly: this is the figure for all tokens of these steps
        return functools.reduce(operator.add, stats).to_dict()["explained_variance"]

    first, last = slice(None, SUMMARY_STEPS), slice(-SUMMARY_STEPS, None)
    print(f"GAE and value loss in one PPO step of {1e3 * step_seconds:.0f} ms, on the tensors of the last rollout:")
    for name, cost in costs.items():
        name = " ".join(name.split())
        print(f"  {name:46s} GAE {1e6 * cost.gae:5.0f} us + value loss {1e6 * cost.value_loss:5.0f} us = {cost.share:.2%} of the step")
    print(f"plot: {args.plot}")
    print(f"explained variance of the critic: {explained_variance(all_stats[first]):.3f} -> {explained_variance(all_stats[last]):.3f}")
    print(f"mean reward: {statistics.mean(rewards[first]):.3f} -> {statistics.mean(rewards[last]):.3f}")


if __name__ == "__main__":
    main()
