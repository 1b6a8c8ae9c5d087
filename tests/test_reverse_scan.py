"""The reverse scan against the float64 reference, on every device."""

import fused_critic
import pytest
import torch
from fused_critic import _fallback
from fused_critic.check import cases
from fused_critic.check.recurrence import (
    DECAYS,
    SCAN_FACTORS,
    SHAPE_DTYPES,
    SHAPES,
    build_scan,
    compare_scan,
    compare_scan_far,
    compare_scan_gradients,
    compare_scan_problem,
    compare_scan_shape,
)
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

ops = torch.ops.fused_critic
problems = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in SCAN_FACTORS.items()})


def test_by_hand(device):
    x = torch.tensor([1.0, 2.0, 3.0], device=device)
    decay = torch.tensor([0.5, 0.0, 2.0], device=device)
    init = torch.tensor(10.0, device=device)
    assert fused_critic.reverse_scan(x, decay, init).tolist() == [2.0, 2.0, 23.0]
    assert fused_critic.reverse_scan(x, 0.5).tolist() == [2.75, 3.5, 3.0]
    cu_seqlens, decay = torch.tensor([0, 2, 3], device=device), torch.tensor([2.0, 9.0], device=device)
    assert fused_critic.reverse_scan(x, decay, cu_seqlens=cu_seqlens).tolist() == [5.0, 2.0, 3.0]


@given(problem=problems)
def test_matches_reference(device, problem):
    compare_scan_problem(problem, device)


@given(problem=problems)
def test_gradients_match_reference(device, problem):
    compare_scan_problem({**problem, "dtypes": [torch.float64] * 3}, device, compare_scan_gradients)
    compare_scan_problem(problem, device, compare_scan_gradients)


def compare_gradients_with_float64(x, decay, init, **options):
    """With those of the float64 CPU kernels, which the test above holds against the reference: that is slow where sequences are long."""
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    inputs = [t for t in (x, init, decay) if isinstance(t, torch.Tensor)]

    def gradients(where, wide):
        leaves = [t.to(where, wide or t.dtype).requires_grad_() for t in inputs]
        y = fused_critic.reverse_scan(leaves[0], *(leaves[2:] or [decay]), leaves[1], **options)
        return torch.autograd.grad(y, leaves, weights.to(where, y.dtype))

    for t, got, expected in zip(inputs, gradients(x.device, None), gradients("cpu", torch.float64)):
        cases.assert_close(got, expected, cases.stored(cases.tolerance(x.dtype), t.dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", SHAPE_DTYPES)
@pytest.mark.parametrize("per_position", [False, True], ids=["number", "per position"])
@pytest.mark.parametrize("time_dim", [-1, 0])
def test_shapes(device, shape, dtype, per_position, time_dim):
    compare_scan_shape(shape, dtype, per_position, time_dim, device)
    compare_scan_shape(shape, dtype, per_position, time_dim, device, compare_gradients_with_float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packed_with_one_long_segment(device, dtype):
    generator = torch.Generator().manual_seed(1)
    cu_seqlens = torch.tensor([0, 0, 3, 4003, 4003, 4100], device=device)
    x, decay = torch.randn(4100, generator=generator).to(device, dtype), torch.rand(4100, generator=generator).to(device, dtype)
    init = torch.randn(5, generator=generator).to(device)
    for function in (compare_scan, compare_scan_gradients):
        function(x, decay, init, cu_seqlens=cu_seqlens)
        function(x, decay[:5], init, cu_seqlens=cu_seqlens)


def test_gradients_of_views_that_are_not_dense(device):
    """An expanded gradient, which y.sum().backward() makes, and a gradient of x alone."""
    x = torch.randn(3, 40, device=device, requires_grad=True)
    fused_critic.reverse_scan(x, 0.5).sum().backward()
    expected = 2 - 0.5 ** torch.arange(40)
    cases.assert_close(x.grad, expected.expand(3, 40), 1e-6)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,), (0, 0)])
def test_empty(device, shape):
    x = torch.empty(shape, device=device, requires_grad=True)
    sequences = 1 if len(shape) == 1 else shape[0]
    init, decay = torch.ones(sequences, device=device, requires_grad=True), torch.ones((), device=device, requires_grad=True)
    y = fused_critic.reverse_scan(x, decay, init)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape and decay.grad == 0 and bool((init.grad == 0).all()) and init.grad.shape == (sequences,)


def test_shape_of_x_means_one_per_position(device):
    """Also where there are as many packed sequences as positions."""
    x, decay = torch.ones(3, device=device), torch.tensor([0.5, 0.25, 0.125], device=device)
    got = fused_critic.reverse_scan(x, decay, cu_seqlens=torch.tensor([0, 0, 3, 3], device=device))
    cases.assert_same_bits(got, fused_critic.reverse_scan(x, decay))


def test_recipes(device):
    """Those of the docstring, against their definitions."""
    gamma, lam = 0.9, 0.8
    generator = torch.Generator().manual_seed(2)
    r, v, b = (torch.randn(shape, generator=generator, dtype=torch.float64).to(device) for shape in ((3, 20), (3, 20), (3,)))
    v_next = torch.cat([v[:, 1:], b[:, None]], 1)
    out = fused_critic.gae(r, v, gamma=gamma, lam=lam, bootstrap_values=b)
    cases.assert_close(fused_critic.reverse_scan(r + gamma * v_next - v, gamma * lam), out.advantages, 1e-12, "GAE")
    td_lambda = fused_critic.reverse_scan(r + gamma * (1 - lam) * v_next, gamma * lam, b)
    cases.assert_close(td_lambda, out.returns, 1e-12, "TD(lambda)")
    monte_carlo = fused_critic.gae(r, v, gamma=gamma, lam=1, bootstrap_values=b).returns
    cases.assert_close(fused_critic.reverse_scan(r, gamma, b), monte_carlo, 1e-12, "discounted returns")
    trace, traces = torch.zeros_like(b), []
    for g in r.unbind(1):
        trace = gamma * lam * trace + g
        traces.append(trace)
    cases.assert_close(fused_critic.reverse_scan(r.flip(-1), gamma * lam).flip(-1), torch.stack(traces, 1), 1e-12, "traces")
    cases.assert_close(fused_critic.reverse_scan(r, 1), r.flip(1).cumsum(1).flip(1), 1e-12, "sums")


def test_offsets_beyond_31_bits(device):
    compare_scan_far(device)


def test_same_bits_on_every_run(device):
    generator = torch.Generator().manual_seed(3)
    x, decay = (torch.rand(2, 5000, generator=generator).to(device).requires_grad_() for _ in range(2))

    def run():
        y = fused_critic.reverse_scan(x, decay)
        shared = fused_critic.reverse_scan(x, decay[0, 0])
        return y, *torch.autograd.grad(y.square().sum() + shared.square().sum(), (x, decay))

    for a, b in zip(run(), run()):
        cases.assert_same_bits(a, b)


@pytest.mark.parametrize("shape", [(1, 50_000), (37, 300)])
@pytest.mark.parametrize("time_dim", [-1, 0])
def test_same_bits_for_every_number_of_threads(threads, shape, time_dim):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(shape if time_dim == -1 else shape[::-1], generator=generator).requires_grad_()
    decay = torch.tensor(0.9, requires_grad=True)
    results = []
    for n in (1, 2, 3, 7):
        threads(n)
        y = fused_critic.reverse_scan(x, decay, time_dim=time_dim)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, decay))))
    for other in results[1:]:
        for a, b in zip(other, results[0]):
            cases.assert_same_bits(a, b)


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("decay", DECAYS)
def test_opcheck(device, grad, decay):
    problem = {"kind": "padded", "size": (2, 8), "dtypes": [torch.float32] * 3, "strides": ["contiguous"] * 2, "init": True, "seed": 5}
    x, decay, init, _ = build_scan({**problem, "decay": decay}, device)
    tensors = [t for t in (x, decay, init) if isinstance(t, torch.Tensor) and t.dtype.is_floating_point]
    for t in tensors:
        t.requires_grad_(grad)
    if isinstance(decay, float):
        torch.library.opcheck(ops.reverse_scan.default, (x, init), {"decay": decay})
        return
    torch.library.opcheck(ops.reverse_scan.tensor, (x, decay, init), {})
    constants = [t.detach() for t in (torch.ones_like(x), x, decay, init)]
    wanted = {"wanted": [True, decay.dtype.is_floating_point, True], "time_dim": -1}
    torch.library.opcheck(ops.reverse_scan_backward.default, (*constants, None), wanted)


@pytest.mark.parametrize("kind", cases.LAYOUTS)
@pytest.mark.parametrize("decay", ["0-d", "per sequence", "per position"])
def test_gradcheck(device, kind, decay):
    problem = {"kind": kind, "size": (2, 4), "dtypes": [torch.float64] * 3, "strides": ["contiguous"] * 2, "init": True, "seed": 6}
    x, decay, init, options = build_scan({**problem, "decay": decay}, device)
    leaves = [t.requires_grad_() for t in (x, decay, init)]
    assert torch.autograd.gradcheck(lambda x, decay, init: fused_critic.reverse_scan(x, decay, init, **options), leaves)


def test_double_backward_raises(device):
    x = torch.randn(2, 5, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(fused_critic.reverse_scan(x, 0.5).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="fused_critic.reverse_scan: double backward is not supported"):
        grad.sum().backward()


def test_forward_mode_is_refused(device):
    x = torch.randn(2, 5, device=device)
    with pytest.raises(NotImplementedError, match="fused_critic.reverse_scan: forward-mode differentiation .* is not supported"):
        torch.func.jvp(lambda x: fused_critic.reverse_scan(x, 0.5), (x,), (x,))


def test_compiled_without_recompilation(device):
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, decay: fused_critic.reverse_scan(x, decay).sum(), backend=counter, fullgraph=True, dynamic=True)
    for decay in (0.5, 0.25, 0.75):
        x = torch.randn(3, 9, device=device, requires_grad=True)
        (got,) = torch.autograd.grad(compiled(x, decay), x)
        (expected,) = torch.autograd.grad(fused_critic.reverse_scan(x, decay).sum(), x)
        cases.assert_close(got, expected, 1e-6)
    assert counter.frame_count == 1


def test_vmap(device):
    x, decay = torch.randn(4, 3, 9, device=device), torch.rand(4, device=device)
    got = torch.vmap(fused_critic.reverse_scan)(x, decay)
    for a, b, d in zip(got, x, decay):
        cases.assert_same_bits(a, fused_critic.reverse_scan(b, d))


@pytest.mark.filterwarnings("ignore:fused_critic")
@given(problem=problems)
def test_composite(problem):
    x, decay, init, options = build_scan(problem, "cpu")
    scan = fused_critic.reverse_scan(x, decay, init, **options)
    got = _fallback._reverse_scan(x, init, options["cu_seqlens"], decay=decay, time_dim=options["time_dim"])
    assert got.dtype == scan.dtype and got.stride() == scan.stride()
    cases.assert_close(got, scan, cases.tolerance(scan.dtype))
    decay = torch.as_tensor(decay)
    backward = (scan.cos(), x, decay, init, options["cu_seqlens"])
    wanted = {"wanted": [True, decay.dtype.is_floating_point, init is not None], "time_dim": options["time_dim"]}
    for a, b in zip(_fallback._reverse_scan_backward(*backward, **wanted), ops.reverse_scan_backward(*backward, **wanted)):
        assert a.dtype == b.dtype
        cases.assert_close(a, b, cases.tolerance(a.dtype))


BAD = [
    ({"decay": torch.ones(6)}, ValueError, r"decay: expected a number, a 0-d tensor, shape \[4\] .* or shape \[4, 6\] .*, got shape \[6\]"),
    ({"decay": torch.ones(4, 1)}, ValueError, r"decay: expected .*, got shape \[4, 1\]"),
    ({"decay": torch.ones(4, 6, dtype=torch.int64)}, TypeError, r"decay: expected a floating dtype .*, got Long"),
    ({"decay": torch.ones(4, dtype=torch.int64)}, TypeError, r"decay: expected a floating dtype .*, got Long"),
    ({"x": torch.ones(4, 6, dtype=torch.int64)}, TypeError, r"x: expected a floating dtype .*, got Long"),
    ({"x": torch.ones(2, 2, 2)}, ValueError, r"x: expected 1 or 2 dimensions.*got shape \[2, 2, 2\]"),
    ({"init": torch.ones(6)}, ValueError, r"init: expected shape \[4\] \(one value per sequence\), got \[6\]"),
    ({"time_dim": 2}, ValueError, r"time_dim: expected a dimension of x \(shape \[4, 6\]\), got 2"),
    ({"cu_seqlens": torch.tensor([0, 24])}, ValueError, r"x: expected the packed shape \[N\] beside cu_seqlens, got \[4, 6\]"),
]


@pytest.mark.parametrize("arguments, error, message", BAD, ids=[f"{i}-{'-'.join(b[0])}" for i, b in enumerate(BAD)])
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match="fused_critic.reverse_scan: " + message):
        fused_critic.reverse_scan(**{"x": torch.ones(4, 6), "decay": 0.5, **arguments})


def test_cu_seqlens_on_cuda_stay_in_bounds(device):
    """On CUDA the host never reads cu_seqlens: nonsense gives nonsense, but no access outside of the tensors."""
    if device != "cuda":
        pytest.skip("on the CPU cu_seqlens is always validated")
    nonsense = torch.tensor([-7, 5, 9, 2**40, -(2**50)], device=device)
    x, decay = torch.randn(24, device=device, requires_grad=True), torch.rand(4, device=device, requires_grad=True)
    fused_critic.reverse_scan(x, decay, cu_seqlens=nonsense).sum().backward()
