"""verl's critic functions (signatures of verl 0.9.1), computed by fused_critic.

``compute_value_loss`` and ``compute_gae_advantage_return`` of ``verl.trainer.ppo.core_algos``, and ``value_loss`` of
``verl.workers.utils.losses``, the loss of the critic's worker. Either call them where verl's own would be called, or let ``install()`` put
them into verl:

    from fused_critic.integrations import verl as fused_verl
    fused_verl.install()          # for good (until uninstall())
    with fused_verl.install():    # for the length of a block
        ...

The critic's worker gets jagged tensors (``torch.nested``). verl cuts them into rows, one Python step and two synchronisations each, and
pads everything; here they are computed as they lie, with one synchronisation before the loss and one for the metrics.

A process has to be patched before it computes, and verl computes the value loss in worker processes. Naming the module
``fused_critic.integrations.verl_autoinstall`` in the environment variable VERL_USE_EXTERNAL_MODULES, which verl reads when it is
imported, does that in every process that inherits the variable.

At valid tokens the results are verl's, whitening included, up to rounding. They differ on purpose in these points:

===================================  ====================================  =====================================================
case                                 verl                                  here
===================================  ====================================  =====================================================
NaN or inf at masked tokens          gradient NaN there; the seq-mean      never used; gradient exactly 0
                                     losses and all of GAE NaN
nothing valid, value loss            NaN (but token-sum)                   loss 0, gradient 0, clip fraction 0
fewer than two valid tokens, GAE     ValueError                            advantages 0; returns as always
GAE at masked tokens                 carried and whitened values           advantages and returns 0
bool mask, GAE                       RuntimeError                          accepted
fractional mask, GAE                 blends the token with its successor   valid wherever non-zero (the loss takes it as a weight)
bf16 or fp16 throughout              computed and returned in half         computed and returned in float32; the range
                                     precision                             ``values +- cliprange_value`` does not collapse
ties of the two losses, bounds       a part of the gradient                the whole gradient wherever the clipped loss is not
of the range                                                               strictly greater
returns or old values that           gradient passed on                    error: they are constants of the loss
require grad
broadcasting, negative cliprange     accepted                              error
float64 mask                         widens the results                    widens the clip fraction only
``critic/vpred_mean`` of a bf16 or   computed in half precision            computed in float64
fp16 critic
===================================  ====================================  =====================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

import torch

import fused_critic

from ._adapter import Adapter, Replacement

__all__ = ["compute_gae_advantage_return", "compute_value_loss", "install", "uninstall", "value_loss"]

_LOSS_AGG_MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")


def compute_value_loss(
    vpreds: torch.Tensor,
    returns: torch.Tensor,
    values: torch.Tensor,
    response_mask: torch.Tensor,
    cliprange_value: float,
    loss_agg_mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: Optional[int] = None,
    global_batch_size: Optional[int] = None,
    loss_scale_factor: Optional[int] = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clipped value loss of ``vpreds`` against ``returns``; ``values`` are the old ones. Returns (loss, clip fraction), two 0-d tensors.

    The counts may be numbers or 0-d tensors. The clip fraction is the local one, whatever the counts, and carries no gradient.
    """
    loss, stats = fused_critic.value_loss(
        vpreds,
        values,
        returns,
        response_mask,
        clip_range=cliprange_value,
        reduction=_checked(loss_agg_mode),
        batch_num_tokens=batch_num_tokens,
        global_batch_size=global_batch_size,
        dp_size=dp_size,
        loss_scale_factor=loss_scale_factor,
    )
    return loss, stats.clip_fraction.to(torch.promote_types(torch.float32, response_mask.dtype))


@torch.no_grad()
def compute_gae_advantage_return(
    token_level_rewards: torch.Tensor,
    values: torch.Tensor,
    response_mask: torch.Tensor,
    gamma: torch.Tensor,
    lam: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages, whitened over the valid tokens, and returns; masked tokens are transparent. ``gamma``, ``lam``: numbers or tensors."""
    advantages, returns = fused_critic.gae(
        token_level_rewards, values, response_mask, gamma=_squeeze_single(gamma), lam=_squeeze_single(lam)
    )
    return fused_critic.masked_whiten(advantages, response_mask), returns


def value_loss(config: Any, model_output: Mapping[str, Any], data: Any, dp_group: Any = None) -> tuple[torch.Tensor, dict[str, Any]]:
    """The loss of the critic's worker: that of the responses' tokens, whose values are predicted one position before them.

    Args:
        config: verl's CriticConfig: ``cliprange_value``, ``loss_agg_mode``, ``loss_scale_factor``.
        model_output: ``values``, the predictions at all tokens of the micro-batch: jagged [B, prompt and response], or its tokens [N].
        data: the micro-batch, a TensorDict: ``prompts`` and ``responses`` (jagged, or padded [B, P] and [B, T] beside ``attention_mask``
            [B, P + T]); the old ``values``, ``returns`` and ``response_mask`` of the responses (jagged, or padded [B, T]), the mask by
            zero and non-zero; the numbers ``dp_size``, ``batch_num_tokens`` and ``global_batch_size``, the latter two possibly None.
        dp_group: not used, as in verl.

    Returns:
        The loss, and ``critic/vf_loss`` (a verl Metric, SUM where the loss is normalised globally, else MEAN), ``critic/vf_clipfrac`` and
        ``critic/vpred_mean`` (floats).

    Raises:
        ValueError: token counts that do not match, a prompt without tokens, and what :func:`fused_critic.value_loss` raises.
    """
    from verl.utils.metric import AggregationType, Metric

    dp_size, batch_num_tokens, global_batch_size = (data[key] for key in ("dp_size", "batch_num_tokens", "global_batch_size"))
    counts = (batch_num_tokens, global_batch_size, config.loss_scale_factor)
    is_global = dp_size > 1 or any(count is not None for count in counts)

    vpreds, values, returns, mask, offsets, longest = _responses(model_output["values"], data)
    loss, stats = fused_critic.value_loss(
        vpreds,
        values,
        returns,
        mask,
        clip_range=config.cliprange_value,
        reduction=_checked(config.loss_agg_mode),
        batch_num_tokens=batch_num_tokens,
        global_batch_size=global_batch_size,
        dp_size=dp_size,
        loss_scale_factor=longest if config.loss_scale_factor is None else config.loss_scale_factor,
        cu_seqlens=offsets,
    )
    numbers = torch.stack([loss.detach().double(), stats.clip_fraction, stats.value_mean]).tolist()  # one synchronisation
    return loss, {
        "critic/vf_loss": Metric(value=numbers[0], aggregation=AggregationType.SUM if is_global else AggregationType.MEAN),
        "critic/vf_clipfrac": numbers[1],
        "critic/vpred_mean": numbers[2],
    }


def _responses(
    predictions: torch.Tensor, data: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Optional[torch.Tensor], int]:
    """The responses' predictions, old values, returns and mask, all packed or all padded; their offsets if packed; the longest row."""
    tokens = predictions.values() if predictions.is_nested else predictions
    prompts, responses = data["prompts"], data["responses"]
    if prompts.is_nested:
        prompt_lengths, lengths = prompts.offsets().diff(), responses.offsets().diff()
    else:
        attention_mask, width = data["attention_mask"], prompts.shape[1]
        prompt_lengths, lengths = attention_mask[:, :width].sum(1), attention_mask[:, width:].sum(1)
    ends = (prompt_lengths + lengths).cumsum(0)
    starts = ends - lengths - 1  # of the predictions: a token is predicted one position before it

    tensors = [data[key] for key in ("values", "returns", "response_mask")]
    packed = all(x.is_nested for x in tensors)
    if packed:
        tensors = [x.contiguous() for x in tensors]  # without holes
        row_lengths = torch.stack([lengths, *(x.offsets().diff() for x in tensors)])
        fits = row_lengths.eq(lengths).all()
    else:
        tensors = [x.to_padded_tensor(0.0) if x.is_nested else x for x in tensors]
        fits = lengths.max() <= tensors[0].shape[1]
    # One synchronisation for all that the indices below rely on.
    fits, no_prompt, total, response_total, longest = torch.stack(
        [fits, prompt_lengths.eq(0).any(), ends[-1], lengths.sum(), lengths.max()]
    ).tolist()
    if total != tokens.shape[0] or not fits or no_prompt:
        raise ValueError(
            "fused_critic's value_loss for verl: expected prompts with a token at least, predictions for all tokens of prompts and responses, "
            f"and values, returns and response_mask of the responses' lengths; got {tokens.shape[0]} predictions for {total} tokens"
            f"{', a prompt without tokens' * bool(no_prompt)}{', other lengths' * (not fits)}"
        )

    if packed:
        values, returns, mask = (x.values() for x in tensors)
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        shifts = torch.repeat_interleave(starts - offsets[:-1], lengths, output_size=response_total)
        index = torch.arange(response_total, device=tokens.device) + shifts
        return tokens.index_select(0, index), values, returns, mask.to(torch.bool), offsets, longest
    values, returns, mask = tensors
    columns = torch.arange(values.shape[1], device=tokens.device)
    inside = columns < lengths[:, None]
    index = torch.where(inside, starts[:, None] + columns, 0)
    vpreds = torch.where(inside, tokens.index_select(0, index.flatten()).view(index.shape), 0)
    return vpreds, values, returns, mask.to(torch.bool), None, values.shape[1]


def _checked(loss_agg_mode: str) -> str:
    if loss_agg_mode not in _LOSS_AGG_MODES:
        raise ValueError(f"Invalid loss_agg_mode: {loss_agg_mode!r}, expected one of {', '.join(_LOSS_AGG_MODES)}")
    return loss_agg_mode


def _squeeze_single(number: Any) -> Any:
    """A tensor of one element, which verl broadcasts, as the 0-d tensor that GAE takes."""
    return number.reshape(()) if isinstance(number, torch.Tensor) and number.numel() == 1 else number


_CORE_ALGOS, _LOSSES = "verl.trainer.ppo.core_algos", "verl.workers.utils.losses"

ADAPTER = Adapter(
    "verl",
    distribution="verl",
    version="0.9.1",
    replacements=[
        Replacement(f"{_CORE_ALGOS}:compute_value_loss", compute_value_loss),
        Replacement(f"{_CORE_ALGOS}:compute_gae_advantage_return", compute_gae_advantage_return),
        Replacement(f"{_LOSSES}:value_loss", value_loss),
    ],
    registries=[f"{_CORE_ALGOS}:ADV_ESTIMATOR_REGISTRY"],
)
install, uninstall = ADAPTER.install, ADAPTER.uninstall
