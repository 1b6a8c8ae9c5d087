"""The composite implementation for devices without kernels, called on CPU tensors and compared with the kernels."""

import fused_critic
import pytest
import torch
from fused_critic import _fallback
from fused_critic.check import cases
from fused_critic.check.gae import build as build_gae
from fused_critic.check.value_loss import build as build_value_loss
from hypothesis import given
from test_gae import problems as gae_problems
from test_value_loss import problems as loss_problems

pytestmark = pytest.mark.filterwarnings("ignore:fused_critic")
ops = torch.ops.fused_critic


@given(problem=loss_problems)
def test_value_loss(problem):
    (*tensors, mask, _), options = build_value_loss(problem, "cpu")
    clip_range, cu_seqlens, time_dim = (options.pop(name) for name in ("clip_range", "cu_seqlens", "time_dim"))
    pair = (0.0, 0.0) if clip_range is None else clip_range if isinstance(clip_range, tuple) else (-clip_range, clip_range)
    options |= {"clip_low": pair[0], "clip_high": pair[1], "clip": clip_range is not None, "time_dim": time_dim}
    numbers = [name for name in ("clip_low", "clip_high", "batch_num_tokens", "global_batch_size", "loss_clamp") if name in options]
    per_token = {name: options[name] for name in numbers if isinstance(options[name], torch.Tensor) and options[name].dim() > 0}
    arguments = (*tensors, mask, cu_seqlens)
    got = _fallback._value_loss(*arguments, **options)
    for name in numbers:
        if per_token:
            options[name] = torch.as_tensor(options[name], dtype=None if name in per_token else torch.float64)
        else:
            options[name] = float(options[name])
    expected = (ops.value_loss.tensor if per_token else ops.value_loss.default)(*arguments, **options)
    for a, b, what in zip(got, expected, ("loss", "stats", "residuals")):
        finite = b.isfinite()
        assert torch.equal(a.isfinite(), finite)
        cases.assert_close(a[finite], b[finite], 2e-5, what)
        assert a.dtype == b.dtype
    common = {name: options[name] for name in ("clip", "reduction", "time_dim", "criterion", "delta", "clip_only") if name in options}
    common["clamp"] = "loss_clamp" in options
    backward = (torch.ones_like(expected[0]), *arguments, expected[2], *(per_token.get(name) for name in ("clip_low", "clip_high")))
    a, b = _fallback._value_loss_backward(*backward, **common), ops.value_loss_backward(*backward, **common)
    assert a.dtype == b.dtype
    cases.assert_close(a, b, max(2e-5, cases.ROUNDING[tensors[0].dtype]), "grad")


@given(problem=gae_problems)
def test_gae(problem):
    rewards, values, mask, options = build_gae(problem, "cpu")
    names = ("terminated", "truncated", "next_values", "bootstrap_values", "cu_seqlens")
    arguments = (rewards, values, mask, *(options.get(name) for name in names))
    gamma, lam, returns_lam = (
        None if options[name] is None else torch.as_tensor(options[name], dtype=torch.float64) for name in ("gamma", "lam", "returns_lam")
    )
    common = {"mask_mode": options["mask_mode"], "time_dim": options["time_dim"]}
    got = _fallback._gae(*arguments, gamma=gamma, lam=lam, returns_lam=returns_lam, **common)
    expected = ops.gae.tensor(rewards, values, gamma, lam, *arguments[2:], returns_lam, **common)
    for a, b in zip(got, expected):
        assert a.dtype == b.dtype and a.stride() == b.stride()
        cases.assert_close(a, b, cases.tolerance(a.dtype), "outputs")
    backward = (
        expected[0],
        expected[1].cos(),
        mask,
        options.get("terminated"),
        options.get("truncated"),
        options.get("cu_seqlens"),
        gamma,
        lam,
        returns_lam,
    )
    common |= {"has_next_values": options.get("next_values") is not None, "wanted": [True] * 4}
    for a, b in zip(_fallback._gae_backward(*backward, **common), ops.gae_backward(*backward, **common)):
        assert a.dtype == b.dtype
        cases.assert_close(a, b, cases.tolerance(a.dtype), "gradients")


def test_warns_once(monkeypatch):
    monkeypatch.setattr(_fallback, "_warned", set())
    x = torch.randn(2, 3)
    with pytest.warns(UserWarning, match="fused_critic.gae: this build has no kernel for device type 'cpu'"):
        _fallback._gae(x, x, gamma=0.9, lam=0.8)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _fallback._gae(x, x, gamma=0.9, lam=0.8)


@pytest.mark.skipif(
    not torch.cuda.is_available() or fused_critic._C.build_info()["cuda_version"] is not None,
    reason="needs CUDA tensors and an extension that was built without CUDA",
)
def test_cuda_tensors_on_a_build_without_cuda_kernels():
    x = torch.randn(3, 8, device="cuda", requires_grad=True)
    fused_critic.value_loss(x, x.detach(), x.detach() + 1).loss.backward()
    assert x.grad.device.type == "cuda"


@pytest.mark.parametrize("operator", ["value_loss", "gae"])
def test_registered_for_every_other_backend(operator):
    for overload in ("default", "tensor"):
        assert getattr(getattr(ops, operator), overload).has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeExplicitAutograd)
