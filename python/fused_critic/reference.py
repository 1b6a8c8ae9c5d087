"""The specification: the operators in plain float64, token by token on the CPU, as the formulas read. Slow on purpose.

The tests and ``python -m fused_critic check`` hold every kernel against it.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch


def sequences(shape, cu_seqlens=None, time_dim=-1):
    """The index of every token, sequence by sequence in time order."""
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        return [[(i,) for i in range(a, b)] for a, b in zip(bounds, bounds[1:])]
    if len(shape) == 1:
        return [[(i,) for i in range(shape[0])]]
    rows, columns = shape
    if time_dim in (1, -1):
        return [[(s, t) for t in range(columns)] for s in range(rows)]
    return [[(t, s) for t in range(rows)] for s in range(columns)]


def _nested(x):
    """Nested lists of float64 numbers; of 0-d tensors where a gradient is wanted."""
    if x is None:
        return None
    x = x.to("cpu", torch.float64)
    if not x.requires_grad:
        return x.tolist()
    return list(x.unbind()) if x.dim() == 1 else [row.unbind() for row in x.unbind()]


def _at(nested, index):
    for i in index:
        nested = nested[i]
    return nested


def _mse(d, delta):
    return 0.5 * d**2, d


def _huber(d, delta):
    return (0.5 * d**2, d) if abs(d) <= delta else (delta * (abs(d) - 0.5 * delta), math.copysign(delta, d))


def _smooth_l1(d, delta):
    return (0.5 * d**2 / delta, d / delta) if abs(d) < delta else (abs(d) - 0.5 * delta, math.copysign(1.0, d))


def _l1(d, delta):
    return abs(d), math.copysign(1.0, d) if d else 0.0


CRITERIA = {"mse": _mse, "huber": _huber, "smooth_l1": _smooth_l1, "l1": _l1}  # of a difference: the criterion and its derivative


def value_loss(
    values, old_values, returns, mask=None, *, clip_range=0.2, criterion="mse", delta=1.0, clip_only=False, loss_clamp=None,
    reduction="token-mean", batch_num_tokens=None, global_batch_size=None, dp_size=1, loss_scale_factor=None, cu_seqlens=None,
    time_dim=-1, grad_loss=None,
):  # fmt: skip
    """loss (a float; for "none" a tensor), grad (d loss / d values, times grad_loss), and a dict of statistics."""
    shape = values.shape
    floating = mask is not None and mask.dtype.is_floating_point
    v, o, r, m = (_nested(None if x is None else x.detach()) for x in (values, old_values, returns, mask))
    if clip_range is not None:
        bounds = clip_range if isinstance(clip_range, tuple) else (-clip_range, clip_range)
        bounds = [_nested(x) if isinstance(x, torch.Tensor) else x for x in bounds]
    rows = sequences(shape, cu_seqlens, time_dim)

    def weight(index):
        w = 1.0 if m is None else _at(m, index)
        return w if floating else float(w != 0)

    tokens = []  # (row, index, w, l, dl/dv, clipped, outside, v, R)
    for s, row in enumerate(rows):
        for index in row:
            w = weight(index)
            if w == 0:
                continue
            value, ret = _at(v, index), _at(r, index)
            unclipped, slope = CRITERIA[criterion](value - ret, delta)
            loss, clipped, outside = unclipped, False, False
            if clip_range is not None:
                old = _at(o, index)
                low, high = (_at(x, index) if isinstance(x, list) else x for x in bounds)
                vc = min(max(value, old + low), old + high)
                clipped_loss, _ = CRITERIA[criterion](vc - ret, delta)
                clipped = clipped_loss > unclipped
                outside = not old + low <= value <= old + high
                loss = clipped_loss if clip_only else max(unclipped, clipped_loss)
                slope = 0.0 if (outside if clip_only else clipped) else slope
            if loss_clamp is not None and loss > loss_clamp:
                loss, slope = float(loss_clamp), 0.0
            tokens.append((s, index, w, loss, slope, clipped, outside, value, ret))

    row_weight = [0.0] * len(rows)
    for t in tokens:
        row_weight[t[0]] += t[2]
    non_empty = len({t[0] for t in tokens})
    total_weight = math.fsum(t[2] for t in tokens)

    def share(s):
        """d loss / d (w l) of a token of row s."""
        if reduction == "none":
            return 1.0
        if reduction == "token-sum":
            return dp_size
        if reduction == "token-mean":
            n = total_weight if batch_num_tokens is None else float(batch_num_tokens)
            return dp_size / n if n else 0.0
        n = non_empty if global_batch_size is None else float(global_batch_size)
        factor = dp_size / n if n else 0.0
        if reduction == "seq-mean-token-sum-norm":
            length = shape[time_dim] if len(shape) == 2 else shape[0]
            return factor / (loss_scale_factor or length)
        if reduction == "seq-mean-token-mean":
            return factor / row_weight[s] if row_weight[s] else 0.0
        return factor

    grad = torch.zeros(shape, dtype=torch.float64)
    per_token = torch.zeros(shape, dtype=torch.float64)
    upstream = None if grad_loss is None else _nested(grad_loss.detach())
    for s, index, w, loss, slope, *_ in tokens:
        g = 1.0 if upstream is None else (upstream if isinstance(upstream, float) else _at(upstream, index))
        grad[index] = g * share(s) * w * slope
        per_token[index] = w * loss
    loss = per_token if reduction == "none" else math.fsum(share(t[0]) * t[2] * t[3] for t in tokens)

    def mean(f):
        return math.fsum(t[2] * f(t) for t in tokens) / total_weight if total_weight else 0.0

    def variance(f):
        centre = mean(f)
        return mean(lambda t: (f(t) - centre) ** 2)

    return_var, error_var = variance(lambda t: t[8]), variance(lambda t: t[8] - t[7])
    stats = {
        "num_tokens": len(tokens),
        "weight": total_weight,
        "num_sequences": non_empty,
        "loss_sum": math.fsum(t[2] * t[3] for t in tokens),
        "loss_mean": mean(lambda t: t[3]),
        "clip_fraction": mean(lambda t: t[5]),
        "outside_fraction": mean(lambda t: t[6]),
        "value_mean": mean(lambda t: t[7]),
        "value_min": min((t[7] for t in tokens), default=0.0),
        "value_max": max((t[7] for t in tokens), default=0.0),
        "value_var": variance(lambda t: t[7]),
        "return_mean": mean(lambda t: t[8]),
        "return_var": return_var,
        "error_mean": mean(lambda t: t[8] - t[7]),
        "error_var": error_var,
        "explained_variance": 0.0 if return_var == 0 else 1 - error_var / return_var,
    }
    return SimpleNamespace(loss=loss, grad=grad, stats=stats)


def gae(
    rewards, values, mask=None, *, gamma, lam, returns_lam=None, mask_mode="skip", terminated=None, truncated=None, next_values=None,
    bootstrap_values=None, cu_seqlens=None, time_dim=-1, whiten=False,
):  # fmt: skip
    """advantages and returns, float64, as a differentiable function of whatever requires grad."""
    shape = rewards.shape
    r, v, m, ends, cuts, following = (_nested(x) for x in (rewards, values, mask, terminated, truncated, next_values))
    bootstrap = None if bootstrap_values is None else _nested(bootstrap_values.reshape(-1))

    def of_sequence(number, s):
        return float(number[s] if isinstance(number, torch.Tensor) and number.dim() == 1 else number)

    def recursion(lams):
        """A and A + V of the positions that are not masked."""
        advantages, returns = {}, {}
        for s, row in enumerate(sequences(shape, cu_seqlens, time_dim)):
            gamma_s, lam_s = of_sequence(gamma, s), of_sequence(lams, s)
            next_value = 0.0 if bootstrap is None else bootstrap[s]
            next_advantage = 0.0
            for index in reversed(row):
                masked = m is not None and mask_mode != "ignore" and _at(m, index) == 0
                if masked and mask_mode == "skip":
                    continue
                if masked and mask_mode == "reset":
                    next_value = next_advantage = 0.0
                    continue
                ended = ends is not None and _at(ends, index) != 0
                cut = cuts is not None and _at(cuts, index) != 0
                reward, value = (0.0, 0.0) if masked else (_at(r, index), _at(v, index))  # masked: mask_mode is "zero" from here on
                if following is not None:
                    next_value = 0.0 if masked else _at(following, index)
                delta = reward + (0.0 if ended else gamma_s * next_value) - value
                advantage = delta + (0.0 if ended or cut else gamma_s * lam_s * next_advantage)
                if not masked:
                    advantages[index], returns[index] = advantage, advantage + value
                next_value, next_advantage = value, advantage
        return advantages, returns

    advantages, returns = recursion(lam)
    if returns_lam is not None:
        _, returns = recursion(returns_lam)

    def assemble(found):
        flat = [found.get(index, 0.0) for index in _all_indices(shape)]
        if any(isinstance(x, torch.Tensor) for x in flat):
            return torch.stack([torch.as_tensor(x, dtype=torch.float64) for x in flat]).reshape(shape)
        return torch.tensor(flat, dtype=torch.float64).reshape(shape)

    advantages, returns = assemble(advantages), assemble(returns)
    return SimpleNamespace(advantages=masked_whiten(advantages, mask) if whiten else advantages, returns=returns)


def _assemble(found, shape):
    """float64, 0 where nothing was found."""
    flat = [found.get(index, 0.0) for index in _all_indices(shape)]
    if any(isinstance(x, torch.Tensor) for x in flat):
        return torch.stack([torch.as_tensor(x, dtype=torch.float64) for x in flat]).reshape(shape)
    return torch.tensor(flat, dtype=torch.float64).reshape(shape)


def carried_rewards(rewards, mask, *, cu_seqlens=None, time_dim=-1):
    """The rewards of gae's carry_masked_rewards, float64; 0 at masked positions."""
    r, m, found = _nested(rewards), _nested(mask), {}
    for row in sequences(rewards.shape, cu_seqlens, time_dim):
        receiver = None
        for index in row:
            if _at(m, index) != 0:
                receiver, found[index] = index, 0.0
            if receiver is not None:
                found[receiver] = found[receiver] + _at(r, index)
    return _assemble(found, rewards.shape)


def turn_gae(
    rewards, values, turn_ids, mask=None, *, gamma, lam, terminated=None, truncated=None, next_values=None, bootstrap_values=None,
    cu_seqlens=None, time_dim=-1,
):  # fmt: skip
    """gae with turn_ids: the sequence of turns as a sequence of its own."""
    shape, bootstrap = rewards.shape, None if bootstrap_values is None else bootstrap_values.reshape(-1)
    advantages, returns = {}, {}
    for s, row in enumerate(sequences(shape, cu_seqlens, time_dim)):
        turns = []
        for index in row:
            if mask is not None and mask[index] == 0:
                continue
            if not turns or turn_ids[turns[-1][-1]] != turn_ids[index]:
                turns.append([])
            turns[-1].append(index)
        if not turns:
            continue

        def of_turns(x, reduce):
            return None if x is None else torch.stack([reduce([x[index].cpu().double() for index in turn]) for turn in turns])

        def any_set(flags):
            return torch.stack(flags).count_nonzero()

        out = gae(
            of_turns(rewards, sum), of_turns(values, lambda of: of[0]), gamma=gamma, lam=lam, terminated=of_turns(terminated, any_set),
            truncated=of_turns(truncated, any_set), next_values=of_turns(next_values, lambda of: of[-1]),
            bootstrap_values=None if bootstrap is None else bootstrap[s],
        )  # fmt: skip
        for turn, advantage, ret in zip(turns, out.advantages, out.returns):
            for index in turn:
                advantages[index], returns[index] = advantage, ret
    return SimpleNamespace(advantages=_assemble(advantages, shape), returns=_assemble(returns, shape))


def reverse_scan(x, decay, init=None, *, cu_seqlens=None, time_dim=-1):
    """y, float64, as a differentiable function of whatever requires grad."""
    decay = torch.as_tensor(decay, dtype=torch.float64) if not isinstance(decay, torch.Tensor) else decay
    rows = sequences(x.shape, cu_seqlens, time_dim)
    per_position = decay.dim() > 0 and decay.shape == x.shape
    numbers, decays = _nested(x), _nested(decay if per_position else decay.reshape(-1))
    start = None if init is None else _nested(init.reshape(-1))
    found = {}
    for s, row in enumerate(rows):
        y = 0.0 if start is None else start[s]
        for index in reversed(row):
            factor = _at(decays, index) if per_position else decays[0 if decay.dim() == 0 else s]
            y = _at(numbers, index) + factor * y
            found[index] = y
    return _assemble(found, x.shape)


def vtrace(
    rewards, values, log_rhos=None, mask=None, *, ratios=None, gamma, lam=1.0, rho_clip=1.0, c_clip=1.0, pg_rho_clip=1.0, terminated=None,
    truncated=None, next_values=None, bootstrap_values=None, cu_seqlens=None, time_dim=-1,
):  # fmt: skip
    """vs, pg_advantages and advantages, float64."""
    gamma, lam = float(gamma), float(lam)
    rho_clip, c_clip, pg_rho_clip = (math.inf if x is None else float(x) for x in (rho_clip, c_clip, pg_rho_clip))
    tensors = (rewards, values, log_rhos, ratios, mask, terminated, truncated, next_values)
    r, v, logs, quotients, m, ends, cuts, following = (_nested(None if x is None else x.detach()) for x in tensors)
    bootstrap = None if bootstrap_values is None else _nested(bootstrap_values.detach().reshape(-1))
    vs, pg_advantages, advantages = {}, {}, {}
    for s, row in enumerate(sequences(rewards.shape, cu_seqlens, time_dim)):
        next_value = 0.0 if bootstrap is None else bootstrap[s]
        next_advantage = 0.0
        for index in reversed(row):
            if m is not None and _at(m, index) == 0:
                continue
            ended = ends is not None and _at(ends, index) != 0
            done = ended or (cuts is not None and _at(cuts, index) != 0)
            reward, value = _at(r, index), _at(v, index)
            ratio = math.exp(_at(logs, index)) if quotients is None else _at(quotients, index)
            rho, c, pg_rho = min(ratio, rho_clip), lam * min(ratio, c_clip), min(ratio, pg_rho_clip)
            next_value = next_value if following is None else _at(following, index)
            delta = rho * (reward + (0.0 if ended else gamma * next_value) - value)
            next_vs = next_value + (0.0 if done else next_advantage)
            pg_advantages[index] = pg_rho * (reward + (0.0 if ended else gamma * next_vs) - value)
            next_advantage = delta + (0.0 if done else gamma * c * next_advantage)
            advantages[index], vs[index] = next_advantage, next_advantage + value
            next_value = value
    return SimpleNamespace(**{
        name: _assemble(found, rewards.shape)
        for name, found in (("vs", vs), ("pg_advantages", pg_advantages), ("advantages", advantages))
    })  # fmt: skip


def masked_whiten(x, mask=None, *, shift_mean=True, unbiased=True, eps=1e-8):
    """float64, as a differentiable function of x."""
    x = x.to("cpu", torch.float64)
    valid = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.cpu() != 0
    chosen = x[valid]
    if chosen.numel() < 2:
        return torch.zeros_like(x)
    mean, variance = chosen.mean(), chosen.var(correction=int(unbiased))
    whitened = (x - mean) * torch.rsqrt(variance + eps) + (0.0 if shift_mean else mean)
    return torch.where(valid, whitened, 0.0)


def _all_indices(shape):
    return [(i,) for i in range(shape[0])] if len(shape) == 1 else [(i, j) for i in range(shape[0]) for j in range(shape[1])]
