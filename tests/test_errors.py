"""Bad input: one table. Each message names the operator, the argument, what was expected and what came."""

import math

import fused_critic
import pytest
import torch

V = torch.randn(4, 6)
N = torch.randn(24)


def loss(values=V, old_values=V, returns=V, mask=None, **options):
    return fused_critic.value_loss(values, old_values, returns, mask, **options)


def gae(rewards=V, values=V, mask=None, gamma=0.99, lam=0.95, **options):
    return fused_critic.gae(rewards, values, mask, gamma=gamma, lam=lam, **options)


def cu_seqlens(*bounds, dtype=torch.int64):
    return torch.tensor(bounds, dtype=dtype)


PACKED_LOSS = {"values": N, "old_values": N, "returns": N}
PACKED_GAE = {"rewards": N, "values": N}

TABLE = [
    # shapes: nothing is broadcast
    (
        loss,
        {"returns": V[:, :1]},
        ValueError,
        r"value_loss: returns: expected shape \[4, 6\] \(that of values\), got \[4, 1\]; nothing is broadcast",
    ),
    (loss, {"returns": V[:, 0]}, ValueError, r"value_loss: returns: expected shape \[4, 6\].*got \[4\]"),
    (loss, {"old_values": V[:2]}, ValueError, r"value_loss: old_values: expected shape \[4, 6\].*got \[2, 6\]"),
    (loss, {"mask": torch.ones(4, 1)}, ValueError, r"value_loss: mask: expected shape \[4, 6\].*got \[4, 1\]"),
    (loss, {"values": V[None]}, ValueError, r"value_loss: values: expected 1 or 2 dimensions.*got shape \[1, 4, 6\]"),
    (loss, {"values": V[0, 0]}, ValueError, r"value_loss: values: expected 1 or 2 dimensions.*got shape \[\]"),
    (loss, {"time_dim": 2}, ValueError, r"value_loss: time_dim: expected a dimension of values \(shape \[4, 6\]\), got 2"),
    (gae, {"values": V.t()}, ValueError, r"gae: values: expected shape \[4, 6\] \(that of rewards\), got \[6, 4\]"),
    (gae, {"mask": torch.ones(6)}, ValueError, r"gae: mask: expected shape \[4, 6\].*got \[6\]"),
    (gae, {"terminated": torch.ones(4, 1)}, ValueError, r"gae: terminated: expected shape \[4, 6\].*got \[4, 1\]"),
    (
        gae,
        {"bootstrap_values": torch.ones(6)},
        ValueError,
        r"gae: bootstrap_values: expected shape \[4\] \(one value per sequence\), got \[6\]",
    ),
    (gae, {"bootstrap_values": torch.ones(4, 1)}, ValueError, r"gae: bootstrap_values: expected shape \[4\].*got \[4, 1\]"),
    (gae, {"time_dim": -3}, ValueError, r"gae: time_dim: expected a dimension of rewards.*got -3"),
    # dtypes
    (loss, {"values": V.long()}, TypeError, r"value_loss: values: expected a floating dtype.*got Long"),
    (loss, {"old_values": V.int()}, TypeError, r"value_loss: old_values: expected a floating dtype.*got Int"),
    (loss, {"returns": V.bool()}, TypeError, r"value_loss: returns: expected a floating dtype.*got Bool"),
    (
        loss,
        {"mask": V.to(torch.complex64)},
        TypeError,
        r"value_loss: mask: expected bool, an integer, float64, float32, bfloat16 or float16, got ComplexFloat",
    ),
    (gae, {"rewards": V.long()}, TypeError, r"gae: rewards: expected a floating dtype.*got Long"),
    (gae, {"bootstrap_values": torch.ones(4, dtype=torch.int64)}, TypeError, r"gae: bootstrap_values: expected a floating dtype.*got Long"),
    # cu_seqlens
    (loss, PACKED_LOSS | {"cu_seqlens": cu_seqlens(1, 24)}, ValueError, r"value_loss: cu_seqlens: expected to start at 0, got 1"),
    (
        loss,
        PACKED_LOSS | {"cu_seqlens": cu_seqlens(0, 9, 5, 24)},
        ValueError,
        r"value_loss: cu_seqlens: expected no decrease, got 9 then 5 at index 1",
    ),
    (
        loss,
        PACKED_LOSS | {"cu_seqlens": cu_seqlens(0, 23)},
        ValueError,
        r"value_loss: cu_seqlens: expected to end at the number of tokens, 24, got 23",
    ),
    (
        loss,
        PACKED_LOSS | {"cu_seqlens": cu_seqlens(0, 24).float()},
        TypeError,
        r"value_loss: cu_seqlens: expected int32 or int64, got Float",
    ),
    (
        loss,
        PACKED_LOSS | {"cu_seqlens": cu_seqlens()},
        ValueError,
        r"value_loss: cu_seqlens: expected shape \[number of sequences \+ 1\], got \[0\]",
    ),
    (
        loss,
        {"cu_seqlens": cu_seqlens(0, 24)},
        ValueError,
        r"value_loss: values: expected the packed shape \[N\] beside cu_seqlens, got \[4, 6\]",
    ),
    (
        gae,
        PACKED_GAE | {"cu_seqlens": cu_seqlens(0, 25, dtype=torch.int32)},
        ValueError,
        r"gae: cu_seqlens: expected to end at the number of tokens, 24, got 25",
    ),
    (gae, PACKED_GAE | {"cu_seqlens": cu_seqlens(0, -1, 24)}, ValueError, r"gae: cu_seqlens: expected no decrease, got 0 then -1"),
    (
        gae,
        PACKED_GAE | {"cu_seqlens": cu_seqlens(0, 24), "bootstrap_values": torch.ones(2)},
        ValueError,
        r"gae: bootstrap_values: expected shape \[1\].*got \[2\]",
    ),
    # numbers
    (
        loss,
        {"clip_range": -0.1},
        ValueError,
        r"value_loss: clip_range: expected a number >= 0 or a pair \(low, high\) with low <= high, got \(0.1, -0.1\)",
    ),
    (loss, {"clip_range": math.nan}, ValueError, r"value_loss: clip_range: expected a number >= 0"),
    (loss, {"clip_range": (0.3, 0.1)}, ValueError, r"value_loss: clip_range: .*got \(0.3, 0.1\)"),
    (loss, {"clip_range": (1, 2, 3)}, ValueError, r"value_loss: clip_range: expected a pair \(low, high\), got 3 elements"),
    (loss, {"clip_range": "wide"}, TypeError, r"value_loss: clip_range: expected a number, a pair, a 0-d tensor or None, got 'wide'"),
    (
        loss,
        {"clip_range": torch.ones(2)},
        ValueError,
        r"value_loss: clip_low: expected a number, a 0-d tensor or shape \[4, 6\] \(that of values\), got shape \[2\]; nothing is broadcast",
    ),
    (loss, {"clip_range": (-0.1, torch.ones(4, 1))}, ValueError, r"value_loss: clip_high: expected a number, .*got shape \[4, 1\]"),
    (loss, {"clip_range": (0.1, torch.ones(4, 6).long())}, TypeError, r"value_loss: clip_high: expected a floating dtype.*got Long"),
    (loss, {"clip_range": V.abs().requires_grad_()}, ValueError, r"value_loss: clip_low: expected a tensor without gradient"),
    (loss, {"criterion": "huber", "delta": 0}, ValueError, r"value_loss: delta: expected a positive, finite number for huber, got 0"),
    (loss, {"criterion": "smooth_l1", "delta": math.inf}, ValueError, r"value_loss: delta: expected a positive, .* smooth_l1, got inf"),
    (loss, {"criterion": "huber", "delta": math.nan}, ValueError, r"value_loss: delta: expected a positive, finite .*, got nan"),
    (loss, {"loss_clamp": 0}, ValueError, r"value_loss: loss_clamp: expected a positive number or None, got 0"),
    (loss, {"loss_clamp": math.nan}, ValueError, r"value_loss: loss_clamp: expected a positive number or None, got nan"),
    (loss, {"loss_clamp": torch.tensor(-1.0)}, ValueError, r"value_loss: loss_clamp: expected a positive number or None, got -1"),
    (loss, {"loss_clamp": torch.ones(4)}, ValueError, r"value_loss: loss_clamp: expected a number or a 0-d tensor, got shape \[4\]"),
    (loss, {"dp_size": 2}, ValueError, r"value_loss: dp_size: expected batch_num_tokens beside dp_size > 1.*got dp_size 2 alone"),
    (
        loss,
        {"dp_size": 2, "reduction": "seq-mean-token-mean"},
        ValueError,
        r"value_loss: dp_size: expected global_batch_size beside dp_size > 1",
    ),
    (
        loss,
        {"dp_size": 2, "reduction": "seq-mean-token-sum", "batch_num_tokens": 8},
        ValueError,
        r"value_loss: dp_size: expected global_batch_size",
    ),
    (loss, {"dp_size": 0}, ValueError, r"value_loss: dp_size: expected a positive number, got 0"),
    (loss, {"batch_num_tokens": -1}, ValueError, r"value_loss: batch_num_tokens: expected a count, at least 0, got -1"),
    (loss, {"global_batch_size": math.nan}, ValueError, r"value_loss: global_batch_size: expected a count, at least 0, got nan"),
    (
        loss,
        {"batch_num_tokens": torch.ones(3)},
        ValueError,
        r"value_loss: batch_num_tokens: expected a number or a 0-d tensor, got shape \[3\]",
    ),
    (
        loss,
        {"reduction": "seq-mean-token-sum-norm", "loss_scale_factor": 0},
        ValueError,
        r"value_loss: loss_scale_factor: expected a positive number, got 0",
    ),
    (
        loss,
        PACKED_LOSS | {"cu_seqlens": cu_seqlens(0, 24), "reduction": "seq-mean-token-sum-norm"},
        ValueError,
        r"value_loss: loss_scale_factor: expected a number for",
    ),
    (gae, {"gamma": 1.5}, ValueError, r"gae: gamma: expected a number in \[0, 1\], got 1.5"),
    (gae, {"lam": -0.1}, ValueError, r"gae: lam: expected a number in \[0, 1\], got -0.1"),
    (gae, {"gamma": math.nan}, ValueError, r"gae: gamma: expected a number in \[0, 1\], got nan"),
    (gae, {"returns_lam": 1.5}, ValueError, r"gae: returns_lam: expected a number in \[0, 1\], got 1.5"),
    (gae, {"returns_lam": torch.tensor(-1.0)}, ValueError, r"gae: returns_lam: expected a number in \[0, 1\], got -1"),
    (
        gae,
        {"lam": torch.ones(6)},
        ValueError,
        r"gae: lam: expected a number, a 0-d tensor or shape \[4\] \(one number per sequence\), got shape \[6\]",
    ),
    (gae, {"gamma": torch.ones(4, 1)}, ValueError, r"gae: gamma: expected a number, a 0-d tensor or shape \[4\].*got shape \[4, 1\]"),
    (gae, {"returns_lam": torch.ones(3)}, ValueError, r"gae: returns_lam: expected a number, a 0-d tensor or shape \[4\].*got shape \[3\]"),
    (
        gae,
        PACKED_GAE | {"cu_seqlens": cu_seqlens(0, 9, 24), "lam": torch.ones(3)},
        ValueError,
        r"gae: lam: expected a number, a 0-d tensor or shape \[2\].*got shape \[3\]",
    ),
    (
        gae,
        {"gamma": torch.tensor([0.5, 1, 1.25, 1])},
        ValueError,
        r"gae: gamma: expected numbers in \[0, 1\], got 1.25 at index 2",
    ),
    (gae, {"lam": torch.full((4,), math.nan)}, ValueError, r"gae: lam: expected numbers in \[0, 1\], got nan at index 0"),
    (gae, {"returns_lam": -torch.ones(4)}, ValueError, r"gae: returns_lam: expected numbers in \[0, 1\], got -1 at index 0"),
    (gae, {"lam": torch.ones(4, dtype=torch.uint8)}, TypeError, r"gae: lam: expected a number, or a tensor of a floating dtype.*got Byte"),
    # names
    (loss, {"reduction": "mean"}, ValueError, r"value_loss: reduction: expected one of token-mean, .*, got 'mean'"),
    (loss, {"criterion": "mae"}, ValueError, r"value_loss: criterion: expected one of mse, huber, smooth_l1, l1, got 'mae'"),
    (gae, {"mask_mode": "jump"}, ValueError, r"gae: mask_mode: expected one of skip, zero, reset, ignore, got 'jump'"),
    # what belongs together
    (loss, {"old_values": None}, ValueError, r"value_loss: old_values: expected a tensor beside a clip range, got None"),
    (
        loss,
        {"returns": V.clone().requires_grad_()},
        ValueError,
        r"value_loss: returns: expected a tensor without gradient .*; detach\(\) it",
    ),
    (loss, {"old_values": V.clone().requires_grad_()}, ValueError, r"value_loss: old_values: expected a tensor without gradient"),
    (gae, {"truncated": V > 0}, ValueError, r"gae: next_values: expected a tensor beside truncated.*got None"),
    (gae, {"next_values": V, "bootstrap_values": V[:, 0]}, ValueError, r"gae: bootstrap_values: expected None beside next_values"),
    (gae, {"gamma": torch.tensor(0.9, requires_grad=True)}, ValueError, r"gae: gamma: expected a number or a tensor without gradient"),
    (
        gae,
        {"returns_lam": torch.ones(4, requires_grad=True)},
        ValueError,
        r"gae: returns_lam: expected a number or a tensor without gradient",
    ),
    (gae, {"mask_mode": "ignore", "mask": torch.ones(6)}, ValueError, r"gae: mask: expected shape \[4, 6\].*got \[6\]"),
]


@pytest.mark.parametrize(
    "function, arguments, error, message", TABLE, ids=[f"{i}-{t[0].__name__}-{'-'.join(t[1])}" for i, t in enumerate(TABLE)]
)
def test_bad_input(function, arguments, error, message):
    with pytest.raises(error, match="fused_critic." + message):
        function(**arguments)


@pytest.mark.parametrize("compiled", [False, True])
def test_shapes_are_checked_while_tracing(compiled):
    function = torch.compile(loss, backend="aot_eager", fullgraph=True) if compiled else loss
    with pytest.raises(Exception, match=r"returns: expected shape.*nothing is broadcast"):
        function(returns=V[:, :1])


def test_devices_that_differ(device):
    if device != "cuda":
        pytest.skip("needs a second device with data: a meta tensor makes the whole call a shape computation")
    x = V.to(device)
    with pytest.raises(ValueError, match=r"fused_critic.value_loss: mask: expected device cuda:0 \(that of values\), got cpu"):
        loss(x, x, x, V)
    with pytest.raises(ValueError, match=r"fused_critic.gae: values: expected device cpu \(that of rewards\), got cuda:0"):
        gae(V, x)


def test_cu_seqlens_on_cuda_stay_in_bounds(device, monkeypatch):
    """On CUDA the host never reads cu_seqlens: nonsense gives nonsense, but no access outside of the tensors. FUSED_CRITIC_CHECK=1 finds it."""
    if device != "cuda":
        pytest.skip("on the CPU cu_seqlens is always validated (see the table)")
    nonsense = torch.tensor([-7, 30, 3, 2**40, -(2**50), 24], device=device)
    x = N.to(device)
    for function, arguments in ((loss, {"values": x, "old_values": x, "returns": x}), (gae, {"rewards": x, "values": x})):
        function(**arguments, cu_seqlens=nonsense)
        monkeypatch.setenv("FUSED_CRITIC_CHECK", "1")
        with pytest.raises(ValueError, match="cu_seqlens: expected to start at 0, got -7"):
            function(**arguments, cu_seqlens=nonsense)
        monkeypatch.delenv("FUSED_CRITIC_CHECK")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.uint8])
def test_dtypes_of_a_count(device, dtype):
    x = torch.zeros(8, device=device)
    count = torch.tensor(200, dtype=dtype, device=device)
    if dtype == torch.uint8:
        with pytest.raises(TypeError, match="batch_num_tokens: expected a number, or a tensor of a floating dtype, int64 or int32, got"):
            fused_critic.value_loss(x, x, x + 1, batch_num_tokens=count)
    else:
        loss = fused_critic.value_loss(x, x, x + 1, batch_num_tokens=count).loss
        assert abs(loss.item() - 8 * 0.5 / 200) < 1e-6


def test_tokens_outside_of_all_segments_are_written_on_cuda(device):
    """Nothing else writes the outputs there, and no sequence is theirs."""
    if device != "cuda":
        pytest.skip("on the CPU cu_seqlens is always validated (see the table)")
    inner = torch.tensor([5, 9, 20], device=device)
    x = torch.randn(24, device=device, requires_grad=True)
    losses = fused_critic.value_loss(x, x.detach(), x.detach() + 1, cu_seqlens=inner, reduction="none").loss
    losses.sum().backward()
    inside = torch.zeros(24, dtype=torch.bool)
    inside[5:20] = True
    assert torch.equal(losses.cpu() != 0, inside) and torch.equal(x.grad.cpu() != 0, inside)


@pytest.mark.parametrize("operator", ["value_loss", "gae"])
def test_a_failed_call_writes_nothing(operator):
    before = V.clone()
    with pytest.raises(ValueError):
        loss(returns=V[:, :1]) if operator == "value_loss" else gae(values=V[:, :1])
    assert torch.equal(V, before)
