"""V-trace against the float64 reference and against GAE, on every device."""

import math

import fused_critic
import pytest
import torch
from fused_critic import _fallback, reference
from fused_critic.check import cases
from fused_critic.check.recurrence import (
    SHAPE_DTYPES,
    SHAPES,
    VTRACE_FACTORS,
    build_vtrace,
    compare_vtrace,
    compare_vtrace_far,
    compare_vtrace_problem,
    compare_vtrace_shape,
)
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

ops = torch.ops.fused_critic
problems = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in VTRACE_FACTORS.items()})


def drawn(shape, count, seed, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(count)]


def test_definition(device):
    """Equation 1 of the paper as it stands there, a double sum, and the advantages of its section 4.2: one sequence, no flags."""
    rewards, values, logs = drawn((7,), 3, 0, "cpu", torch.float64)
    bootstrap, gamma, rho_clip, c_clip = torch.tensor(0.3, dtype=torch.float64), 0.9, 1.2, 0.8
    ratios = logs.exp()
    rho, c = ratios.clamp(max=rho_clip), ratios.clamp(max=c_clip)
    following = torch.cat([values[1:], bootstrap[None]])
    vs = []
    for s in range(7):
        total = values[s].clone()
        for t in range(s, 7):
            total += gamma ** (t - s) * c[s:t].prod() * rho[t] * (rewards[t] + gamma * following[t] - values[t])
        vs.append(total)
    vs = torch.stack(vs)
    pg = rho * (rewards + gamma * torch.cat([vs[1:], bootstrap[None]]) - values)
    options = {"gamma": gamma, "rho_clip": rho_clip, "c_clip": c_clip, "pg_rho_clip": rho_clip}
    for function, where in ((reference.vtrace, "cpu"), (fused_critic.vtrace, device)):
        got = function(*(x.to(where) for x in (rewards, values, logs)), bootstrap_values=bootstrap.to(where), **options)
        cases.assert_close(got.vs, vs, 1e-12, "vs")
        cases.assert_close(got.pg_advantages, pg, 1e-12, "pg_advantages")
        cases.assert_close(got.advantages, vs - values, 1e-12, "advantages")


@given(problem=problems)
def test_matches_reference(device, problem):
    compare_vtrace_problem(problem, device)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", SHAPE_DTYPES)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("time_dim", [-1, 0])
def test_shapes(device, shape, dtype, masked, time_dim):
    compare_vtrace_shape(shape, dtype, masked, time_dim, device)


@pytest.mark.parametrize("follow", ["nothing", "bootstrap", "truncated"])
@pytest.mark.parametrize("kind", cases.LAYOUTS)
def test_equals_gae_on_policy(device, kind, follow):
    problem = {
        "kind": kind,
        "size": (3, 60),
        "dtypes": [torch.float32] * 3,
        "strides": ["contiguous"] * 3,
        "mask": torch.bool,
        "density": 0.7,
    }
    problem |= {"flags": torch.bool, "follow": follow, "logs": True, "lam": 0.9, "clips": (1.0, 1.0, 1.0), "tensors": False, "seed": 1}
    rewards, values, options = build_vtrace(problem, device)
    got = fused_critic.vtrace(rewards, values, **{**options, "log_rhos": torch.zeros_like(rewards)})
    for name in ("log_rhos", "rho_clip", "c_clip", "pg_rho_clip"):
        del options[name]
    expected = fused_critic.gae(rewards, values, **options)
    cases.assert_close(got.advantages, expected.advantages, 1e-5, "advantages")
    cases.assert_close(got.vs, expected.returns, 1e-5, "vs")
    whole = fused_critic.vtrace(rewards, values, ratios=torch.ones_like(rewards), **{**options, "lam": 1.0})
    cases.assert_close(whole.pg_advantages, fused_critic.gae(rewards, values, **{**options, "lam": 1.0}).advantages, 1e-5, "lambda 1")


def test_packed_with_one_long_segment(device):
    rewards, values, logs, bootstrap = (*drawn((4100,), 3, 1, device), *drawn((5,), 1, 2, device))
    cu_seqlens = torch.tensor([0, 0, 3, 4003, 4003, 4100], device=device)
    mask = cases.mask((4100,), torch.bool, torch.Generator().manual_seed(3)).to(device)
    for options in ({"mask": mask}, {}):
        compare_vtrace(rewards, values, log_rhos=logs, bootstrap_values=bootstrap, gamma=0.99, cu_seqlens=cu_seqlens, **options)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("kind", cases.LAYOUTS)
def test_masked_contents_have_no_influence(device, kind, poison):
    arranged = cases.layout(kind, 5, 75, torch.Generator().manual_seed(0), device)
    tensors = drawn(arranged.shape, 4, 4, device)
    generator = torch.Generator().manual_seed(5)
    flags = [(torch.rand(arranged.shape, generator=generator) < 0.1).float().to(device) for _ in range(2)]
    mask = cases.mask(arranged.shape, torch.bool, generator).to(device)

    def run(tensors, flags):
        rewards, values, logs, next_values = tensors
        common = {"mask": mask, "gamma": 0.99, "lam": 0.95, "terminated": flags[0], **arranged.options}
        alone = fused_critic.vtrace(rewards, values, logs, **common)
        return *alone, *fused_critic.vtrace(rewards, values, ratios=logs, next_values=next_values, truncated=flags[1], **common)

    dirty = run([torch.where(mask, x, poison) for x in tensors], [torch.where(mask, x, 1.0) for x in flags])
    for a, b in zip(run(tensors, flags), dirty):
        cases.assert_same_bits(a, b)


def test_nan_in_a_ratio_is_not_clipped_away(device):
    x = torch.ones(6, device=device)
    ratios = x.clone()
    ratios[3] = math.nan
    got = fused_critic.vtrace(x, x, ratios=ratios, gamma=0.9)
    for y in got:
        assert y[:4].isnan().all() and y[4:].isfinite().all()


def test_inputs_are_constants(device):
    x, y = (t.requires_grad_() for t in drawn((3, 9), 2, 6, device))
    assert not any(t.requires_grad for t in fused_critic.vtrace(x, y, ratios=x.exp(), gamma=0.9))
    gamma = torch.tensor(0.9, device=device, requires_grad=True)
    assert not any(t.requires_grad for t in fused_critic.vtrace(x, y, ratios=x.exp(), gamma=gamma))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,), (0, 0)])
def test_empty(device, shape):
    x = torch.empty(shape, device=device)
    assert all(y.shape == shape for y in fused_critic.vtrace(x, x, x, gamma=0.9))


def test_offsets_beyond_31_bits(device):
    compare_vtrace_far(device)


def test_same_bits_on_every_run(device):
    tensors = drawn((2, 5000), 3, 7, device)
    first, second = (fused_critic.vtrace(*tensors, gamma=0.99) for _ in range(2))
    for a, b in zip(first, second):
        cases.assert_same_bits(a, b)


@pytest.mark.parametrize("shape", [(1, 50_000), (37, 300)])
@pytest.mark.parametrize("time_dim", [-1, 0])
def test_same_bits_for_every_number_of_threads(threads, shape, time_dim):
    tensors = drawn(shape if time_dim == -1 else shape[::-1], 3, 8, "cpu")
    results = []
    for n in (1, 2, 3, 7):
        threads(n)
        results.append(fused_critic.vtrace(*tensors, gamma=0.99, time_dim=time_dim))
    for other in results[1:]:
        for a, b in zip(other, results[0]):
            cases.assert_same_bits(a, b)


def test_opcheck(device):
    rewards, values, logs, next_values = drawn((3, 8), 4, 9, device)
    mask = cases.mask((3, 8), torch.bool, torch.Generator().manual_seed(9)).to(device)
    torch.library.opcheck(ops.vtrace.default, (rewards, values.requires_grad_(), logs, None, mask), {"gamma": 0.9, "c_clip": None})
    arguments = (rewards.bfloat16(), values, None, logs.exp(), mask, mask, mask.roll(1, 1), next_values)
    torch.library.opcheck(ops.vtrace.default, arguments, {"gamma": 0.9, "lam": 0.8, "time_dim": 0})
    numbers = [torch.tensor(x, dtype=torch.float64, device=device) for x in (0.9, 0.8, 1.0, 2.0)]
    torch.library.opcheck(ops.vtrace.tensor, (rewards, values.detach(), *numbers, None, logs), {})


def test_compiled_without_recompilation(device):
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def function(rewards, values, logs, gamma, clip):
        return fused_critic.vtrace(rewards, values, logs, gamma=gamma, rho_clip=clip)

    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    for gamma, clip in ((0.9, 1.5), (0.8, 1.25), (0.7, 0.75)):
        tensors = drawn((3, 9), 3, 10, device)
        for a, b in zip(compiled(*tensors, gamma, clip), function(*tensors, gamma, clip)):
            cases.assert_close(a, b, 1e-6)
    assert counter.frame_count == 1


def test_vmap(device):
    tensors = drawn((4, 3, 9), 3, 11, device)
    got = torch.vmap(lambda r, v, logs: tuple(fused_critic.vtrace(r, v, logs, gamma=0.9)))(*tensors)
    for i, slices in enumerate(zip(*tensors)):
        for a, b in zip(got, fused_critic.vtrace(*slices, gamma=0.9)):
            cases.assert_same_bits(a[i], b)


@pytest.mark.filterwarnings("ignore:fused_critic")
@given(problem=problems)
def test_composite(problem):
    rewards, values, options = build_vtrace({**problem, "tensors": False}, "cpu")
    expected = ops.vtrace(rewards, values, **options)
    for a, b in zip(_fallback._vtrace(rewards, values, **options), expected):
        assert a.dtype == b.dtype and a.stride() == b.stride()
        cases.assert_close(a, b, cases.tolerance(a.dtype))


V = torch.ones(4, 6)
BAD = [
    ({"log_rhos": None}, ValueError, "log_rhos: expected exactly one of log_rhos and ratios, got neither"),
    ({"ratios": V}, ValueError, "log_rhos: expected exactly one of log_rhos and ratios, got both"),
    ({"values": V[:, :1]}, ValueError, r"values: expected shape \[4, 6\] \(that of rewards\), got \[4, 1\]; nothing is broadcast"),
    ({"log_rhos": V[0]}, ValueError, r"log_rhos: expected shape \[4, 6\].*got \[6\]"),
    ({"log_rhos": V.long()}, TypeError, r"log_rhos: expected a floating dtype.*got Long"),
    ({"gamma": 1.5}, ValueError, r"gamma: expected a number in \[0, 1\], got 1.5"),
    ({"lam": math.nan}, ValueError, r"lam: expected a number in \[0, 1\], got nan"),
    ({"rho_clip": -1.0}, ValueError, r"rho_clip: expected a number >= 0 or None \(no clipping\), got -1"),
    ({"c_clip": math.nan}, ValueError, "c_clip: expected a number >= 0"),
    ({"pg_rho_clip": torch.ones(2)}, ValueError, r"pg_rho_clip: expected a number or a 0-d tensor, got shape \[2\]"),
    ({"truncated": V}, ValueError, "next_values: expected a tensor beside truncated.*got None"),
    ({"next_values": V, "bootstrap_values": V[:, 0]}, ValueError, "bootstrap_values: expected None beside next_values"),
    ({"bootstrap_values": V[0]}, ValueError, r"bootstrap_values: expected shape \[4\] \(one value per sequence\), got \[6\]"),
]


@pytest.mark.parametrize("arguments, error, message", BAD, ids=[f"{i}-{'-'.join(b[0])}" for i, b in enumerate(BAD)])
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match="fused_critic.vtrace: " + message):
        fused_critic.vtrace(**{"rewards": V, "values": V, "log_rhos": V, "gamma": 0.9, **arguments})


def test_cu_seqlens_on_cuda_stay_in_bounds(device):
    """On CUDA the host never reads cu_seqlens: nonsense gives nonsense, but no access outside of the tensors."""
    if device != "cuda":
        pytest.skip("on the CPU cu_seqlens is always validated")
    x = torch.randn(24, device=device)
    fused_critic.vtrace(x, x, x, gamma=0.9, cu_seqlens=torch.tensor([-7, 30, 3, 2**40, -(2**50), 24], device=device))
