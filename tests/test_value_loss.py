"""The value loss against the float64 reference, on every device."""

import itertools
import math

import fused_critic
import pytest
import torch
from fused_critic import reference
from fused_critic.check import cases
from fused_critic.check.value_loss import (
    FACTORS,
    OPTIONS,
    SHAPES,
    compare,
    compare_expanded,
    compare_far,
    compare_options,
    compare_padding,
    compare_problem,
    compare_shape,
    draw_inputs,
    draw_range,
    run,
)
from hypothesis import given
from hypothesis import strategies as st

FLOATING = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
problems = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in FACTORS.items()})


@given(problem=problems)
def test_matches_reference(device, problem):
    compare_problem(problem, device)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("time_dim", [-1, 0])
@pytest.mark.parametrize("clip_range", [0.2, None], ids=["clipped", "plain"])
def test_shapes(device, shape, reduction, time_dim, clip_range):
    compare_shape(shape, reduction, time_dim, clip_range, device)


@pytest.mark.parametrize("shape", [(5, 300), (40, 9)], ids=["long rows", "short rows"])
@pytest.mark.parametrize("time_dim", [-1, 0])
@pytest.mark.parametrize("clip_range", [0.2, None], ids=["clipped", "plain"])
@pytest.mark.parametrize("mask_dtype, reduction", [(torch.bool, "seq-mean-token-mean"), (torch.int32, "none")])
def test_float64(device, shape, time_dim, clip_range, mask_dtype, reduction):
    """Double precision has kernels of its own on CUDA, one for each way through the tokens."""
    generator = torch.Generator().manual_seed(10)
    shape = shape if time_dim == -1 else shape[::-1]
    tensors = draw_inputs(shape, generator, device, [torch.float64] * 3, ["contiguous"] * 3)
    mask = cases.mask(shape, mask_dtype, generator).to(device)
    compare(*tensors, mask, reduction=reduction, time_dim=time_dim, clip_range=clip_range)


RANGES = {
    "number": (0.2, "numbers"),
    "tensor": (0.2, "tensors"),
    "number and tensor": ((-0.1, 0.3), "high tensor"),
    "none": (None, "numbers"),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("clip_range, kind", RANGES.values(), ids=RANGES.keys())
@pytest.mark.parametrize("shape, time_dim, dtype", [((3, 300), -1, torch.float32), ((40, 9), 0, torch.float64)], ids=["rows", "columns"])
def test_options(device, name, clip_range, kind, shape, time_dim, dtype):
    compare_options(OPTIONS[name], clip_range, kind, shape, time_dim, dtype, device)


@pytest.mark.parametrize("clip_range, kind", [(0.2, "tensors"), (None, "numbers")], ids=["tensor", "none"])
@pytest.mark.parametrize("reduction", ["token-mean", "none"])
@pytest.mark.parametrize(
    "shape, time_dim, dtype",
    [((40, 9), -1, torch.float64), ((3, 300), 0, torch.float32), ((1, 5000), -1, torch.float32), ((1500, 3), -1, torch.float32)],
)
def test_options_in_every_kernel(device, clip_range, kind, reduction, shape, time_dim, dtype):
    compare_options(OPTIONS["clamped smooth_l1, clip_only"], clip_range, kind, shape, time_dim, dtype, device, reduction)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("time_dim", [-1, 0])
@pytest.mark.parametrize("clip_range", [(-0.1, 0.3), None])
@pytest.mark.parametrize("mask_dtype", [None, torch.float32])
def test_options_without_effect_leave_the_bits(device, dtype, time_dim, clip_range, mask_dtype):
    """Every token's loss and gradient: mse with options is the same arithmetic in another kernel."""
    generator = torch.Generator().manual_seed(19)
    tensors = draw_inputs((9, 70), generator, device, [dtype] * 3, ["contiguous"] * 3)
    mask = cases.mask((9, 70), mask_dtype, generator)
    mask = mask if mask is None else mask.to(device)
    expected = run(*tensors, mask, clip_range=clip_range, reduction="none", time_dim=time_dim)
    ranges = [clip_range]
    if clip_range is not None:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        ranges.append(tuple(torch.full_like(tensors[0], x, dtype=wide) for x in clip_range))
    for bounds in ranges:
        got = run(*tensors, mask, clip_range=bounds, loss_clamp=math.inf, reduction="none", time_dim=time_dim)
        cases.assert_same_bits(got[0], expected[0], "loss")
        cases.assert_same_bits(got[1], expected[1], "gradient")


TORCH_LOSSES = {
    "mse": lambda v, r: 0.5 * torch.nn.functional.mse_loss(v, r, reduction="none"),
    "huber": lambda v, r: torch.nn.functional.huber_loss(v, r, reduction="none", delta=0.5),
    "smooth_l1": lambda v, r: torch.nn.functional.smooth_l1_loss(v, r, reduction="none", beta=0.5),
    "l1": lambda v, r: torch.nn.functional.l1_loss(v, r, reduction="none"),
}


@pytest.mark.parametrize("criterion", TORCH_LOSSES)
def test_criteria_are_those_of_torch(device, criterion):
    differences = torch.tensor([[0.0, 0.25, 0.5, 0.75, 4.0, -0.25, -0.5, -0.75, -4.0, 1e-20, -1e20]], device=device)
    leaf, returns = differences.clone().requires_grad_(), torch.zeros_like(differences)
    expected = TORCH_LOSSES[criterion](leaf, returns)
    expected.sum().backward()
    loss, grad, _ = run(differences, None, returns, clip_range=None, criterion=criterion, delta=0.5, reduction="none")
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(grad, leaf.grad)


def test_clip_only(device):
    """The clipped value's loss alone; the gradient is that of v inside the range, bounds included, and 0 outside."""
    old = torch.zeros(1, 5, device=device)
    values = torch.tensor([[0.25, 0.125, 0.5, -0.5, -0.25]], device=device)
    returns = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0]], device=device)
    loss, grad, stats = run(values, old, returns, clip_range=0.25, clip_only=True, reduction="none")
    assert loss.tolist() == [[0.28125, 0.3828125, 0.28125, 0.78125, 0.78125]]
    assert grad.tolist() == [[-0.75, -0.875, 0.0, 0.0, -1.25]]
    assert stats.num_tokens.item() == 5 and stats.loss_sum.item() == loss.sum().item()
    assert math.isclose(stats.clip_fraction.item(), 1 / 5) and math.isclose(stats.outside_fraction.item(), 2 / 5)


def test_loss_clamp(device):
    """At the clamp itself the gradient stays; the clipped branch counts as before."""
    values = torch.tensor([[2.0, 2.5, -1.0, 0.5]], device=device)
    zeros = torch.zeros_like(values)
    for clamp in (2.0, torch.tensor(2.0, device=device)):
        loss, grad, stats = run(values, None, zeros, clip_range=None, loss_clamp=clamp, reduction="none")
        assert loss.tolist() == [[2.0, 2.0, 0.5, 0.125]] and grad.tolist() == [[2.0, 0.0, -1.0, 0.5]]
        assert stats.loss_sum.item() == 4.625
    _, grad, stats = run(zeros, values, zeros, clip_range=0.5, loss_clamp=0.25, reduction="none")
    assert grad.tolist() == [[0.0] * 4] and stats.clip_fraction.item() == 0.75


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("position", range(5), ids=["values", "old values", "returns", "low", "high"])
@pytest.mark.parametrize("time_dim", [-1, 0])
def test_nan_with_options(device, name, position, time_dim):
    """At a valid token it shows in the loss and in that token's gradient; at a masked one in nothing."""
    generator = torch.Generator().manual_seed(20)
    shape = (3, 41)
    tensors = draw_inputs(shape, generator, "cpu", [torch.float32] * 3, ["contiguous"] * 3)
    mask = cases.mask(shape, torch.bool, generator)
    mask[1, 3], mask[1, 40], mask[2, 0] = True, True, False
    tensors += [torch.full(shape, -0.2), torch.full(shape, 0.2)]
    expected = torch.zeros(shape, dtype=torch.bool)
    for row, column in ((1, 3), (1, 40), (2, 0)):
        tensors[position][row, column] = math.nan
        expected[row, column] = mask[row, column]
    arranged = [(x if time_dim == -1 else x.t().contiguous()).to(device) for x in (*tensors, mask, expected)]
    *inputs, low, high, valid, expected = arranged
    loss, grad, _ = run(*inputs, valid, clip_range=(low, high), reduction="none", time_dim=time_dim, **OPTIONS[name])
    assert torch.equal(loss.isnan(), expected) and torch.equal(grad.isnan(), expected)
    options = {"time_dim": time_dim, "reduction": "seq-mean-token-mean", **OPTIONS[name]}
    assert fused_critic.value_loss(*inputs, valid, clip_range=(low, high), **options).loss.isnan().item()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_infinite_differences(device, sign):
    """The linear criteria stay what they are."""
    values = torch.tensor([[math.inf, 0.0, 3e38]], device=device) * sign
    zeros = torch.zeros_like(values)
    for criterion, slope in (("mse", math.inf), ("huber", 0.5), ("smooth_l1", 1.0), ("l1", 1.0)):
        options = {"clip_range": None, "criterion": criterion, "delta": 0.5, "reduction": "none"}
        loss, grad, _ = run(values, None, zeros, loss_clamp=math.inf, **options)
        assert loss[0, 0].item() == math.inf and grad[0, 0].item() == sign * slope and loss[0, 1].item() == 0 == grad[0, 1].item()
        assert grad[0, 2].item() == pytest.approx(sign * (3e38 if criterion == "mse" else slope))
        loss, grad, _ = run(values, None, zeros, loss_clamp=7.0, **options)
        assert loss.tolist() == [[7.0, 0.0, 7.0]] and grad.tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("kind", ["tensors", "low tensor", "high tensor"])
def test_ranges_per_token_in_any_memory(device, kind):
    """Strides, alignment and dtypes of their own, stride 0 among them."""
    generator = torch.Generator().manual_seed(21)
    for (shape, stride), dtype in zip(itertools.product([(6, 41), (9, 64)], cases.STRIDES), itertools.cycle(FLOATING)):
        tensors = draw_inputs(shape, generator, device, [torch.float32] * 3, ["contiguous"] * 3)
        mask = cases.mask(shape, torch.bool, generator)
        compare(
            *tensors, mask.to(device), clip_range=draw_range(0.2, kind, mask, shape, generator, device, dtype, stride), reduction="none"
        )
    compare(*tensors, clip_range=torch.rand(9, 1, generator=generator).to(device).expand(9, 64))


def test_ranges_that_are_empty_or_inverted(device):
    """low = high puts vc there; where low > high it is the upper bound."""
    generator = torch.Generator().manual_seed(22)
    tensors = draw_inputs((3, 40), generator, device, [torch.float32] * 3, ["contiguous"] * 3)
    bounds = torch.randn(3, 40, generator=generator).to(device)
    compare(*tensors, clip_range=(bounds, bounds))
    compare(*tensors, clip_range=bounds)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,)])
def test_empty_with_options(device, shape):
    empty = torch.empty(shape, device=device, dtype=torch.float64)
    options = OPTIONS["clamped smooth_l1, clip_only"]
    loss, grad, stats = run(*[empty.float()] * 3, clip_range=empty, **options)
    assert loss.item() == 0 and loss.dtype == torch.float64 and grad.shape == shape
    assert all(value == 0 for value in stats.to_dict().values())


def test_module(device):
    generator = torch.Generator().manual_seed(23)
    values, old, returns = draw_inputs((4, 30), generator, device, [torch.float32] * 3, ["contiguous"] * 3)
    mask = cases.mask((4, 30), torch.bool, generator).to(device)
    options = {
        "clip_range": 0.3,
        "criterion": "huber",
        "delta": 0.4,
        "clip_only": True,
        "loss_clamp": 0.2,
        "reduction": "seq-mean-token-sum-norm",
    }
    options |= {"dp_size": 2, "loss_scale_factor": 5.0, "time_dim": 0}
    module = fused_critic.ClippedValueLoss(**options)
    got = module(values, old, returns, mask, batch_num_tokens=9, global_batch_size=7)
    expected = fused_critic.value_loss(values, old, returns, mask, batch_num_tokens=9, global_batch_size=7, **options)
    cases.assert_same_bits(got.loss, expected.loss)
    cases.assert_same_bits(got.stats.moments, expected.stats.moments)
    cases.assert_same_bits(fused_critic.ClippedValueLoss()(values, old, returns).loss, fused_critic.value_loss(values, old, returns).loss)
    flat, cu_seqlens = values.reshape(-1), torch.tensor([0, 50, 120], device=device)
    packed = fused_critic.ClippedValueLoss(clip_range=None, reduction="seq-mean-token-mean")(flat, None, flat + 1, cu_seqlens=cu_seqlens)
    assert packed.loss.item() == pytest.approx(0.5) and packed.stats.num_sequences.item() == 2
    module.clip_range = 0.1
    narrower = fused_critic.value_loss(values, old, returns, mask, global_batch_size=7, **(options | {"clip_range": 0.1}))
    cases.assert_same_bits(module(values, old, returns, mask, global_batch_size=7).loss, narrower.loss)
    assert list(module.parameters()) == [] and module.state_dict() == {} and "criterion='huber'" in repr(module)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
@pytest.mark.parametrize("time_dim", [-1, 0])
def test_masks_wider_than_the_values(device, dtype, time_dim):
    generator = torch.Generator().manual_seed(11)
    tensors = draw_inputs((24, 128), generator, device, [torch.float32] * 3, ["contiguous"] * 3)
    compare(*tensors, cases.mask((24, 128), dtype, generator).to(device), time_dim=time_dim)


@pytest.mark.parametrize("shape", [(40, 16), (40, 24), (40, 128), (6, 200), (5, 1040)])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int32])
def test_losses_of_single_tokens(device, shape, mask_dtype):
    generator = torch.Generator().manual_seed(12)
    tensors = draw_inputs(shape, generator, device, [torch.float32] * 3, ["contiguous"] * 3)
    compare(*tensors, cases.mask(shape, mask_dtype, generator).to(device), reduction="none")


@pytest.mark.parametrize("reduction", ["token-mean", "none"])
@pytest.mark.parametrize("time_dim", [-1, 0])
@pytest.mark.parametrize("value_dtype", FLOATING)
@pytest.mark.parametrize("other_dtype", FLOATING)
def test_every_mixture_of_dtypes(device, value_dtype, other_dtype, time_dim, reduction):
    generator = torch.Generator().manual_seed(15)
    tensors = draw_inputs((12, 64), generator, device, [value_dtype, other_dtype, other_dtype], ["contiguous"] * 3)
    compare(*tensors, cases.mask((12, 64), torch.bool, generator).to(device), reduction=reduction, time_dim=time_dim)


@pytest.mark.parametrize("mask_dtype", cases.MASKS[1:], ids=str)
@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean-token-mean"])
def test_masks_of_every_width_off_the_alignment(device, mask_dtype, reduction):
    """Rows of odd length: elements are read one by one, whatever their width."""
    generator = torch.Generator().manual_seed(16)
    tensors = draw_inputs((3, 37), generator, device, [torch.float32] * 3, ["misaligned"] * 3)
    compare(*tensors, cases.mask((3, 37), mask_dtype, generator).to(device), reduction=reduction)


@pytest.mark.parametrize("clip_range", [0.2, None], ids=["clipped", "plain"])
@pytest.mark.parametrize("time_dim", [-1, 0])
def test_left_padding(device, time_dim, clip_range):
    """Prompts before responses: wholly masked stretches before wholly valid ones."""
    shape = (5, 1024)
    valid = torch.arange(shape[1]) >= torch.tensor([[0], [384], [640], [1000], [1024]])
    tensors = draw_inputs(shape, torch.Generator().manual_seed(13), device, [torch.float32] * 3, ["contiguous"] * 3)
    arranged = [x.t().contiguous() if time_dim == 0 else x for x in (*tensors, valid.to(device))]
    compare(*arranged, time_dim=time_dim, clip_range=clip_range)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_backward_with_gradients_in_half_precision(device, dtype):
    """The raw operator takes them; autograd gives them in the loss's dtype."""
    shape = (3, 1024)
    values, old, returns = draw_inputs(shape, torch.Generator().manual_seed(14), device, [torch.float32] * 3, ["contiguous"] * 3)
    _, _, residuals = torch.ops.fused_critic.value_loss(values, old, returns, reduction="none")
    gradients = torch.rand(shape, generator=torch.Generator().manual_seed(15)).to(device, dtype)
    options = {"clip": True, "reduction": "none", "time_dim": -1}
    half, whole = (
        torch.ops.fused_critic.value_loss_backward(g, values, old, returns, None, None, residuals, **options)
        for g in (gradients, gradients.float())
    )
    cases.assert_same_bits(half, whole)


@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
@pytest.mark.parametrize("time_dim", [-1, 0])
def test_padding_mask(device, reduction, time_dim):
    compare_padding(reduction, time_dim, device)


@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,), (0, 0)])
def test_empty(device, shape, reduction):
    empty = torch.empty(shape, device=device)
    loss, grad, stats = run(empty, empty, empty, torch.empty(shape, dtype=torch.bool, device=device), reduction=reduction)
    assert loss.shape == (shape if reduction == "none" else ())
    assert bool((loss == 0).all()) and grad.shape == shape
    assert all(value == 0 for value in stats.to_dict().values())


def test_empty_packed(device):
    empty, cu_seqlens = torch.empty(0, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    loss, _, stats = run(empty, empty, empty, cu_seqlens=cu_seqlens, reduction="seq-mean-token-mean")
    assert loss.item() == 0 and stats.num_sequences.item() == 0


@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
def test_all_masked(device, reduction):
    x = torch.full((3, 10), math.nan, device=device)
    loss, grad, stats = run(x, x, x, torch.zeros(3, 10, device=device), reduction=reduction)
    assert bool((loss == 0).all()) and bool((grad == 0).all())
    assert all(value == 0 for value in stats.to_dict().values())


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
def test_masked_contents_have_no_influence(device, reduction, poison):
    generator = torch.Generator().manual_seed(1)
    clean = draw_inputs((5, 37), generator, device, [torch.float32] * 3, ["contiguous"] * 3)
    mask = cases.mask((5, 37), torch.bool, generator).to(device)
    dirty = [torch.where(mask, x, poison) for x in clean]
    for a, b in zip(run(*clean, mask, reduction=reduction), run(*dirty, mask, reduction=reduction)):
        cases.assert_same_bits(*(x.moments if isinstance(x, fused_critic.ValueLossStats) else x for x in (a, b)))


@pytest.mark.parametrize("position", [0, 1, 2])
def test_nan_at_a_valid_token_shows(device, position):
    inputs = [torch.randn(2, 20, device=device) for _ in range(3)]
    inputs[position][1, 3] = math.nan
    loss, grad, _ = run(*inputs)
    assert math.isnan(loss.item()) and math.isnan(grad[1, 3].item())
    assert int(grad.isnan().sum()) == 1


# Where the kernels cut the tokens: groups of 8, blocks of 64 flags, tiles of 1024.
EDGES = [0, 7, 8, 63, 64, 1023, 1024, 2047, 2048, 2050]


def losses_and_slopes(values, old, returns):
    """Of each token, as the formula reads; NaN comes through."""
    clipped_values = torch.minimum(torch.maximum(values, old - 0.2), old + 0.2)
    clipped, unclipped = (clipped_values - returns) ** 2, (values - returns) ** 2
    slopes = torch.where(clipped > unclipped, 0, values - returns)
    return 0.5 * torch.maximum(clipped, unclipped), torch.where(clipped_values.isnan(), math.nan, slopes)


@pytest.mark.parametrize("position", [0, 1, 2], ids=["values", "old values", "returns"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 3e38, -3e38])
@pytest.mark.parametrize("masked", ["nothing", "some", "all but some"])
@pytest.mark.parametrize("time_dim", [-1, 0])
def test_poison_stays_where_it_is(device, position, poison, masked, time_dim):
    """Each edge has a row, or column, of its own, and the first one none."""
    generator = torch.Generator().manual_seed(16)
    tensors = draw_inputs((len(EDGES) + 1, 2051), generator, "cpu", [torch.float32] * 3, ["contiguous"] * 3)
    for row, edge in enumerate(EDGES, 1):
        tensors[position][row, edge] = poison
    mask = torch.rand(tensors[0].shape, generator=generator) < {"nothing": 2.0, "some": 0.6, "all but some": 0.01}[masked]
    for row, edge in enumerate(EDGES[::2]):
        mask[1 + 2 * row, edge] = True
        mask[2 + 2 * row, EDGES[2 * row + 1]] = masked == "nothing"
    losses, slopes = losses_and_slopes(*tensors)
    losses, slopes = (torch.where(mask, x, 0) for x in (losses, slopes))

    def arrange(x):
        return x.to(device) if time_dim == -1 else x.t().contiguous().to(device)

    arguments = [arrange(x) for x in (*tensors, mask)]
    loss, grad, _ = run(*arguments, reduction="none", time_dim=time_dim)
    torch.testing.assert_close(loss, arrange(losses), rtol=1e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(grad, arrange(slopes), rtol=1e-6, atol=1e-6, equal_nan=True)
    total, grad, _ = run(*arguments, reduction="token-sum", time_dim=time_dim)
    torch.testing.assert_close(total.cpu(), losses.double().sum().float(), rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(grad, arrange(slopes), rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("clip_range", [0.2, None], ids=["clipped", "plain"])
def test_masks_cut_anywhere(device, clip_range):
    """Padding on either side and turns that begin or end beside the edges of blocks and tiles."""
    length = 1100
    cuts = torch.tensor([*range(0, 19), *range(50, 80), *range(1010, 1040), *range(length - 18, length + 1)])[:, None]
    t = torch.arange(length)
    mask = torch.cat([t < cuts, t >= cuts, (t >= cuts) & (t < cuts + 65), (t < cuts) | (t >= cuts + 63)])
    generator = torch.Generator().manual_seed(17)
    tensors = draw_inputs(mask.shape, generator, device, [torch.float32] * 3, ["contiguous"] * 3)
    whole, whole_grad, _ = run(*tensors, reduction="none", clip_range=clip_range)
    valid = mask.to(device)
    losses, grads = torch.where(valid, whole, 0), torch.where(valid, whole_grad, 0)
    poisoned = [torch.where(valid, x, math.nan) for x in tensors]
    for kind in (torch.bool, torch.uint8, torch.int64, torch.float32):
        loss, grad, _ = run(*poisoned, valid.to(kind) * 1, reduction="none", clip_range=clip_range)
        cases.assert_same_bits(loss, losses)
        cases.assert_same_bits(grad, grads)
    values, _, returns = (x.double().cpu() for x in tensors)
    for row in range(0, len(mask), 3):
        total, _, stats = run(*(x[row : row + 1] for x in (*poisoned, valid)), reduction="token-sum", clip_range=clip_range)
        v, r = values[row][mask[row]], returns[row][mask[row]]
        assert stats.num_tokens.item() == len(v)
        assert math.isclose(total.item(), losses[row].double().sum().item(), rel_tol=1e-5, abs_tol=1e-6)
        if len(v) == 0:
            continue
        expected = {
            "value_mean": v.mean(),
            "value_min": v.min(),
            "value_max": v.max(),
            "return_mean": r.mean(),
            "error_var": (r - v).var(correction=0),
        }
        for name, value in expected.items():
            assert math.isclose(getattr(stats, name).item(), value.item(), rel_tol=1e-5, abs_tol=1e-5), name


@pytest.mark.parametrize("mask_dtype", cases.MASKS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_converted_exactly(device, mask_dtype, dtype):
    """The same numbers as float32 give the same loss, and the rounded gradient."""
    generator = torch.Generator().manual_seed(18)
    half = draw_inputs((3, 1100), generator, device, [dtype, dtype, torch.float32], ["contiguous"] * 3)
    mask = cases.mask((3, 1100), mask_dtype, generator)
    mask = mask if mask is None else mask.to(device)
    loss, grad, stats = run(*half, mask, reduction="token-sum")
    whole_loss, whole_grad, whole_stats = run(*(x.float() for x in half), mask, reduction="token-sum")
    cases.assert_same_bits(grad, whole_grad.to(dtype))
    cases.assert_close(loss, whole_loss, 1e-6)
    cases.assert_close(stats.moments, whole_stats.moments, 1e-6)


def test_clip_is_exact_inside_the_range(device):
    """old + clamp(v - old) would move v by an ulp and count some of these as clipped."""
    generator = torch.Generator().manual_seed(2)
    old = torch.randn(1, 5000, generator=generator).to(device)
    values = old + 0.19 * (2 * torch.rand(1, 5000, generator=generator).to(device) - 1)
    returns = torch.randn(1, 5000, generator=generator).to(device)
    _, grad, stats = run(values, old, returns, reduction="token-sum")
    assert stats.clip_fraction.item() == 0 and stats.outside_fraction.item() == 0
    cases.assert_same_bits(grad, values - returns)


def test_bfloat16_range_does_not_collapse(device):
    """In bfloat16 old +- 0.2 is old itself for |old| >= 64; the bounds are float32 here."""
    old = torch.full((1, 8), 64.0, dtype=torch.bfloat16, device=device)
    values = torch.full((1, 8), 64.125, device=device)
    _, _, stats = run(values, old, torch.zeros(1, 8, device=device))
    assert stats.outside_fraction.item() == 0


def test_gradient_at_ties(device):
    """At the bounds the whole v - R; at equal branches outside (R midway between v and the clipped v) too; never a half."""
    old = torch.zeros(1, 4, dtype=torch.float64, device=device)
    values = torch.tensor([[0.25, -0.25, 0.75, 0.0]], dtype=torch.float64, device=device)
    returns = torch.tensor([[1.0, -1.0, 0.5, 0.0]], dtype=torch.float64, device=device)
    _, grad, stats = run(values, old, returns, clip_range=0.25, reduction="token-sum")
    assert grad.tolist() == [[-0.75, 0.75, 0.25, 0.0]]
    assert stats.clip_fraction.item() == 0


@pytest.mark.parametrize("valid", ["random", "padding", "all"])
def test_statistics_far_from_zero(device, valid):
    """Mean 1e4 and standard deviation 1: float32 sums of squares would leave nothing of the variance."""
    generator = torch.Generator().manual_seed(3)
    returns = 1e4 + torch.randn(16, 1000, generator=generator, dtype=torch.float64)
    values = (returns + 0.5 * torch.randn(16, 1000, generator=generator, dtype=torch.float64)).float()
    returns = returns.float()
    mask = {
        "random": cases.mask((16, 1000), torch.bool, generator),
        "padding": torch.arange(1000) < torch.linspace(1, 1000, 16)[:, None],
        "all": torch.ones(16, 1000, dtype=torch.bool),
    }[valid]
    stats = fused_critic.value_loss(values.to(device), values.to(device), returns.to(device), mask.to(device)).stats
    v, r = values.double()[mask], returns.double()[mask]
    expected = {"value_var": v.var(correction=0), "return_var": r.var(correction=0), "error_var": (r - v).var(correction=0)}
    for name, value in expected.items():
        assert math.isclose(getattr(stats, name).item(), value.item(), rel_tol=1e-5), name
    assert math.isclose(stats.explained_variance.item(), 1 - (r - v).var().item() / r.var().item(), rel_tol=1e-5)


def test_statistics_merge(device):
    generator = torch.Generator().manual_seed(4)
    tensors = draw_inputs((6, 50), generator, device, [torch.float32] * 3, ["contiguous"] * 3)
    mask = cases.mask((6, 50), torch.bool, generator).to(device)
    whole = fused_critic.value_loss(*tensors, mask).stats.to_dict()
    parts = [fused_critic.value_loss(*(x[i : i + 2] for x in tensors), mask[i : i + 2]).stats for i in (0, 2, 4)]
    empty = fused_critic.value_loss(*(x[:0] for x in tensors)).stats
    for merged in (parts[0] + parts[1] + parts[2] + empty, sum(parts), fused_critic.ValueLossStats.merge(parts)):
        for name, value in merged.to_dict().items():
            assert math.isclose(value, whole[name], rel_tol=1e-6, abs_tol=1e-7), name


@pytest.mark.parametrize("shape, time_dim", [((4, 1_000_000), -1), ((40_000, 128), 0)], ids=["long rows", "long columns"])
def test_large_sums_stay_accurate(device, shape, time_dim):
    values = torch.rand(shape, generator=torch.Generator().manual_seed(5)).to(device)
    loss, _, _ = run(values, values, torch.zeros_like(values), time_dim=time_dim)
    assert math.isclose(loss.item(), (0.5 * values.double() ** 2).mean().item(), rel_tol=1e-6)


@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean-token-mean", "none"])
@pytest.mark.parametrize("options", [{}, {"criterion": "huber", "loss_clamp": 0.1}], ids=["default", "options"])
def test_same_bits_on_every_run(device, reduction, options):
    generator = torch.Generator().manual_seed(6)
    tensors = draw_inputs((7, 3000), generator, device, [torch.bfloat16, torch.float32, torch.float32], ["contiguous"] * 3)
    mask = cases.mask((7, 3000), torch.bool, generator).to(device)
    first = run(*tensors, mask, reduction=reduction, **options)
    second = run(*tensors, mask, reduction=reduction, **options)
    for a, b in zip(first, second):
        cases.assert_same_bits(*(x.moments if isinstance(x, fused_critic.ValueLossStats) else x for x in (a, b)))


@pytest.mark.parametrize("time_dim", [-1, 0])
@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("options", [{}, {"criterion": "huber", "loss_clamp": 0.1}], ids=["default", "options"])
def test_same_bits_for_every_number_of_threads(threads, time_dim, reduction, options):
    generator = torch.Generator().manual_seed(7)
    tensors = draw_inputs((37, 3001), generator, "cpu", [torch.float32] * 3, ["contiguous"] * 3)
    mask = cases.mask((37, 3001), torch.bool, generator)
    results = []
    for n in (1, 2, 3, 7):
        threads(n)
        results.append(run(*tensors, mask, reduction=reduction, time_dim=time_dim, **options))
    for loss, grad, stats in results[1:]:
        cases.assert_same_bits(loss, results[0][0], "loss")
        cases.assert_same_bits(grad, results[0][1], "grad")
        cases.assert_same_bits(stats.moments, results[0][2].moments, "stats")


def test_expanded_inputs_and_gradient(device):
    """Stride 0 in an input, and the expanded gradient that .sum().backward() makes."""
    compare_expanded(device)
    values, old, returns = (torch.randn(4, 9, device=device) for _ in range(3))
    mask = torch.tensor([[True]], device=device).expand(4, 9)
    leaf = values.clone().requires_grad_()
    fused_critic.value_loss(leaf, old, returns, mask, reduction="none").loss.sum().backward()
    cases.assert_close(leaf.grad, reference.value_loss(values, old, returns, mask, reduction="none").grad, 1e-6)


def test_offsets_beyond_31_bits(device):
    if device == "cuda" and torch.cuda.get_device_properties(0).total_memory < 12 * 2**30:
        pytest.skip("needs a GPU with 12 GiB of memory")
    compare_far(device)


def test_inputs_are_not_changed(device):
    inputs = [torch.randn(3, 20, device=device) for _ in range(3)] + [torch.ones(3, 20, dtype=torch.bool, device=device)]
    before = [x.clone() for x in inputs]
    run(*inputs)
    for a, b in zip(inputs, before):
        assert torch.equal(a, b)
