"""The critic's update of verl, run twice from the same seed: with verl's own functions, and with fused_critic installed into verl.

A small transformer learns the value of tokens that somebody else writes: each response token that equals the prompt's last one is
rewarded, how likely that is depends on the prompt, and stretches in between are a tool's and masked. Advantages and returns are made
as verl's driver does, padded; the batch then goes to a worker as verl's does, jagged (torch.nested), and is updated on in epochs of
micro-batches by ``verl.workers.utils.losses.value_loss``, normalised over the whole batch. Those functions are verl's real ones: of the
installed verl, or, where there is none, of the wheel of 0.9.1 (which pip downloads at the first time), with empty stand-ins for the packages
that verl imports and the loss never uses. What is not verl's is the loop around them, since its engine wants GPUs. The two runs take
their steps in turn, so that what else happens on the machine slows both of them.

    python examples/trainers/verl_critic.py [--steps N] [--seed N] [--quick] [--plot PATH]
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ContextManager, NamedTuple

import torch
from fused_critic.integrations import verl as fused_verl
from torch import Tensor, nn
from tqdm import tqdm

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parent), str(HERE.parents[1] / "tests")]
# Files of this repository, no packages: Python finds them from here on, which is why these imports are not at the top (E402).
import verl_session  # noqa: E402
import verl_wheel  # noqa: E402
from _report import Run, arguments, compare  # noqa: E402
from ppo_lm import Block  # noqa: E402
from verl_wheel import Batch, jagged  # noqa: E402

VOCAB = 16
PROMPTS = (3, 8)  # the least and the largest number of tokens
TOOL_CALLS, TOOL_TOKENS = 0.04, 5  # how likely one begins at a token, and how much it writes
EPOCHS, MICRO_BATCHES = 4, 2
GAMMA, LAM, LEARNING_RATE, CLIP_GRAD = 0.95, 0.95, 3e-3, 1.0
# Of verl's CriticConfig what the loss reads, at its defaults.
CONFIG = SimpleNamespace(cliprange_value=0.5, loss_agg_mode="token-mean", loss_scale_factor=None)


class Size(NamedTuple):
    sequences: int  # per step
    length: int  # tokens of a response at most
    dim: int


FULL, QUICK = Size(32, 192, 32), Size(16, 64, 16)


def verl_modules() -> tuple[ModuleType, ModuleType]:
    """verl.trainer.ppo.core_algos and verl.workers.utils.losses."""
    if importlib.util.find_spec("verl") is None:
        sys.path.insert(0, str(verl_wheel.unpacked()))
        verl_session.stub_missing_dependencies()
    import verl.trainer.ppo.core_algos as core_algos
    import verl.workers.utils.losses as losses

    return core_algos, losses


class Critic(nn.Module):
    def __init__(self, longest: int, dim: int):
        super().__init__()
        self.token, self.position = nn.Embedding(VOCAB, dim), nn.Embedding(longest, dim)
        self.blocks = nn.ModuleList(Block(dim, heads=4) for _ in range(2))
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        """Jagged [B, T*] -> jagged [B, T*], as verl's engine has it: padded for the model, its values cut out again."""
        padded = tokens.to_padded_tensor(0)
        x = self.token(padded) + self.position.weight[: padded.shape[1]]
        for block in self.blocks:
            x, _ = block(x, None)
        inside = torch.arange(padded.shape[1]) < tokens.offsets().diff()[:, None]
        return torch.nested.nested_tensor_from_jagged(self.head(x).squeeze(-1)[inside], tokens.offsets())


class Rollout(NamedTuple):
    prompts: list[Tensor]
    responses: list[Tensor]
    rewards: Tensor  # [B, T], padded behind, as the two that follow
    mask: Tensor

    def tokens(self) -> Tensor:
        return jagged([torch.cat(both) for both in zip(self.prompts, self.responses)])


def rollout(size: Size, generator: torch.Generator) -> Rollout:
    """Of a policy that is fixed. The last token of a prompt is k; a token equals k with a probability that grows with k."""

    def integers(least: int, most: int, count: int) -> Tensor:
        return torch.randint(least, most + 1, (count,), generator=generator)

    shape = (size.sequences, size.length)
    prompts = [integers(0, VOCAB - 1, n) for n in integers(*PROMPTS, size.sequences).tolist()]
    lengths = integers(size.length // 8, size.length, size.sequences)
    wanted = torch.stack([prompt[-1] for prompt in prompts])[:, None]
    hit = torch.rand(shape, generator=generator) < wanted / VOCAB
    tokens = torch.where(hit, wanted, torch.randint(VOCAB, shape, generator=generator))
    calls = (torch.rand(shape, generator=generator) < TOOL_CALLS).float()
    tool = nn.functional.max_pool1d(nn.functional.pad(calls, (TOOL_TOKENS - 1, 0)), TOOL_TOKENS, stride=1).bool()
    mask = (torch.arange(size.length) < lengths[:, None]) & ~tool
    responses = [row[:n] for row, n in zip(tokens, lengths.tolist())]
    return Rollout(prompts, responses, ((tokens == wanted) & mask).float(), mask)


class Trainer:
    """One of the two runs. `installed`: makes the block in which verl's functions are those that are wanted."""

    def __init__(self, modules: tuple[ModuleType, ModuleType], installed: Callable[[], ContextManager[Any]], size: Size, seed: int):
        (self.core_algos, self.losses), self.installed, self.size = modules, installed, size
        self.generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.critic = Critic(PROMPTS[1] + size.length, size.dim)
        # eps above rounding: the keys' biases have no gradient but rounding's, which Adam would scale up to whole steps.
        self.optimizer = torch.optim.AdamW(self.critic.parameters(), lr=LEARNING_RATE, eps=1e-5)
        self.run = Run([], [], [])
        self.metrics: list[dict[str, Any]] = []  # of every micro-batch
        self.first_gradients: list[Tensor] = []

    def step(self) -> None:
        data = rollout(self.size, self.generator)
        with self.installed():
            start, self.critic_seconds = time.perf_counter(), 0.0
            batch = self.driver(data)
            losses = [self.update(batch) for _ in range(EPOCHS)]
            self.run.seconds_per_step.append(time.perf_counter() - start)
        self.run.critic_seconds_per_step.append(self.critic_seconds)
        self.run.curve.append(losses[0])

    @torch.no_grad()
    def driver(self, data: Rollout) -> list[Batch]:
        """Values, advantages and returns of the rollout; the micro-batches for the worker."""
        tokens = data.tokens()
        lengths = [len(response) for response in data.responses]
        rows = [row[-n - 1 : -1] for row, n in zip(self.critic(tokens).unbind(), lengths)]  # of the position before each response token
        values = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        width, mask = values.shape[1], data.mask
        with self.timed():
            compute_gae = self.core_algos.get_adv_estimator_fn("gae")
            _, returns = compute_gae(data.rewards[:, :width], values, mask[:, :width].float(), GAMMA, LAM)
        batches = []
        for indices in torch.arange(self.size.sequences).chunk(MICRO_BATCHES):
            chosen = [(i, lengths[i]) for i in indices.tolist()]
            batches.append(
                Batch(
                    prompts=jagged([data.prompts[i] for i, _ in chosen]),
                    responses=jagged([data.responses[i] for i, _ in chosen]),
                    values=jagged([values[i, :n] for i, n in chosen]),
                    returns=jagged([returns[i, :n] for i, n in chosen]),
                    response_mask=jagged([mask[i, :n] for i, n in chosen]),
                    input_ids=jagged([torch.cat([data.prompts[i], data.responses[i]]) for i, _ in chosen]),
                    dp_size=1,
                    batch_num_tokens=int(mask.sum()),
                    global_batch_size=self.size.sequences,
                )
            )
        return batches

    def update(self, batches: list[Batch]) -> float:
        """One optimiser step on the accumulated gradients of the micro-batches, as verl's engine takes it; the loss."""
        self.optimizer.zero_grad()
        for batch in batches:
            predictions = self.critic(batch["input_ids"])
            leaf = predictions.detach().requires_grad_()  # so that the loss's own backward can be timed
            with self.timed():
                loss, metrics = self.losses.value_loss(config=CONFIG, model_output={"values": leaf}, data=batch, dp_group=None)
                loss.backward()
            predictions.backward(leaf.grad)
            self.metrics.append(metrics)
        nn.utils.clip_grad_norm_(self.critic.parameters(), CLIP_GRAD)
        self.first_gradients = self.first_gradients or [parameter.grad.clone() for parameter in self.critic.parameters()]
        self.optimizer.step()
        return sum(metrics["critic/vf_loss"].aggregate() for metrics in self.metrics[-len(batches) :])

    @contextlib.contextmanager
    def timed(self):
        start = time.perf_counter()
        yield
        self.critic_seconds += time.perf_counter() - start


def trainers(modules: tuple[ModuleType, ModuleType], size: Size, seed: int) -> tuple[Trainer, Trainer]:
    """With verl's own functions, and with ours."""
    return Trainer(modules, contextlib.nullcontext, size, seed), Trainer(modules, fused_verl.install, size, seed)


def main() -> None:
    args = arguments(__doc__, steps=30, quick_steps=5, plot="verl_critic.png")
    try:
        modules = verl_modules()
    except verl_wheel.VerlUnavailable as reason:
        sys.exit(f"verl {verl_wheel.VERSION} is not to be had: {reason}")
    size = QUICK if args.quick else FULL
    theirs, ours = both = trainers(modules, size, args.seed)
    progress = tqdm(range(args.steps), unit="step", dynamic_ncols=True)
    for _ in progress:
        for trainer in both:
            trainer.step()
        progress.set_postfix_str(" and ".join(f"{trainer.run.curve[-1]:.5f}" for trainer in both))
    title = f"The critic's update of verl {sys.modules['verl'].__version__}: {size.sequences} responses of up to {size.length} tokens"
    compare(title, ours.run, theirs.run, trainer="verl", quantity="value loss", path=args.plot)
    pairs = zip(ours.critic.parameters(), theirs.critic.parameters())
    print(f"largest difference of the two critics' weights: {max((a - b).abs().max().item() for a, b in pairs):.3g}")


if __name__ == "__main__":
    main()
