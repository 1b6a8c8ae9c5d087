"""TRL's PPO (1.9.0) in miniature, trained twice from the same seed: with TRL's own critic lines, and with fused_critic.

A small transformer reads a number and has to answer with as many x, then <eos>. The loop is that of trl.experimental.ppo: a KL penalty
against the first policy in the rewards, the score at the end, the padding masks `padding_mask` and `padding_mask_p1`, epochs of shuffled
minibatches, TRL's default coefficients. GAE with its whitening and the clipped value loss are, in one run, TRL's statements, compiled
from the source in its wheel (which pip downloads at the first time), and in the other run fused_critic.integrations.trl. The two runs
take their steps in turn, so that what else happens on the machine slows both of them.

Models and critic are in float64. Two runs that differ by rounding alone will sooner or later sample another token, and from there on they
are as far apart as two seeds; in float64 that is later. The last line of the output tells when.

    python examples/trainers/trl_ppo.py [--steps N] [--seed N] [--quick] [--plot PATH]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from fused_critic.integrations import trl as fused_trl
from torch import Tensor
from tqdm import tqdm

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parent), str(HERE.parents[1] / "tests")]
# Files of this repository, no packages: Python finds them from here on, which is why these imports are not at the top (E402).
import trl_wheel  # noqa: E402
import wheel_source  # noqa: E402
from _report import Run, arguments, compare  # noqa: E402
from ppo_lm import Transformer  # noqa: E402

PAD, EOS, X, SEP = range(4)
LEAST, MOST = 2, 8  # x to write; the number n is the token SEP + n
VOCAB, CONTEXT = SEP + MOST + 1, 2  # number, SEP

# TRL's defaults, apart from the learning rate.
EPOCHS, VF_COEF, CLIP, VALUE_CLIP, GAMMA, LAM, KL_COEF = 4, 0.1, 0.2, 0.2, 1.0, 0.95, 0.05
MINIBATCHES, LEARNING_RATE, MISSING_EOS_PENALTY = 2, 1e-3, 1.0


class Size(NamedTuple):
    responses: int  # per step
    length: int  # tokens of a response at most
    dim: int


FULL, QUICK = Size(64, 32, 32), Size(16, 16, 16)


# ---- the critic's two implementations ----------------------------------------------------------------------------------------------


class Critic(Protocol):
    def advantages_and_returns(
        self, rewards: Tensor, values: Tensor, padding_mask: Tensor, gamma: float, lam: float
    ) -> tuple[Tensor, Tensor]: ...

    def value_loss(
        self,
        vpred_temp: Tensor,
        context_length: int,
        mb_values: Tensor,
        mb_return: Tensor,
        padding_mask_p1: Tensor,
        cliprange_value: float,
    ) -> tuple[Tensor, Tensor]: ...


class FusedCritic:
    advantages_and_returns = staticmethod(fused_trl.advantages_and_returns)

    def value_loss(
        self,
        vpred_temp: Tensor,
        context_length: int,
        mb_values: Tensor,
        mb_return: Tensor,
        padding_mask_p1: Tensor,
        cliprange_value: float,
    ) -> tuple[Tensor, Tensor]:
        vpred = vpred_temp[:, context_length - 1 : -1].squeeze(-1)
        return fused_trl.value_loss(vpred, mb_values, mb_return, padding_mask_p1, cliprange_value)


# ---- PPO as TRL has it -------------------------------------------------------------------------------------------------------------


def chosen_logprobs(logits: Tensor, responses: Tensor) -> Tensor:
    """Of the tokens that were sampled, from the logits of the whole sequence."""
    return logits[:, CONTEXT - 1 : -1].log_softmax(-1).gather(2, responses[..., None]).squeeze(-1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum().clamp(min=1)


class Trainer:
    def __init__(self, critic: Critic, size: Size, seed: int):
        torch.manual_seed(seed)
        self.critic, self.size = critic, size
        self.generator = torch.Generator().manual_seed(seed)
        shape = dict(vocab=VOCAB, longest=CONTEXT + size.length, dim=size.dim, heads=2)
        self.policy, self.reference, self.value_model = (Transformer(outputs, **shape) for outputs in (VOCAB, VOCAB, 1))
        self.reference.load_state_dict(self.policy.state_dict())
        self.optimizer = torch.optim.Adam([*self.policy.parameters(), *self.value_model.parameters()], lr=LEARNING_RATE)
        self.scores: list[float] = []
        self.seconds: list[float] = []
        self.critic_seconds: list[float] = []

    def run(self) -> Run:
        return Run(self.scores, self.seconds, self.critic_seconds)

    def step(self) -> None:
        start = time.perf_counter()
        self.critic_seconds.append(0.0)
        self.scores.append(self.update(*self.sample()))
        self.seconds.append(time.perf_counter() - start)

    @torch.no_grad()
    def sample(self) -> tuple[Tensor, Tensor]:
        """Sequences [B, CONTEXT + T], padded behind <eos>, and the numbers in their contexts [B]."""
        number = torch.randint(LEAST, MOST + 1, (self.size.responses,), generator=self.generator)
        tokens = [torch.stack([number + SEP, torch.full_like(number, SEP)], dim=1)]
        cache: list[Tensor | None] = [None] * len(self.policy.blocks)
        alive = torch.ones(self.size.responses, dtype=torch.bool)
        for _ in range(self.size.length):
            probabilities = self.policy(tokens[-1], cache)[:, -1].softmax(-1)
            token = torch.multinomial(probabilities, 1, generator=self.generator).squeeze(1)
            tokens.append(torch.where(alive, token, PAD)[:, None])
            alive &= (token != EOS) & (token != PAD)
        return torch.cat(tokens, dim=1), number

    def update(self, query_responses: Tensor, number: Tensor) -> float:
        """One PPO step. Returns the mean score."""
        responses = query_responses[:, CONTEXT:]
        with torch.no_grad():
            logprobs, ref_logprobs = (chosen_logprobs(model(query_responses), responses) for model in (self.policy, self.reference))
            values = self.value_model(query_responses)[:, CONTEXT - 1 : -1].squeeze(-1)

        count, ended = (responses == X).sum(1), (responses == EOS).any(1)
        scores = 1 - ((count - number).abs() / number).clamp(max=1) - MISSING_EOS_PENALTY * ~ended
        last = (responses != PAD).sum(1, keepdim=True) - 1
        position = torch.arange(self.size.length)
        padding_mask, padding_mask_p1 = position > last, position > last + 1
        values = values.masked_fill(padding_mask_p1, 0)
        rewards = (KL_COEF * (ref_logprobs - logprobs)).masked_fill(padding_mask, 0)
        rewards.scatter_add_(1, (last + 1).clamp(max=self.size.length - 1), scores[:, None])

        start = time.perf_counter()
        with torch.no_grad():
            advantages, returns = self.critic.advantages_and_returns(rewards, values, padding_mask, GAMMA, LAM)
        self.critic_seconds[-1] += time.perf_counter() - start

        for _ in range(EPOCHS):
            for rows in torch.randperm(len(responses), generator=self.generator).chunk(MINIBATCHES):
                ratio = (chosen_logprobs(self.policy(query_responses[rows]), responses[rows]) - logprobs[rows]).exp()
                gain = torch.minimum(ratio * advantages[rows], ratio.clamp(1 - CLIP, 1 + CLIP) * advantages[rows])
                pg_loss = -masked_mean(gain, ~padding_mask[rows])
                vpred_temp = self.value_model(query_responses[rows])
                vpred_gradient = self.value_gradient(vpred_temp, values[rows], returns[rows], padding_mask_p1[rows])
                self.optimizer.zero_grad()
                torch.autograd.backward([pg_loss, vpred_temp], [None, vpred_gradient])
                self.optimizer.step()
        return scores.mean().item()

    def value_gradient(self, vpred_temp: Tensor, mb_values: Tensor, mb_return: Tensor, padding_mask_p1: Tensor) -> Tensor:
        """The gradient of VF_COEF * value loss in the value model's outputs: taken by itself, so that its time can be."""
        leaf = vpred_temp.detach().requires_grad_()
        start = time.perf_counter()
        vf_loss, _ = self.critic.value_loss(leaf, CONTEXT, mb_values, mb_return, padding_mask_p1, VALUE_CLIP)
        (gradient,) = torch.autograd.grad(VF_COEF * vf_loss, leaf)
        self.critic_seconds[-1] += time.perf_counter() - start
        return gradient


def main() -> None:
    torch.set_default_dtype(torch.float64)
    args = arguments(__doc__ or "", steps=60, quick_steps=5, plot="trl_ppo.png")
    try:
        theirs = trl_wheel.Critic()
    except wheel_source.Unavailable as reason:
        sys.exit(f"TRL {trl_wheel.VERSION}'s own lines are not to be had: {reason}")
    size = QUICK if args.quick else FULL
    trainers = [Trainer(critic, size, args.seed) for critic in (theirs, FusedCritic())]
    progress = tqdm(range(args.steps), unit="step", dynamic_ncols=True)
    for _ in progress:
        for trainer in trainers:
            trainer.step()
        progress.set_postfix_str(" and ".join(f"{trainer.scores[-1]:.4f}" for trainer in trainers))
    title = f"PPO as in TRL {trl_wheel.VERSION}: {size.responses} responses of up to {size.length} tokens"
    theirs_run, our_run = (trainer.run() for trainer in trainers)
    compare(title, our_run, theirs_run, trainer="TRL's lines", quantity="mean score", path=args.plot)
    same = [abs(a - b) < 1e-9 for a, b in zip(theirs_run.curve, our_run.curve)]
    print(f"the same tokens were sampled in the first {(same + [False]).index(False)} of {args.steps} steps")


if __name__ == "__main__":
    main()
