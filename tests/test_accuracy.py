"""Speed is not bought with accuracy: against float64, the kernels err no more than the plain float32 formulas that trainers run."""

import fused_critic
import pytest
import torch
from fused_critic.check import plain

# On the CPU columns round as the plain formula does, rows and CUDA less: half its error or a third, on average. For other pairs of gamma and
# lambda the plain formula wins where errors of its own cancel: see docs/design.md.


def rms_error(got, exact):
    return (got.cpu().double() - exact).square().mean().sqrt().item()


def draw(shape, offset, device):
    generator = torch.Generator().manual_seed(0)
    rewards, values, old_values, returns = (torch.randn(shape, generator=generator) for _ in range(4))
    mask = torch.rand(shape, generator=generator) < 0.7
    values += offset
    tensors = {
        "rewards": 0.1 * rewards,
        "values": values,
        "old_values": values + 0.2 * old_values,
        "returns": values + returns,
        "mask": mask,
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


@pytest.mark.parametrize("masked", [False, True], ids=["all valid", "masked"])
@pytest.mark.parametrize("time_dim", [-1, 0], ids=["rows", "columns"])
@pytest.mark.parametrize("gamma, lam", [(0.99, 0.95), (1.0, 0.95), (1.0, 1.0), (0.99, 1.0), (0.995, 0.97), (1.0, 0.97)])
@pytest.mark.parametrize("offset", [0, 1, 10, 100])
def test_gae(device, offset, gamma, lam, time_dim, masked):
    batch = draw((256, 512), offset, "cpu")
    rewards, values, mask = batch["rewards"], batch["values"], batch["mask"] if masked else None
    weights = mask.float() if masked else None
    theirs = plain.gae(rewards, values, weights, gamma, lam)
    exact = plain.gae(rewards.double(), values.double(), None if mask is None else mask.double(), gamma, lam)
    lay_out = (
        (lambda x: None if x is None else x.to(device)) if time_dim else (lambda x: None if x is None else x.t().contiguous().to(device))
    )
    ours = fused_critic.gae(lay_out(rewards), lay_out(values), lay_out(mask), gamma=gamma, lam=lam, time_dim=time_dim)
    valid = mask if masked else torch.ones_like(values, dtype=torch.bool)
    for name, got, plain_result, expected in zip(ours._fields, ours, theirs, exact):
        got = (got if time_dim else got.t()).cpu()
        error, allowed = rms_error(got[valid], expected[valid]), rms_error(plain_result[valid], expected[valid])
        assert error <= allowed, f"{name}: {error:.3g}, the plain formula {allowed:.3g}"


@pytest.mark.parametrize("offset", [0, 10])
@pytest.mark.parametrize("shape", [(64, 512), (2, 100_000)])
def test_value_loss(device, shape, offset):
    batch = draw(shape, offset, device)
    names = ("values", "old_values", "returns")
    results = {}
    for name, dtype, function in (
        ("ours", torch.float32, lambda *x: fused_critic.value_loss(*x, batch["mask"]).loss),
        ("plain", torch.float32, lambda *x: plain.value_loss(*x, batch["mask"], 0.2)[0]),
        ("exact", torch.float64, lambda *x: plain.value_loss(*x, batch["mask"], 0.2)[0]),
    ):
        values, old_values, returns = (batch[x].to(dtype) for x in names)
        values.requires_grad_()
        loss = function(values, old_values, returns)
        results[name] = (loss.detach().cpu(), torch.autograd.grad(loss, values)[0].cpu())
    (loss, gradient), (plain_loss, plain_gradient), (exact_loss, exact_gradient) = results["ours"], results["plain"], results["exact"]
    # Inputs are float32, so the loss cannot be better than its own rounding.
    assert rms_error(loss, exact_loss) <= max(rms_error(plain_loss, exact_loss), torch.finfo(torch.float32).eps / 2 * exact_loss.item())
    # Float32 and float64 may clip a token differently where both branches are equal but for rounding.
    same = (gradient == 0) == (exact_gradient == 0)
    same &= (plain_gradient == 0) == (exact_gradient == 0)
    assert same.float().mean() > 0.999
    assert rms_error(gradient[same], exact_gradient[same]) <= rms_error(plain_gradient[same], exact_gradient[same])


def test_sum_of_ten_million_tokens(device, request):
    """On a GPU, and on the CPU; a simulated one takes a tenth."""
    tokens = 1_000_000 if request.config.getoption("quick") else 10_000_000
    values = torch.rand((1, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    zeros = torch.zeros_like(values)
    output = fused_critic.value_loss(values, values, zeros)
    exact = 0.5 * values.double().square().mean()
    theirs = plain.value_loss(values, values, zeros, torch.ones_like(values), 0.2)[0]
    rounding = torch.finfo(torch.float32).eps / 2 * exact
    assert (output.loss - exact).abs() <= torch.maximum((theirs - exact).abs(), rounding)
    assert (output.stats.value_mean - values.double().mean()).abs() <= 1e-7
