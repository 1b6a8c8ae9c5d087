"""Checks of the operators themselves: right to the tolerance, and the same bits every time."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import torch

import fused_critic

from . import cases, gae, recurrence, value_loss
from .runner import CORRECTNESS, DETERMINISM, Context, NotApplicable, check

EMPTY_SHAPES = [(0, 5), (5, 0), (0,), (0, 0)]
TIME_DIMS = {"[B, T]": -1, "[T, B]": 0}
RANGES = [(0.2, "numbers"), (0.2, "tensors"), ((-0.1, 0.3), "high tensor"), (None, "numbers")]
REPEATS = 5
# On the CPU. Another order of the dimensions in memory is another kernel's work, which adds in another order; on CUDA, where alignment
# decides which lane reads what, so is every view.
SAME_BITS_STRIDES = ("row-strided", "misaligned")
GRADIENT_SHAPE_TOKENS = 5000  # shapes of more are checked masked only: the reference's gradient is slow


def describe(problem: dict[str, Any]) -> str:
    def words(value):
        if isinstance(value, torch.dtype):
            return str(value).removeprefix("torch.")
        return "x".join(map(str, value)) if isinstance(value, tuple) and isinstance(value[0], int) else str(value)

    told = []
    for name, value in problem.items():
        if name in ("dtypes", "strides"):
            value = value[:1] if len(set(value)) == 1 else value
            told.append(f"{name} " + "/".join(map(words, value)))
        elif name in ("kind", "size", "reduction", "options"):
            told.append(words(value))
        elif name != "seed":
            told.append(f"{name} {words(value)}")
    return ", ".join(told)


# Of the value loss, GAE and whitened GAE where bits are compared: enough to be dealt to all threads, or to all of a GPU.
REPEATED_SHAPES = {
    "cpu": ((37, 3000), [(7, 9000), (1, 50_000), (1000, 70)], (40, 300)),
    "cuda": ((67, 5000), [(37, 9000), (1, 1_000_000), (20_000, 70)], (400, 300)),
    "simulated": ((5, 1300), [(2, 2500), (1, 9000), (70, 70)], (40, 30)),
}


@check(CORRECTNESS, "value-loss", "loss, gradient, statistics: layouts, reductions, clip ranges, dtypes, strides, masks", sampled=True)
def _(context: Context):
    for problem in value_loss.problems():
        yield describe(problem), partial(value_loss.compare_problem, problem, context.device)


@check(CORRECTNESS, "value-loss-shapes", "one token, odd T, around the tile sizes, one long row, many short rows", sampled=True)
def _(context: Context):
    reductions, clips = ("token-mean", "seq-mean-token-mean"), (0.2, None)
    for (name, shape), reduction, layout, clip in itertools.product(value_loss.SHAPES.items(), reductions, TIME_DIMS, clips):
        title = f"{name} {shape}, {layout}, {reduction}, clip {clip}"
        yield title, partial(value_loss.compare_shape, shape, reduction, TIME_DIMS[layout], clip, context.device)


@check(CORRECTNESS, "value-loss-options", "criteria, clip_only, loss_clamp, a clip range per token", sampled=True)
def _(context: Context):
    factors = (value_loss.OPTIONS.items(), RANGES, (torch.float32, torch.float64), TIME_DIMS.items())
    for (name, options), (clip, kind), dtype, (layout, time_dim) in itertools.product(*factors):
        for shape in ((3, 300), (40, 9)):
            title = f"{name}, clip {clip} as {kind}, {dtype}, {layout}, {shape}"
            yield title, partial(value_loss.compare_options, options, clip, kind, shape, time_dim, dtype, context.device)


@check(CORRECTNESS, "value-loss-edges", "NaN in padding, everything masked, nothing at all, stride 0", sampled=True)
def _(context: Context):
    for reduction, (layout, time_dim) in itertools.product(cases.REDUCTIONS, TIME_DIMS.items()):
        yield f"NaN in padding, {layout}, {reduction}", partial(value_loss.compare_padding, reduction, time_dim, context.device)
    for reduction in cases.REDUCTIONS:
        yield f"all masked, {reduction}", partial(value_loss.compare_all_masked, reduction, context.device)
    for reduction, shape in itertools.product(cases.REDUCTIONS, EMPTY_SHAPES):
        yield f"empty {shape}, {reduction}", partial(value_loss.compare_empty, shape, reduction, context.device)
    yield "stride 0", partial(value_loss.compare_expanded, context.device)


@check(
    CORRECTNESS,
    "gae",
    "advantages and returns: layouts, flags, next and bootstrap values, dtypes, strides, masks and their modes, a lambda for the returns, "
    "numbers per sequence",
    sampled=True,
)
def _(context: Context):
    for problem in gae.problems():
        yield describe(problem), partial(gae.compare_problem, problem, context.device)


@check(CORRECTNESS, "gae-gradient", "the adjoint, for the same problems", sampled=True)
def _(context: Context):
    for problem in gae.problems():
        yield describe(problem), partial(gae.compare_problem, problem, context.device, gae.compare_gradients)


def _gae_shapes(context: Context, function, most_plain_tokens: float):
    for (name, shape), masked, layout in itertools.product(gae.SHAPES.items(), (False, True), TIME_DIMS):
        if masked or shape[0] * shape[1] <= most_plain_tokens:
            title = f"{name} {shape}, {layout}, {'masked' if masked else 'plain'}"
            yield title, partial(gae.compare_shape, shape, masked, TIME_DIMS[layout], context.device, function)


@check(CORRECTNESS, "gae-shapes", "one token, odd T, around the tile sizes, one long row, many short rows", sampled=True)
def _(context: Context):
    yield from _gae_shapes(context, gae.compare, most_plain_tokens=math.inf)


@check(CORRECTNESS, "gae-gradient-shapes", "the adjoint at the same shapes", sampled=True)
def _(context: Context):
    yield from _gae_shapes(context, gae.compare_gradients, GRADIENT_SHAPE_TOKENS)


@check(CORRECTNESS, "gae-edges", "NaN in padding, everything masked, nothing at all, one long segment among short ones")
def _(context: Context):
    for what, function in {"": gae.compare, ", gradient": gae.compare_gradients}.items():
        for layout, time_dim in TIME_DIMS.items():
            yield f"NaN in padding, {layout}{what}", partial(gae.compare_padding, time_dim, context.device, function)
            for mode in ("zero", "reset"):
                options = {"mask_mode": mode, "returns_lam": 0.9}
                yield f"NaN in padding, {mode}, {layout}{what}", partial(gae.compare_padding, time_dim, context.device, function, **options)
        yield f"all masked{what}", partial(gae.compare_all_masked, context.device, function)
        yield f"packed, one long segment{what}", partial(gae.compare_one_long_segment, context.device, function)
    for shape in EMPTY_SHAPES:
        yield f"empty {shape}", partial(gae.compare_empty, shape, context.device)


@check(CORRECTNESS, "reverse-scan", "the recurrence: layouts, forms of decay, initial values, dtypes, strides", sampled=True)
def _(context: Context):
    for problem in recurrence.scan_problems():
        yield describe(problem), partial(recurrence.compare_scan_problem, problem, context.device)


@check(CORRECTNESS, "reverse-scan-gradient", "its adjoint, and the gradient of the decay, for the same problems", sampled=True)
def _(context: Context):
    for problem in recurrence.scan_problems():
        yield describe(problem), partial(recurrence.compare_scan_problem, problem, context.device, recurrence.compare_scan_gradients)


@check(CORRECTNESS, "reverse-scan-shapes", "the recurrence around the tile sizes", sampled=True)
def _(context: Context):
    shapes = itertools.product(recurrence.SHAPES, recurrence.SHAPE_DTYPES, (False, True), TIME_DIMS.items())
    for shape, dtype, per_position, (layout, time_dim) in shapes:
        title = f"{shape}, {layout}, {dtype}, decay {'per position' if per_position else 'number'}"
        yield title, partial(recurrence.compare_scan_shape, shape, dtype, per_position, time_dim, context.device)


@check(CORRECTNESS, "vtrace", "targets and both advantages: layouts, flags, clips, next and bootstrap values, dtypes, masks", sampled=True)
def _(context: Context):
    for problem in recurrence.vtrace_problems():
        yield describe(problem), partial(recurrence.compare_vtrace_problem, problem, context.device)


@check(CORRECTNESS, "vtrace-shapes", "V-trace around the tile sizes", sampled=True)
def _(context: Context):
    shapes = itertools.product(recurrence.SHAPES, recurrence.SHAPE_DTYPES, (False, True), TIME_DIMS.items())
    for shape, dtype, masked, (layout, time_dim) in shapes:
        title = f"{shape}, {layout}, {dtype}, {'masked' if masked else 'plain'}"
        yield title, partial(recurrence.compare_vtrace_shape, shape, dtype, masked, time_dim, context.device)


@check(CORRECTNESS, "far", "offsets and strides beyond 2^31 elements (4 GiB on a GPU)")
def _(context: Context):
    def if_there_is_memory(compare):
        if context.simulated:
            raise NotApplicable("simulated device: minutes over 4 GiB")
        try:
            return compare(context.device)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise NotApplicable("not enough memory") from error
        except RuntimeError as error:
            if "can't allocate memory" in str(error):  # the CPU allocator's way to say so
                raise NotApplicable("not enough memory") from error
            raise

    yield "value loss", partial(if_there_is_memory, value_loss.compare_far)
    yield "GAE", partial(if_there_is_memory, gae.compare_far)
    yield "reverse scan", partial(if_there_is_memory, recurrence.compare_scan_far)
    yield "V-trace", partial(if_there_is_memory, recurrence.compare_vtrace_far)


@check(CORRECTNESS, "whiten", "masked_whiten with its gradient, and gae(whiten=True)", sampled=True)
def _(context: Context):
    for dtype, mask in itertools.product(cases.DTYPES, cases.MASKS):
        for options in gae.WHITEN_OPTIONS:
            yield f"{dtype}, mask {mask}, {options or 'defaults'}", partial(gae.compare_whiten, dtype, mask, options, context.device)
    for dtype, masked in itertools.product(cases.DTYPES, (False, True)):
        title = f"gradient, {dtype}, {'masked' if masked else 'plain'}"
        yield title, partial(gae.compare_whiten_gradient, dtype, masked, context.device)
    for kind, mask in itertools.product(cases.LAYOUTS, (None, torch.bool, torch.float32)):
        yield f"gae(whiten=True), {kind}, mask {mask}", partial(gae.compare_whitened, kind, mask, context.device)
    yield "far from zero", partial(gae.compare_whiten_far_from_zero, context.device)
    for valid, shift_mean in itertools.product((0, 1), (True, False)):
        yield f"{valid} valid, shift_mean={shift_mean}", partial(gae.compare_whiten_few, valid, shift_mean, context.device)


# What is repeated below: all results of an operator, as tensors, for inputs that are the same in every call.
def _loss_results(shape, reduction, time_dim, stride, device):
    generator = torch.Generator().manual_seed(6)
    shape = shape if time_dim == -1 else shape[::-1]
    dtypes = [torch.bfloat16, torch.float32, torch.float32]
    tensors = value_loss.draw_inputs(shape, generator, device, dtypes, [stride] * 3)
    mask = cases.restride(cases.mask(shape, torch.bool, generator).to(device), stride)
    loss, grad, stats = value_loss.run(*tensors, mask, reduction=reduction, time_dim=time_dim)
    return {"loss": loss, "gradient": grad, "statistics": stats.moments}


def _gae_results(shape, time_dim, stride, device, **options):
    generator = torch.Generator().manual_seed(3)
    shape = shape if time_dim == -1 else shape[::-1]
    rewards, values, *weights = (torch.randn(shape, generator=generator).to(device) for _ in range(4))
    mask = cases.restride(cases.mask(shape, torch.bool, generator).to(device), stride)
    rewards, values = (cases.restride(x, stride).requires_grad_() for x in (rewards, values))
    out = fused_critic.gae(rewards, values, mask, gamma=0.99, lam=0.95, time_dim=time_dim, **options)
    grads = torch.autograd.grad(tuple(out), (rewards, values), weights)
    names = ("advantages", "returns", "gradient of rewards", "gradient of values")
    return dict(zip(names, (*(x.detach() for x in out), *grads)))


def _calls(context: Context):
    loss_shape, gae_shapes, whitened = REPEATED_SHAPES["simulated" if context.simulated else context.device.type]
    device = context.device
    for reduction, (layout, time_dim) in itertools.product(cases.REDUCTIONS, TIME_DIMS.items()):
        yield f"value loss, {reduction}, {layout}", partial(_loss_results, loss_shape, reduction, time_dim, device=device)
    for shape, (layout, time_dim) in itertools.product(gae_shapes, TIME_DIMS.items()):
        yield f"GAE of {shape}, {layout}", partial(_gae_results, shape, time_dim, device=device)
    yield "GAE, whitened", partial(_gae_results, whitened, -1, device=device, whiten=True)
    for mode, (layout, time_dim) in itertools.product(("zero", "reset"), TIME_DIMS.items()):
        options = {"mask_mode": mode, "returns_lam": 0.9}
        yield (
            f"GAE of {gae_shapes[-1]}, {mode}, returns_lam, {layout}",
            partial(_gae_results, gae_shapes[-1], time_dim, device=device, **options),
        )


def _same(results, others, what):
    for name, tensor in results.items():
        cases.assert_same_bits(others[name], tensor, f"{name}, {what}")


@check(DETERMINISM, "repeat", f"{REPEATS} runs, forward and backward", sampled=True)
def _(context: Context):
    def repeat(call):
        first = call(stride="contiguous")
        for number in range(1, REPEATS):
            _same(first, call(stride="contiguous"), f"run {number}")

    for title, call in _calls(context):
        yield title, partial(repeat, call)


@check(
    DETERMINISM,
    "views",
    "the same data in strided and misaligned views: the same bits where one kernel takes both, else to the tolerance",
    sampled=True,
)
def _(context: Context):
    def compare_with(call, stride):
        contiguous, strided = call(stride="contiguous"), call(stride=stride)
        if stride in SAME_BITS_STRIDES and context.device.type == "cpu":
            return _same(contiguous, strided, stride)
        tolerances = {name: cases.stored(cases.FLOAT32_TOLERANCE, x.dtype) for name, x in contiguous.items()}
        return max(cases.assert_close(strided[name], x, tolerances[name], f"{name}, {stride}") for name, x in contiguous.items())

    for (title, call), stride in itertools.product(_calls(context), cases.STRIDES[1:]):
        yield f"{title}, {stride}", partial(compare_with, call, stride)


@check(DETERMINISM, "threads", "every number of CPU threads", sampled=True)
def _(context: Context):
    def compare_threads(call):
        if context.device.type != "cpu":
            raise NotApplicable("for the CPU kernels")
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            first = call(stride="contiguous")
            for threads in {2, 3, 7, before} - {1}:
                torch.set_num_threads(threads)
                _same(first, call(stride="contiguous"), f"{threads} threads")
        finally:
            torch.set_num_threads(before)

    for title, call in _calls(context):
        if title != "GAE, whitened":  # masked_whiten's sums are torch's own
            yield title, partial(compare_threads, call)
