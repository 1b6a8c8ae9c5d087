"""PyTorch's own operators on fake CUDA tensors give what the CPU gives. Run by test_sessions.py."""

import pytest
import torch
import torch.nn.functional as F

A, B = torch.randn(6, 7), torch.randn(6, 7)
INDEX = torch.randint(0, 6, (5,))
CASES = {
    "add": lambda a, b, i: a + b,
    "inplace": lambda a, b, i: a.clone().mul_(b).add_(1),
    "matmul": lambda a, b, i: a @ b.t(),
    "addmm": lambda a, b, i: F.linear(a, b),
    "bf16": lambda a, b, i: (a.bfloat16() * b.bfloat16()).float(),
    "softmax": lambda a, b, i: a.softmax(-1),
    "cumsum": lambda a, b, i: a.cumsum(0),
    "sum": lambda a, b, i: a.sum(1),
    "max": lambda a, b, i: a.max(1)[0],
    "sort": lambda a, b, i: a.sort(1)[1],
    "cat": lambda a, b, i: torch.cat([a, b.t().reshape(6, 7)]),
    "index": lambda a, b, i: a[i],
    "index_put": lambda a, b, i: a.clone().index_put_((i,), b[i]),
    "where": lambda a, b, i: torch.where(a > 0, a, b),
    "transpose": lambda a, b, i: a.t().contiguous(),
    "slice_copy": lambda a, b, i: a.clone().t()[1:3].copy_(b.t()[1:3]),
    "expand": lambda a, b, i: a[:, :1].expand(6, 7) * b,
    "out": lambda a, b, i: torch.add(a, b, out=torch.empty(0, device=a.device)),
    "arange": lambda a, b, i: torch.arange(10, device=a.device).flip(0),
    "eye": lambda a, b, i: torch.eye(3, device=a.device),
    "full": lambda a, b, i: torch.full((3,), 2.5, device=a.device),
    "linspace": lambda a, b, i: torch.linspace(0, 1, 7, device=a.device),
    "layer_norm": lambda a, b, i: F.layer_norm(a, (7,)),
    "gelu": lambda a, b, i: F.gelu(a),
    "embedding": lambda a, b, i: F.embedding(i, a),
    "einsum": lambda a, b, i: torch.einsum("ij,ij->i", a, b),
    "conv1d": lambda a, b, i: F.conv1d(a[None], torch.ones(4, 6, 3, device=a.device)),
    "sdpa": lambda a, b, i: F.scaled_dot_product_attention(a[None, None], b[None, None], b[None, None]),
    "cross_entropy": lambda a, b, i: F.cross_entropy(a[:5], i),
    "norm": lambda a, b, i: a.norm(),
    "svd": lambda a, b, i: torch.linalg.svdvals(a),
    "unique": lambda a, b, i: i.unique(),
    "complex": lambda a, b, i: torch.view_as_real(torch.complex(a, b).conj() * 2),
    "zeros_strided": lambda a, b, i: a.clone().t()[::2].zero_(),
    "item": lambda a, b, i: torch.tensor(a[0, 0].item()),
    "foreach": lambda a, b, i: torch._foreach_add([a, b], 1.0)[1],
    "remainder": lambda a, b, i: i % 4,
    "remainder_float": lambda a, b, i: a % 0.25,
    "remainder_inplace": lambda a, b, i: i.clone().remainder_(3),
    "fmod": lambda a, b, i: a.fmod(2),
    "bitwise_and": lambda a, b, i: 3 & i,
    "number_keeps_dtype": lambda a, b, i: a.bfloat16().sum().fmod(0.3).float(),
    "roll": lambda a, b, i: a.roll(2, 1),
    "repeat": lambda a, b, i: i.repeat_interleave(2),
    "bincount": lambda a, b, i: torch.bincount(i),
    "nonzero": lambda a, b, i: (a > 0).nonzero(),
    "scatter_add": lambda a, b, i: a.clone().scatter_add_(0, i[:, None], b[:5, :1]),
    "dropout0": lambda a, b, i: F.dropout(a, 0.0, True),
    "batch_norm": lambda a, b, i: F.batch_norm(a, None, None, training=True),
    "fft": lambda a, b, i: torch.fft.rfft(a).abs(),
}


@pytest.mark.parametrize("name", CASES)
def test_same_as_cpu(name):
    f = CASES[name]
    got = f(A.cuda(), B.cuda(), INDEX.cuda())
    assert got.is_cuda or name == "item"
    torch.testing.assert_close(got.cpu(), f(A, B, INDEX), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("opt", [torch.optim.SGD, torch.optim.AdamW])
def test_training_step(opt):
    out = []
    for dev in ("cpu", "cuda"):
        torch.manual_seed(0)
        m = torch.nn.Sequential(torch.nn.Linear(7, 16), torch.nn.GELU(), torch.nn.Linear(16, 3)).to(dev)
        o = opt(m.parameters(), lr=0.1)
        for _ in range(3):
            o.zero_grad()
            F.mse_loss(m(A.to(dev)), B[:, :3].to(dev)).backward()
            o.step()
        out.append(m[0].weight.detach().cpu())
    torch.testing.assert_close(out[0], out[1], rtol=1e-4, atol=1e-5)


def test_random_and_print():
    torch.manual_seed(3)
    x = torch.randn(100, device="cuda")
    assert 0.5 < x.std().item() < 1.5 and "device='cuda:0'" in repr(x)
    assert torch.rand(3, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).max() <= 1


def test_gradcheck():
    x = torch.randn(2, 3, dtype=torch.float64, device="cuda", requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: t.sin().cumsum(1), (x,))
