"""Checks of what torch does around the operators: torch.compile, CUDA graphs, streams, devices."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import torch

import fused_critic

from . import cases
from .runner import TORCH_FEATURES, Context, NotApplicable, check

STEPS = [(0.2, 10, 0.99, 0.95), (0.3, 11, 0.98, 0.9), (0.25, 17, 0.97, 0.8), (0.1, 27, 0.9, 0.7)]  # clip range, count, gamma, lam
PAUSE_CYCLES = 20_000_000  # of the GPU: about 10 ms, long beside the kernels


def inputs(device, shape=(4, 9), dtype=torch.float32, seed=0):
    """values, old values, rewards (or returns), mask."""
    generator = torch.Generator().manual_seed(seed)
    values, old_values, returns = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    return values, old_values, returns, cases.mask(shape, torch.bool, generator).to(device)


def critic_step(values, old_values, rewards, mask, clip_range, count, gamma, lam):
    advantages, returns = fused_critic.gae(rewards, values.detach(), mask, gamma=gamma, lam=lam)
    loss, stats = fused_critic.value_loss(values, old_values, returns, mask, clip_range=clip_range, batch_num_tokens=count)
    return advantages, loss, stats


def run_step(function, tensors, numbers):
    values, *others = tensors
    leaf = values.detach().requires_grad_()
    advantages, loss, stats = function(leaf, *others, *numbers)
    (grad,) = torch.autograd.grad(loss, leaf)
    return {"advantages": advantages, "loss": loss.detach(), "gradient": grad, "statistics": stats.moments}


def compare_results(got, expected, tolerance=cases.FLOAT32_TOLERANCE):
    return max(cases.assert_close(got[name], expected[name], tolerance, name) for name in expected)


def compiler_obstacle(device: torch.device, backend: str = "inductor") -> str | None:
    """Why torch.compile cannot compile even a trivial function here (no compiler, no Triton, a new Python, ...); None where it can."""
    salt = random.randrange(2**20)  # code that is in no cache yet

    try:
        torch.compile(lambda x: 2 * x + salt, backend=backend, fullgraph=True)(torch.ones(8, device=device))
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[0] if lines else ''}"
    return None


def compare_compiled(backend: str, context: Context):
    if backend == "inductor":
        context.needs_real_device()
    obstacle = compiler_obstacle(context.device, backend)
    if obstacle:
        raise NotApplicable(f"torch.compile does not work here: {obstacle}")
    torch._dynamo.reset()
    compiled = torch.compile(critic_step, backend=backend, fullgraph=True, dynamic=True)
    used = 0.0
    for numbers, shape in zip(STEPS, [(4, 9), (4, 9), (5, 12), (6, 13)]):
        tensors = inputs(context.device, shape)
        used = max(used, compare_results(run_step(compiled, tensors, numbers), run_step(critic_step, tensors, numbers)))
    return used


@check(TORCH_FEATURES, "compile", "a critic step under torch.compile(fullgraph=True, dynamic=True)")
def _(context: Context):
    yield "traced, without code generation", partial(compare_compiled, "aot_eager", context)
    yield "with code generation", partial(compare_compiled, "inductor", context)


def arranged_step(tensors, arrange, **layout):
    """A critic step on packed tokens that `arrange` lays out."""
    values, old_values, rewards, mask = tensors
    leaf = values.detach().requires_grad_()
    old, reward, valid = (arrange(x) for x in (old_values, rewards, mask))
    advantages, returns = fused_critic.gae(reward, arrange(values), valid, gamma=0.9, lam=0.8, **layout)
    loss, stats = fused_critic.value_loss(arrange(leaf), old, returns, valid, **layout)
    (grad,) = torch.autograd.grad(loss, leaf)
    return {"advantages": advantages, "loss": loss.detach(), "gradient": grad, "statistics": stats.moments}


def compare_jagged(context: Context):
    """The packed results, bit for bit, and on a GPU without a synchronisation."""
    tensors = [x.flatten() for x in inputs(context.device)]
    offsets = torch.tensor([0, 5, 5, 20, 36], device=context.device)
    expected = arranged_step(tensors, lambda x: x, cu_seqlens=offsets)
    watched = context.device.type == "cuda"
    if watched:
        torch.cuda.set_sync_debug_mode("error")
    try:
        got = arranged_step(tensors, lambda x: torch.nested.nested_tensor_from_jagged(x, offsets))
    finally:
        if watched:
            torch.cuda.set_sync_debug_mode("default")
    assert got["advantages"].is_nested and got["advantages"].offsets() is offsets
    got["advantages"] = got["advantages"].values()
    for name, tensor in expected.items():
        cases.assert_same_bits(got[name], tensor, name)


@check(TORCH_FEATURES, "jagged", "nested tensors of layout torch.jagged, against the same tokens packed")
def _(context: Context):
    yield "a critic step", partial(compare_jagged, context)


def replay_graph(shape, tensor_numbers: bool, context: Context):
    context.needs_cuda()
    context.needs_real_device()
    device = context.device
    with torch.cuda.device(device):
        tensors = inputs(device, shape)
        numbers: Any = STEPS[0]
        if tensor_numbers:
            numbers = [torch.tensor(x, dtype=torch.float64, device=device) for x in numbers]
        warm_up = torch.cuda.Stream()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):
            for _ in range(3):
                run_step(critic_step, tensors, numbers)
        torch.cuda.current_stream().wait_stream(warm_up)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run_step(critic_step, tensors, numbers)
        for seed, new_numbers in enumerate(STEPS, start=1):
            new_numbers = new_numbers if tensor_numbers else numbers
            new_tensors = inputs(device, shape, seed=seed)
            expected = run_step(critic_step, new_tensors, new_numbers)
            for static, new in zip(tensors, new_tensors):
                static.copy_(new)
            if tensor_numbers:
                for static, new in zip(numbers, new_numbers):
                    static.fill_(new)
            graph.replay()
            torch.cuda.synchronize()
            for name, got in outputs.items():
                cases.assert_same_bits(got, expected[name], f"{name}, replay {seed}")


@check(TORCH_FEATURES, "cuda-graph", "loss, backward and GAE captured; inputs refilled between replays")
def _(context: Context):
    for shape in ((4, 9), (64, 1000), (1, 30_000)):
        yield f"{shape}, numbers", partial(replay_graph, shape, False, context)
        yield f"{shape}, 0-d tensors", partial(replay_graph, shape, True, context)


def run_on_side_stream(shape, context: Context):
    context.needs_cuda()
    with torch.cuda.device(context.device):
        tensors = inputs(context.device, shape)
        expected = run_step(critic_step, tensors, STEPS[0])
        late = [torch.zeros_like(x) for x in tensors]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            if not context.simulated:
                torch.cuda._sleep(PAUSE_CYCLES)  # a kernel on any other stream would find the zeros
            for x, y in zip(late, tensors):
                x.copy_(y)
            got = run_step(critic_step, late, STEPS[0])
        stream.synchronize()
        for name, tensor in expected.items():
            cases.assert_same_bits(got[name], tensor, name)


@check(TORCH_FEATURES, "side-stream", "on a stream that is behind the others")
def _(context: Context):
    for shape in ((4, 9), (64, 500), (1, 30_000)):
        yield str(shape), partial(run_on_side_stream, shape, context)


def run_on_second_device(context: Context):
    context.needs_cuda()
    if torch.cuda.device_count() < 2:
        raise NotApplicable("one CUDA device here")
    current = torch.cuda.current_device()
    other = torch.device("cuda", next(i for i in range(torch.cuda.device_count()) if i != current))
    got = run_step(critic_step, inputs(other, (5, 400)), STEPS[0])
    expected = run_step(critic_step, inputs("cpu", (5, 400)), STEPS[0])
    assert torch.cuda.current_device() == current, "the current device was changed"
    for name, tensor in got.items():
        assert tensor.device == other, f"{name} is on {tensor.device}, not {other}"
    return compare_results(got, expected)


@check(TORCH_FEATURES, "second-device", "results on a device that is not the current one, which stays current")
def _(context: Context):
    yield "a critic step, against the CPU", partial(run_on_second_device, context)
