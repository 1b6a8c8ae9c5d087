"""The critic's lines of TRL's PPO, from its wheel (wheel_source.py).

They stand in the middle of ``PPOTrainer.train``. Here each stretch of them is a function, whose body is compiled from the wheel's source
and which hands in what the trainer has in its variables at that point.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import verl_wheel
import wheel_source

VERSION = "1.9.0"
PPO_TRAINER = "trl/experimental/ppo/ppo_trainer.py"


class Critic:
    """`masked_mean`, `masked_whiten`: TRL's functions. The methods: TRL's lines, with the trainer's names."""

    def __init__(self, download: bool = True):
        cache = verl_wheel.cache_dir()
        path = wheel_source.unpacked(wheel_source.wheel("trl", VERSION, cache, download), cache) / PPO_TRAINER
        functions = wheel_source.execute(path, ["masked_mean", "masked_var", "masked_whiten"], torch=torch)
        self.masked_mean, self.masked_whiten = functions.masked_mean, functions.masked_whiten

        self._from_logprobs = wheel_source.statements(path, "response_idxs = ", "advantages = ")
        self._gae = wheel_source.statements(path, "lastgaelam = 0", "advantages = ")
        self._value_loss = wheel_source.statements(path, "vpred = ", "vf_clipfrac = ")

    def from_logprobs(self, responses, logprobs, ref_logprobs, sequence_lengths, values, scores, **args) -> SimpleNamespace:
        """Everything from the padding masks on: values without padding, rewards, advantages, returns. All of the trainer's variables."""
        return self._run(
            self._from_logprobs, responses=responses, logprobs=logprobs, ref_logprobs=ref_logprobs, sequence_lengths=sequence_lengths,
            values=values, scores=scores, INVALID_LOGPROB=1.0, args=SimpleNamespace(**args),
        )  # fmt: skip

    def advantages_and_returns(self, rewards, values, padding_mask, gamma, lam):
        args = SimpleNamespace(gamma=gamma, lam=lam)
        left = self._run(self._gae, rewards=rewards, values=values, padding_mask=padding_mask, responses=rewards, args=args)
        return left.advantages, left.returns

    def value_loss(self, vpred_temp, context_length, mb_values, mb_return, padding_mask_p1, cliprange_value):
        """`vpred_temp`: [B, context_length + T, 1], the value model's output."""
        left = self._run(
            self._value_loss, vpred_temp=vpred_temp, context_length=context_length, mb_values=mb_values, mb_return=mb_return,
            padding_mask_p1=padding_mask_p1, micro_batch_inds=slice(None), args=SimpleNamespace(cliprange_value=cliprange_value),
        )  # fmt: skip
        return left.vf_loss, left.vf_clipfrac

    def _run(self, code, **variables) -> SimpleNamespace:
        scope = {"torch": torch, "masked_mean": self.masked_mean, "masked_whiten": self.masked_whiten, **variables}
        exec(code, scope)
        return SimpleNamespace(**scope)
