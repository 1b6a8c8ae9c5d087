"""GAE against the float64 reference, on every device."""

import itertools
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

REFERENCE_VECTORS = {  # docs/design.md
    "skip": [0.4300, 0.4862, 0, 0, 0.3280, 0.4000, 0],
    "zero": [0.1921, 0.1557, 0, 0, 0.3280, 0.4000, 0],
    "reset": [-0.0640, -0.2000, 0, 0, 0.3280, 0.4000, 0],
    "ignore": [0.2927, 0.2954, 0.3131, 0.3515, 0.4187, 0.5260, -0.7000],
}


@pytest.mark.parametrize("mask_mode", REFERENCE_VECTORS)
def test_reference_vector(device, mask_mode):
    values = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], device=device)
    rewards, mask = torch.zeros(7, device=device), torch.tensor([1, 1, 0, 0, 1, 1, 0], device=device)
    rewards[5] = 1
    for function in (fused_critic.gae, reference.gae):
        got = function(rewards, values, mask, gamma=0.9, lam=0.8, mask_mode=mask_mode)
        cases.assert_close(got.advantages, torch.tensor(REFERENCE_VECTORS[mask_mode]), 5e-5)


problems = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in FACTORS.items()})


@given(problem=problems)
def test_matches_reference(device, problem):
    compare_problem(problem, device)


@given(problem=problems)
def test_gradients_match_reference(device, problem):
    compare_problem({**problem, "dtypes": [torch.float64] * 3}, device, compare_gradients)
    compare_problem(problem, device, compare_gradients)


@pytest.mark.parametrize("mask_mode", FACTORS["mask_mode"])
@given(problem=problems)
def test_mask_modes(device, mask_mode, problem):
    problem = {**problem, "mask_mode": mask_mode, "mask": problem["mask"] or torch.bool}
    compare_problem(problem, device)
    compare_problem(problem, device, compare_gradients)


@pytest.mark.parametrize("numbers", FACTORS["numbers"])
@given(problem=problems)
def test_a_lambda_for_the_returns(device, numbers, problem):
    problem = {**problem, "numbers": numbers, "returns_lam": problem["returns_lam"] or 0.8}
    compare_problem(problem, device)
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
    "shape", [(5, 8), (3, 64), (2, 128), (3, 132), (2, 512), (3, 1024), (2, 1030), (2, 3001), (2, 5000), (1, 10000)], ids=str
)
@pytest.mark.parametrize("access", ACCESS)
@pytest.mark.parametrize("content", ["plain", "masked", "terminated", "everything"])
@pytest.mark.parametrize("time_dim", [-1, 0])
def test_outputs_and_gradients_at_every_size(device, shape, access, content, time_dim):
    compare_with_wide(device, shape, access, content, time_dim)


def per_sequence(first, last):
    """One number per sequence; as many as the call has."""
    return lambda num_seqs: torch.linspace(first, last, num_seqs)


OPTIONS = {
    "zero": {"mask_mode": "zero"},
    "reset": {"mask_mode": "reset"},
    "numbers per sequence": {"gamma": per_sequence(0.9, 1.0), "lam": per_sequence(0.7, 0.99)},
    "returns_lam": {"returns_lam": 0.7},
    "all": {"mask_mode": "zero", "gamma": per_sequence(0.9, 1.0), "lam": per_sequence(0.7, 0.99), "returns_lam": per_sequence(0.99, 0.3)},
}


@pytest.mark.parametrize("shape", [(5, 8), (3, 132), (3, 1030), (2, 3001)], ids=str)
@pytest.mark.parametrize("access", ACCESS)
@pytest.mark.parametrize(
    "options, content",
    [(options, "everything") for options in OPTIONS] + [(options, "plain") for options in ("numbers per sequence", "returns_lam", "all")],
)
@pytest.mark.parametrize("time_dim", [-1, 0])
def test_options_at_every_size(device, shape, access, content, time_dim, options):
    options = OPTIONS[options]
    compare_with_wide(device, shape, access, content, time_dim, **options)


def compare_with_wide(device, shape, access, content, time_dim, **options):
    if time_dim == 0:
        shape = (shape[1] // shape[0], 8 * shape[0])
    options = {name: x(shape[1 + time_dim]) if callable(x) else x for name, x in options.items()}
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
        others = {name: x.to(where) if isinstance(x, torch.Tensor) else x for name, x in {**flags, **options}.items()}
        out = fused_critic.gae(**leaves, **{"gamma": 0.99, "lam": 0.95, **others}, time_dim=time_dim)
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
@pytest.mark.parametrize("options", [{}, {"mask_mode": "zero"}, {"mask_mode": "reset"}, {"mask_mode": "zero", "returns_lam": 0.5}], ids=str)
def test_masked_contents_have_no_influence(device, layout, poison, options):
    generator = torch.Generator().manual_seed(2)
    arranged = cases.layout(layout, 5, 75, generator, device)
    rewards, values, next_values = (torch.randn(arranged.shape, generator=generator).to(device) for _ in range(3))
    terminated, truncated = ((torch.rand(arranged.shape, generator=generator) < 0.1).float().to(device) for _ in range(2))
    mask = cases.mask(arranged.shape, torch.bool, generator).to(device)

    def run(tensors, ends, cuts):
        reward, value, following = (x.clone().requires_grad_() for x in tensors)
        out = fused_critic.gae(
            reward, value, mask, next_values=following, terminated=ends, truncated=cuts, gamma=0.99, lam=0.95, **options, **arranged.options
        )
        (out.advantages.sum() + out.returns.square().sum()).backward()
        return *out, reward.grad, value.grad, following.grad

    clean = run((rewards, values, next_values), terminated, truncated)
    dirty = run(
        [torch.where(mask, x, poison) for x in (rewards, values, next_values)],
        *(x if options.get("mask_mode") == "zero" else torch.where(mask, x, 1.0) for x in (terminated, truncated)),
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


@pytest.mark.parametrize("options", [{}, {"mask_mode": "zero", "returns_lam": 0.5}], ids=str)
def test_same_bits_on_every_run(device, options):
    generator = torch.Generator().manual_seed(3)
    rewards, values = (torch.randn(3, 9000, generator=generator).to(device) for _ in range(2))
    mask = cases.mask((3, 9000), torch.bool, generator).to(device)
    first, second = (fused_critic.gae(rewards, values, mask, gamma=0.99, lam=0.95, **options) for _ in range(2))
    for a, b in zip(first, second):
        cases.assert_same_bits(a, b)


@pytest.mark.parametrize("shape", [(1, 50_000), (2, 20_000), (37, 300)])
@pytest.mark.parametrize("time_dim", [-1, 0])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("options", [{}, {"mask_mode": "zero"}, {"mask_mode": "reset"}, {"returns_lam": 0.5}], ids=str)
def test_same_bits_for_every_number_of_threads(threads, shape, time_dim, masked, options):
    generator = torch.Generator().manual_seed(4)
    shape = shape if time_dim == -1 else shape[::-1]
    rewards, values = (torch.randn(shape, generator=generator) for _ in range(2))
    mask = cases.mask(shape, torch.bool, generator) if masked else None
    results = []
    for n in (1, 2, 3, 7):
        threads(n)
        results.append(fused_critic.gae(rewards, values, mask, gamma=0.99, lam=0.95, time_dim=time_dim, **options))
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


@pytest.mark.parametrize("steps, sequences", [*itertools.product([1, 2, 5], [7, 8, 9, 15, 1024, 1029, 2051]), (200, 4100)])
def test_columns_without_flags_round_as_columns_with_them(steps, sequences):
    """On the CPU the former read what they carry from the outputs of the step before, the latter keep it in arrays. The last shape is fetched ahead."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn((2, steps, sequences), generator=generator)
    numbers = {"gamma": 0.99, "lam": 0.95, "time_dim": 0, "bootstrap_values": torch.randn(sequences, generator=generator)}
    plain = fused_critic.gae(rewards, values, **numbers)
    flagged = fused_critic.gae(rewards, values, torch.ones((steps, sequences), dtype=torch.bool), **numbers)
    for name, got, expected in zip(plain._fields, plain, flagged):
        assert torch.equal(got, expected), name


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


def random_rows(device, shape=(4, 700), seed=18):
    """rewards, values, mask, flags that end an episode."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    mask = cases.mask(shape, torch.bool, generator).to(device)
    return rewards, values, mask, (torch.rand(shape, generator=generator) < 0.05).to(device)


def assert_like(got, expected, where=slice(None)):
    for a, b in zip(got, expected):
        cases.assert_close(a[where], b[where], cases.FLOAT32_TOLERANCE)


def test_zero_is_the_plain_recursion_over_masked_inputs(device):
    rewards, values, mask, ends = random_rows(device)
    got = fused_critic.gae(rewards, values, mask, mask_mode="zero", terminated=ends, gamma=0.99, lam=0.95)
    plain = fused_critic.gae(rewards * mask, values * mask, terminated=ends, gamma=0.99, lam=0.95)
    assert_like(got, plain, mask)


@pytest.mark.parametrize("with_next_values", [False, True])
def test_reset_makes_every_run_a_sequence(device, with_next_values):
    rewards, values, mask, ends = (x.reshape(-1) for x in random_rows(device))
    options = {"terminated": ends, "gamma": 0.99, "lam": 0.95}
    options |= {"next_values": values.roll(5)} if with_next_values else {}
    got = fused_critic.gae(rewards, values, mask, mask_mode="reset", **options)
    bounds = (mask[1:] != mask[:-1]).nonzero()[:, 0] + 1
    cu_seqlens = torch.cat([bounds.new_zeros(1), bounds, bounds.new_full((1,), len(mask))])
    assert_like(got, fused_critic.gae(rewards, values, cu_seqlens=cu_seqlens, **options), mask)


def test_a_bootstrap_behind_a_mask(device):
    """It passes what is skipped, is the next value of what counts as zero, and does not pass a reset."""
    zeros, mask = torch.zeros(4, device=device), torch.tensor([1, 1, 0, 0], device=device)
    bootstrap = torch.tensor(1.0, device=device, requires_grad=True)
    expected = {
        "skip": [0.405, 0.9, 0, 0],
        "zero": [0.9 * 0.45**3, 0.9 * 0.45**2, 0, 0],
        "reset": [0] * 4,
        "ignore": [0.9 * 0.45**i for i in (3, 2, 1, 0)],
    }
    for mode, advantages in expected.items():
        got = fused_critic.gae(zeros, zeros, mask, mask_mode=mode, bootstrap_values=bootstrap, gamma=0.9, lam=0.5)
        cases.assert_close(got.advantages, torch.tensor(advantages), 1e-6, mode)
        (grad,) = torch.autograd.grad(got.advantages[0], bootstrap)
        cases.assert_close(grad, torch.tensor(advantages[0]), 1e-6, mode)


def test_ignored_masks_select_for_whitening_alone(device):
    rewards, values, mask, ends = random_rows(device)
    options = {"terminated": ends, "gamma": 0.99, "lam": 0.95}
    plain = fused_critic.gae(rewards, values, **options)
    ignored = fused_critic.gae(rewards, values, mask, mask_mode="ignore", **options)
    white = fused_critic.gae(rewards, values, mask, mask_mode="ignore", whiten=True, **options)
    for a, b in zip(ignored, plain):
        cases.assert_same_bits(a, b)
    cases.assert_same_bits(white.advantages, fused_critic.masked_whiten(plain.advantages, mask))


@pytest.mark.parametrize("mask_mode", FACTORS["mask_mode"])
def test_returns_are_those_of_their_lambda(device, mask_mode):
    rewards, values, mask, ends = random_rows(device)
    options = {"terminated": ends, "mask_mode": mask_mode, "gamma": 0.99}
    both = fused_critic.gae(rewards, values, mask, lam=0.95, returns_lam=0.5, **options)
    first, second = (fused_critic.gae(rewards, values, mask, lam=lam, **options) for lam in (0.95, 0.5))
    assert_like(both, (first.advantages, second.returns))
    for a, b in zip(fused_critic.gae(rewards, values, mask, lam=0.95, returns_lam=0.95, **options), first):
        cases.assert_same_bits(a, b)


@pytest.mark.parametrize("time_dim", [-1, 0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_numbers_per_sequence_are_those_of_each_alone(device, time_dim, dtype, masked):
    rewards, values, mask, _ = random_rows(device)
    gamma, lam, returns_lam = (torch.tensor(x, device=device).to(dtype) for x in ([1, 0.9, 0, 0.5], [0.9, 1, 1, 0], [1, 0, 0.8, 0.9]))
    numbers = {"gamma": gamma, "lam": lam.repeat_interleave(2)[::2], "returns_lam": returns_lam}
    lay_out = (lambda x: x) if time_dim else (lambda x: x.t().contiguous())
    together = fused_critic.gae(
        lay_out(rewards), lay_out(values), lay_out(mask) if masked else None, time_dim=time_dim, mask_mode="zero", **numbers
    )
    for row in range(len(rewards)):
        own = {name: x[row].item() for name, x in numbers.items()}
        alone = fused_critic.gae(rewards[row], values[row], mask[row] if masked else None, mask_mode="zero", **own)
        assert_like([lay_out(x)[row] if time_dim else x[:, row] for x in together], alone)


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
