"""GAE against the float64 reference, on every device."""

import math

import fused_critic
import pytest
import torch
from fused_critic import reference
from fused_critic.check import cases
from fused_critic.check.gae import (
    FACTORS,
    SHAPES,
    compare,
    compare_far,
    compare_gradients,
    compare_one_long_segment,
    compare_problem,
    compare_shape,
)
from hypothesis import given
from hypothesis import strategies as st


def test_reference_vector(device):
    """docs/design.md, skip mode."""
    values = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], device=device)
    rewards, mask = torch.zeros(7, device=device), torch.tensor([1, 1, 0, 0, 1, 1, 0], device=device)
    rewards[5] = 1
    for function in (fused_critic.gae, reference.gae):
        got = function(rewards, values, mask, gamma=0.9, lam=0.8)
        cases.assert_close(got.advantages, torch.tensor([0.4300, 0.4862, 0, 0, 0.3280, 0.4000, 0]), 5e-5)


problems = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in FACTORS.items()})


@given(problem=problems)
def test_matches_reference(device, problem):
    compare_problem(problem, device)


@given(problem=problems)
def test_gradients_match_reference(device, problem):
    compare_problem({**problem, "dtypes": [torch.float64] * 3}, device, compare_gradients)
    compare_problem(problem, device, compare_gradients)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("time_dim", [-1, 0])
def test_shapes(device, shape, masked, time_dim):
    compare_shape(shape, masked, time_dim, device)


# Sizes on both sides of every change of algorithm (several rows a warp, a warp a row, a block a row, a row over many blocks), aligned and
# not; dtypes for each kind of access. Compared with the float64 CPU kernels, which the tests above hold against the reference.
ACCESS = {
    "float32": (torch.float32, torch.float32, torch.bool),
    "bfloat16 and int64": (torch.bfloat16, torch.float32, torch.int64),
    "float64": (torch.float64, torch.float64, torch.bool),
}


@pytest.mark.parametrize(
    "shape", [(5, 8), (3, 64), (2, 128), (3, 132), (2, 512), (3, 1024), (2, 1030), (2, 3001), (2, 5000), (1, 20000)], ids=str
)
@pytest.mark.parametrize("access", ACCESS)
@pytest.mark.parametrize("content", ["plain", "masked", "terminated", "everything"])
@pytest.mark.parametrize("time_dim", [-1, 0])
def test_outputs_and_gradients_at_every_size(device, shape, access, content, time_dim):
    if time_dim == 0:
        shape = (shape[1] // shape[0], 8 * shape[0])
    value_dtype, dtype, mask_dtype = ACCESS[access]
    generator = torch.Generator().manual_seed(10)
    values = torch.randn(shape, generator=generator).to(value_dtype)
    rewards, *weights = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    inputs, flags = {"rewards": rewards, "values": values}, {}
    if content in ("masked", "everything"):
        flags["mask"] = cases.mask(shape, mask_dtype, generator)
    if content in ("terminated", "everything"):
        flags["terminated"] = torch.rand(shape, generator=generator) < 0.05
    if content == "everything":
        flags["truncated"] = torch.rand(shape, generator=generator) < 0.05
        inputs["next_values"] = torch.randn(shape, generator=generator).to(dtype)

    def run(where, wide):
        leaves = {name: x.to(where, wide or x.dtype).requires_grad_() for name, x in inputs.items()}
        others = {name: x.to(where) for name, x in flags.items()}
        out = fused_critic.gae(**leaves, **others, gamma=0.99, lam=0.95, time_dim=time_dim)
        total = sum((x * w.to(where, x.dtype)).sum() for x, w in zip(out, weights))
        return *out, *torch.autograd.grad(total, list(leaves.values()))

    names = ["advantages", "returns", *(f"gradient of {name}" for name in inputs)]
    for name, got, expected in zip(names, run(device, None), run("cpu", torch.float64)):
        cases.assert_close(got, expected, max(cases.tolerance(dtype), cases.ROUNDING[got.dtype]), name)


FLOATING = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("time_dim", [-1, 0])
@pytest.mark.parametrize("reward_dtype", FLOATING)
@pytest.mark.parametrize("value_dtype", FLOATING)
def test_every_mixture_of_dtypes(device, reward_dtype, value_dtype, time_dim):
    generator = torch.Generator().manual_seed(15)
    rewards, values = (torch.randn((12, 64), generator=generator).to(device, dtype) for dtype in (reward_dtype, value_dtype))
    compare(rewards, values, cases.mask((12, 64), torch.bool, generator).to(device), gamma=0.99, lam=0.95, time_dim=time_dim)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float64])
@pytest.mark.parametrize("shape", [(8, 64), (3, 3000), (2, 20000)])
def test_masks_wider_than_the_values(device, shape, dtype):
    generator = torch.Generator().manual_seed(16)
    rewards, values = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    compare(rewards, values, cases.mask(shape, dtype, generator).to(device), gamma=0.99, lam=0.95)


def test_packed_with_one_long_segment(device):
    compare_one_long_segment(device)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,), (0, 0)])
def test_empty(device, shape):
    empty = torch.empty(shape, device=device)
    got = fused_critic.gae(empty, empty, torch.empty(shape, dtype=torch.bool, device=device), gamma=0.99, lam=0.95)
    assert got.advantages.shape == got.returns.shape == shape


def test_gradients_of_empty(device):
    bootstrap = torch.randn(3, device=device, requires_grad=True)
    rewards = torch.empty(3, 0, device=device, requires_grad=True)
    fused_critic.gae(rewards, rewards, bootstrap_values=bootstrap, gamma=0.9, lam=0.9).advantages.sum().backward()
    assert rewards.grad.shape == (3, 0) and bootstrap.grad.tolist() == [0, 0, 0]


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_masked_contents_have_no_influence(device, layout, poison):
    generator = torch.Generator().manual_seed(2)
    arranged = cases.layout(layout, 5, 75, generator, device)
    rewards, values, next_values = (torch.randn(arranged.shape, generator=generator).to(device) for _ in range(3))
    terminated, truncated = ((torch.rand(arranged.shape, generator=generator) < 0.1).float().to(device) for _ in range(2))
    mask = cases.mask(arranged.shape, torch.bool, generator).to(device)

    def run(tensors, ends, cuts):
        reward, value, following = (x.clone().requires_grad_() for x in tensors)
        out = fused_critic.gae(
            reward, value, mask, next_values=following, terminated=ends, truncated=cuts, gamma=0.99, lam=0.95, **arranged.options
        )
        (out.advantages.sum() + out.returns.square().sum()).backward()
        return *out, reward.grad, value.grad, following.grad

    clean = run((rewards, values, next_values), terminated, truncated)
    dirty = run(
        [torch.where(mask, x, poison) for x in (rewards, values, next_values)],
        *(torch.where(mask, x, 1.0) for x in (terminated, truncated)),
    )
    for a, b in zip(clean, dirty):
        cases.assert_same_bits(a, b)


def test_single_sequence_bootstrap_may_be_0d(device):
    rewards, values = torch.randn(20, device=device), torch.randn(20, device=device)
    bootstrap = torch.tensor(0.7, device=device, requires_grad=True)
    a = fused_critic.gae(rewards, values, bootstrap_values=bootstrap, gamma=0.9, lam=0.8)
    b = fused_critic.gae(rewards, values, bootstrap_values=bootstrap.detach().view(1), gamma=0.9, lam=0.8)
    cases.assert_same_bits(a.advantages, b.advantages)
    a.advantages.sum().backward()
    assert bootstrap.grad.shape == ()


def test_only_one_output_used(device):
    rewards = torch.randn(3, 30, device=device, dtype=torch.float64, requires_grad=True)
    values = torch.randn(3, 30, device=device, dtype=torch.float64)
    (grad,) = torch.autograd.grad(fused_critic.gae(rewards, values, gamma=0.9, lam=0.8).returns.sum(), rewards)
    (expected,) = torch.autograd.grad(reference.gae(rewards.cpu(), values.cpu(), gamma=0.9, lam=0.8).returns.sum(), rewards)
    cases.assert_close(grad, expected, 1e-10)


def test_half_precision_gradients_come_in_the_inputs_dtype(device):
    rewards = torch.randn(3, 9, device=device, dtype=torch.bfloat16, requires_grad=True)
    values = torch.randn(3, 9, device=device, dtype=torch.float16, requires_grad=True)
    fused_critic.gae(rewards, values, gamma=0.9, lam=0.8).advantages.sum().backward()
    assert rewards.grad.dtype == torch.bfloat16 and values.grad.dtype == torch.float16


def test_same_bits_on_every_run(device):
    generator = torch.Generator().manual_seed(3)
    rewards, values = (torch.randn(3, 9000, generator=generator).to(device) for _ in range(2))
    mask = cases.mask((3, 9000), torch.bool, generator).to(device)
    first, second = (fused_critic.gae(rewards, values, mask, gamma=0.99, lam=0.95) for _ in range(2))
    for a, b in zip(first, second):
        cases.assert_same_bits(a, b)


@pytest.mark.parametrize("shape", [(1, 50_000), (2, 20_000), (37, 300)])
@pytest.mark.parametrize("time_dim", [-1, 0])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_same_bits_for_every_number_of_threads(threads, shape, time_dim, masked):
    generator = torch.Generator().manual_seed(4)
    shape = shape if time_dim == -1 else shape[::-1]
    rewards, values = (torch.randn(shape, generator=generator) for _ in range(2))
    mask = cases.mask(shape, torch.bool, generator) if masked else None
    results = []
    for n in (1, 2, 3, 7):
        threads(n)
        results.append(fused_critic.gae(rewards, values, mask, gamma=0.99, lam=0.95, time_dim=time_dim))
    for other in results[1:]:
        cases.assert_same_bits(other.advantages, results[0].advantages)
        cases.assert_same_bits(other.returns, results[0].returns)


# What the CPU kernels tell apart: blocks without a flag, groups that are full, empty or mixed, groups with an end, and leftovers of each.
def flag_pattern(name, shape, generator):
    positions = torch.arange(shape[-1]).expand(shape)
    if name == "full":
        return torch.ones(shape, dtype=torch.bool)
    if name == "empty":
        return torch.zeros(shape, dtype=torch.bool)
    if name == "right padding":
        return positions < torch.randint(1, shape[-1] + 1, (*shape[:-1], 1), generator=generator)
    if name == "left padding":
        return positions >= torch.randint(0, shape[-1], (*shape[:-1], 1), generator=generator)
    if name == "turns":  # runs of up to 150 tokens, the first and the last of either kind
        return (torch.rand(shape, generator=generator) < 1 / 75).cumsum(-1) % 2 == 0
    if name == "rare gaps":
        return torch.rand(shape, generator=generator) >= 0.01
    return torch.rand(shape, generator=generator) < 0.6


PATTERNS = ("full", "empty", "right padding", "left padding", "turns", "rare gaps", "random")


@pytest.mark.parametrize("length", [1, 7, 8, 9, 31, 32, 33, 40, 63, 65, 1023, 1024, 1025, 1063, 2500])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("follow", ["nothing", "terminated", "truncated"])
def test_flag_patterns_at_the_edges_of_blocks(device, length, pattern, follow):
    generator = torch.Generator().manual_seed(length)
    shape = (3, length)
    rewards, values, next_values = (torch.randn(shape, generator=generator).to(device) for _ in range(3))
    mask = flag_pattern(pattern, shape, generator).to(device)
    options = {} if follow == "nothing" else {"terminated": (torch.rand(shape, generator=generator) < 0.02).to(device)}
    if follow == "truncated":
        options |= {"truncated": (torch.rand(shape, generator=generator) < 0.02).to(device), "next_values": next_values}
    compare(rewards, values, mask, gamma=0.99, lam=0.95, **options)
    if pattern == "full" and device == "cpu":  # without mask and flags CUDA has a kernel of its own, whose products round elsewhere
        with_mask = fused_critic.gae(rewards, values, mask, gamma=0.99, lam=0.95, **options)
        without = fused_critic.gae(rewards, values, gamma=0.99, lam=0.95, **options)
        for a, b in zip(with_mask, without):
            cases.assert_same_bits(a, b)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_masked_contents_have_no_influence_in_long_rows(device, pattern, poison):
    generator = torch.Generator().manual_seed(12)
    shape = (2, 9001)
    rewards, values = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    mask = flag_pattern(pattern, shape, generator).to(device)
    clean = fused_critic.gae(rewards, values, mask, gamma=0.99, lam=0.95)
    dirty = fused_critic.gae(*(torch.where(mask, x, poison) for x in (rewards, values)), mask, gamma=0.99, lam=0.95)
    for a, b in zip(clean, dirty):
        cases.assert_same_bits(a, b)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_token_has_no_influence_on_later_ones(device, masked, poison):
    """One row for each place of the poison: within a block, every lane and every segment of it."""
    generator = torch.Generator().manual_seed(13)
    length = 75
    rewards, values = (torch.randn(length, generator=generator).repeat(length, 1) for _ in range(2))
    mask = flag_pattern("random" if masked else "full", (length,), generator).repeat(length, 1)
    clean = fused_critic.gae(rewards.to(device), values.to(device), mask.to(device), gamma=0.99, lam=0.95)
    rewards.fill_diagonal_(poison)
    dirty = fused_critic.gae(rewards.to(device), values.to(device), mask.to(device), gamma=0.99, lam=0.95)
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    for a, b in zip(clean, dirty):
        cases.assert_same_bits(a.cpu()[later], b.cpu()[later])
        assert not b.cpu().diagonal()[mask[0]].isfinite().any()


@pytest.mark.parametrize("pattern", ["turns", "rare gaps", "random"])
def test_masked_positions_are_as_if_left_out(device, pattern):
    generator = torch.Generator().manual_seed(14)
    rewards, values = (torch.randn(5000, generator=generator).to(device) for _ in range(2))
    mask = flag_pattern(pattern, (5000,), generator).to(device)
    ends = (torch.rand(5000, generator=generator) < 0.01).to(device)
    got = fused_critic.gae(rewards, values, mask, terminated=ends, gamma=0.99, lam=0.95)
    compact = fused_critic.gae(rewards[mask], values[mask], terminated=ends[mask], gamma=0.99, lam=0.95)
    for a, b in zip(got, compact):
        cases.assert_close(a[mask], b, cases.FLOAT32_TOLERANCE)


@pytest.mark.parametrize("length", [100, 3000, 9001])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_row_does_not_depend_on_its_neighbours_on_the_cpu(length, pattern):
    generator = torch.Generator().manual_seed(15)
    shape = (5, length)
    rewards, values = (torch.randn(shape, generator=generator) for _ in range(2))
    mask, ends = flag_pattern(pattern, shape, generator), torch.rand(shape, generator=generator) < 0.01
    together = fused_critic.gae(rewards, values, mask, terminated=ends, gamma=0.99, lam=0.95)
    for row in range(len(rewards)):
        alone = fused_critic.gae(rewards[row], values[row], mask[row], terminated=ends[row], gamma=0.99, lam=0.95)
        for a, b in zip(together, alone):
            cases.assert_same_bits(a[row], b)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("follow", ["nothing", "terminated", "next_values"])
def test_split_rows_have_the_same_bits_for_every_number_of_threads(threads, pattern, follow):
    generator = torch.Generator().manual_seed(17)
    rewards, values, next_values = (torch.randn(1, 40_003, generator=generator) for _ in range(3))
    mask = flag_pattern(pattern, rewards.shape, generator)
    options = {}
    if follow == "terminated":
        options["terminated"] = torch.rand(rewards.shape, generator=generator) < 0.001
    if follow == "next_values":
        options["next_values"] = next_values
    results = []
    for n in (1, 2, 3, 7):
        threads(n)
        results.append(fused_critic.gae(rewards, values, mask, gamma=0.9999, lam=1.0, **options))
    for other in results[1:]:
        for a, b in zip(other, results[0]):
            cases.assert_same_bits(a, b)


def test_offsets_beyond_31_bits(device):
    compare_far(device)


def test_whiten(device):
    generator = torch.Generator().manual_seed(6)
    rewards, values = (torch.randn(4, 30, generator=generator).to(device) for _ in range(2))
    mask = cases.mask((4, 30), torch.bool, generator).to(device)
    plain = fused_critic.gae(rewards, values, mask, gamma=0.99, lam=0.95)
    white = fused_critic.gae(rewards, values, mask, gamma=0.99, lam=0.95, whiten=True)
    cases.assert_same_bits(plain.returns, white.returns)
    cases.assert_close(white.advantages, fused_critic.masked_whiten(plain.advantages, mask), 1e-6)
