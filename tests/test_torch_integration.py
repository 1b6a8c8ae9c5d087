"""How the operators behave inside of torch: opcheck, gradcheck, compile, export, torch.func, repeated backward, autocast."""

import math
import time
import warnings

import fused_critic
import pytest
import torch
from fused_critic.check import cases
from fused_critic.check.torch_features import STEPS, compare_results, critic_step, inputs, run_step
from fused_critic.check.value_loss import OPTIONS, draw_range
from torch._dynamo.testing import CompileCounterWithBackend

ops = torch.ops.fused_critic
SMALL = (2, 4)  # gradcheck calls an operator several times per element


def number(x, device):
    return torch.tensor(x, dtype=torch.float64, device=device)


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_value_loss(device, grad, dtype):
    values, old, returns, mask = inputs(device)
    values = values.to(dtype).requires_grad_(grad)
    for reduction in cases.REDUCTIONS:
        torch.library.opcheck(ops.value_loss.default, (values, old, returns, mask), {"reduction": reduction})
    torch.library.opcheck(ops.value_loss.default, (values, None, returns), {"clip": False})
    torch.library.opcheck(ops.value_loss.default, (values, old, returns, mask), {"time_dim": 0, "reduction": "seq-mean-token-mean"})
    torch.library.opcheck(
        ops.value_loss.tensor, (values, old, returns, mask, None, number(-0.2, device), number(0.2, device), number(7, device)), {}
    )
    options = {"criterion": "huber", "delta": 0.5, "clip_only": True, "reduction": "none"}
    torch.library.opcheck(ops.value_loss.default, (values, old, returns, mask), {**options, "loss_clamp": 0.3})
    high = returns.detach().abs()
    torch.library.opcheck(
        ops.value_loss.tensor, (values, old, returns, mask, None, -high, high, None, None, number(0.3, device)), {"criterion": "l1"}
    )
    torch.library.opcheck(ops.value_loss.tensor, (values, old, returns, mask, None, number(-0.2, device), high), {})
    flat = [x.detach().reshape(-1) for x in (values, old, returns, mask)]
    cu_seqlens = torch.tensor([0, 9, 9, 36], device=device)
    torch.library.opcheck(
        ops.value_loss.default, (flat[0].requires_grad_(grad), *flat[1:], cu_seqlens), {"reduction": "seq-mean-token-mean"}
    )


def test_opcheck_value_loss_backward(device):
    values, old, returns, mask = inputs(device)
    for reduction in ("token-mean", "seq-mean-token-mean", "none"):
        loss, _, residuals = ops.value_loss(values, old, returns, mask, reduction=reduction)
        options = {"clip": True, "reduction": reduction, "time_dim": -1}
        torch.library.opcheck(
            ops.value_loss_backward.default, (torch.ones_like(loss), values, old, returns, mask, None, residuals), options
        )
        high = returns.abs()
        _, _, residuals = ops.value_loss(values, old, returns, mask, reduction=reduction, loss_clamp=0.3)
        options |= {"criterion": "smooth_l1", "delta": 0.5, "clamp": True}
        torch.library.opcheck(
            ops.value_loss_backward.default, (torch.ones_like(loss), values, old, returns, mask, None, residuals, -high, high), options
        )


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_opcheck_gae(device, grad):
    values, next_values, rewards, mask = inputs(device)
    rewards, values = rewards.requires_grad_(grad), values.requires_grad_(grad)
    done = mask.roll(1, 0)
    numbers = {"gamma": 0.9, "lam": 0.8}
    torch.library.opcheck(ops.gae.default, (rewards, values, mask), numbers)
    torch.library.opcheck(ops.gae.default, (rewards, values, mask, done, done.roll(1, 1), next_values.requires_grad_(grad)), numbers)
    torch.library.opcheck(
        ops.gae.default, (rewards, values, None, None, None, None, values.detach()[0].requires_grad_(grad)), {**numbers, "time_dim": 0}
    )
    torch.library.opcheck(ops.gae.tensor, (rewards, values, number(0.9, device), number(0.8, device), mask), {})
    wanted = {"has_next_values": False, "wanted": [True, True, False, True], "mask_mode": "skip", "time_dim": -1}
    arguments = (rewards.detach(), None, mask, done, None, None, number(0.9, device), number(0.8, device))
    torch.library.opcheck(ops.gae_backward.default, arguments, wanted)
    torch.library.opcheck(ops.gae_backward.default, (*arguments, number(0.7, device)), {**wanted, "mask_mode": "reset"})


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("mask_mode", ["zero", "reset", "ignore"])
def test_opcheck_gae_options(device, grad, mask_mode):
    values, _, rewards, mask = inputs(device)
    rewards, values = rewards.requires_grad_(grad), values.requires_grad_(grad)
    torch.library.opcheck(ops.gae.default, (rewards, values, mask), {"gamma": 0.9, "lam": 0.8, "mask_mode": mask_mode, "returns_lam": 0.7})
    lam = torch.linspace(0.5, 1, len(values), device=device)
    arguments = (rewards, values, number(0.9, device), lam, mask, None, None, None, None, None, lam.flip(0))
    torch.library.opcheck(ops.gae.tensor, arguments, {"mask_mode": mask_mode})


@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
@pytest.mark.parametrize("clip_range", [0.2, (-0.1, 0.4), None])
def test_gradcheck_value_loss(device, reduction, clip_range):
    values, old, returns, mask = inputs(device, SMALL, dtype=torch.float64)
    function = lambda v: fused_critic.value_loss(v, old, returns, mask, clip_range=clip_range, reduction=reduction).loss  # noqa: E731
    assert torch.autograd.gradcheck(function, values.requires_grad_())


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", ["numbers", "tensors"])
def test_gradcheck_value_loss_with_options(device, name, kind):
    values, old, returns, mask = inputs(device, SMALL, dtype=torch.float64)
    clip_range = draw_range(0.2, kind, mask, SMALL, torch.Generator().manual_seed(1), device)
    function = lambda v: fused_critic.value_loss(v, old, returns, mask, clip_range=clip_range, **OPTIONS[name]).loss  # noqa: E731
    assert torch.autograd.gradcheck(function, values.requires_grad_())


@pytest.mark.parametrize("follow", ["nothing", "bootstrap_values", "next_values"])
@pytest.mark.parametrize("mask_mode", ["skip", "zero", "reset", "ignore"])
@pytest.mark.parametrize("returns_lam", [None, 0.3])
def test_gradcheck_gae(device, follow, mask_mode, returns_lam):
    values, other, rewards, mask = inputs(device, SMALL, dtype=torch.float64)
    extra = {"nothing": [], "bootstrap_values": [other[:, 0].clone()], "next_values": [other]}[follow]
    leaves = [x.requires_grad_() for x in (rewards, values, *extra)]
    options = {"terminated": mask.roll(1, 1), "gamma": number([0.9, 0.95], device), "lam": 0.8, "returns_lam": returns_lam}

    def function(rewards, values, *extra):
        return tuple(fused_critic.gae(rewards, values, mask, mask_mode=mask_mode, **options, **{follow: x for x in extra}))

    assert torch.autograd.gradcheck(function, leaves)


def test_second_backward_is_exact(device):
    values, old, returns, mask = inputs(device)
    values.requires_grad_()
    loss = fused_critic.value_loss(values, old, returns, mask).loss
    (first,) = torch.autograd.grad(loss, values, torch.tensor(3.0, device=device), retain_graph=True)
    (second,) = torch.autograd.grad(loss, values, torch.tensor(3.0, device=device), retain_graph=True)
    cases.assert_same_bits(first, second)
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_changing_a_saved_tensor_is_noticed(device):
    values, old, returns, mask = inputs(device)
    loss = fused_critic.value_loss(values.requires_grad_(), old, returns, mask).loss
    returns.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_double_backward_raises(device):
    values, old, returns, mask = inputs(device)
    for function, name in (
        (lambda v: fused_critic.value_loss(v, old, returns, mask).loss, "value_loss"),
        (lambda v: fused_critic.gae(returns, v, mask, gamma=0.9, lam=0.8).advantages.square().sum(), "gae"),
    ):
        leaf = values.clone().requires_grad_()
        (grad,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match=f"fused_critic.{name}: double backward is not supported"):
            grad.sum().backward()


def test_no_graph_under_no_grad(device):
    values, old, returns, mask = inputs(device)
    values.requires_grad_()
    with torch.no_grad():
        assert not fused_critic.value_loss(values, old, returns, mask).loss.requires_grad
        assert not fused_critic.gae(returns, values, gamma=0.9, lam=0.8).advantages.requires_grad
    with torch.inference_mode():
        assert fused_critic.value_loss(values, old, returns, mask).loss.is_inference()
    output = fused_critic.value_loss(values, old, returns, mask)
    assert output.loss.requires_grad and not output.stats.moments.requires_grad


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(device, backend):
    if backend == "inductor" and device != "cpu" and not torch.utils._triton.has_triton():
        pytest.skip("inductor on cuda needs Triton, which needs a GPU")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(critic_step, backend=counter, fullgraph=True, dynamic=True)
    for numbers, shape in zip(STEPS, [(4, 9), (4, 9), (5, 12), (6, 13)]):
        tensors = inputs(device, shape)
        compare_results(run_step(compiled, tensors, numbers), run_step(critic_step, tensors, numbers), tolerance=1e-6)
    assert counter.frame_count == 1, "a number or a shape that changed was compiled again"


def test_compile_with_tensor_numbers_never_recompiles(device):
    """Without dynamic=True torch itself specialises on a Python number first; 0-d tensors avoid even that."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(critic_step, backend=counter, fullgraph=True)
    compilations = 0  # of the first call
    for numbers in STEPS:
        tensors, tensor_numbers = inputs(device), [number(x, device) for x in numbers]
        compare_results(run_step(compiled, tensors, tensor_numbers), run_step(critic_step, tensors, numbers), tolerance=1e-6)
        compilations = compilations or counter.frame_count
    assert counter.frame_count == compilations


@pytest.mark.parametrize("mask_mode", ["skip", "zero", "reset", "ignore"])
def test_compiled_gae_options(device, mask_mode):
    """As without compiling, whatever the numbers are, and nothing is compiled again for other ones."""
    torch._dynamo.reset()
    values, _, rewards, mask = inputs(device)

    def step(values, lam, returns_lam):
        advantages, returns = fused_critic.gae(rewards, values, mask, mask_mode=mask_mode, gamma=0.9, lam=lam, returns_lam=returns_lam)
        return advantages.sum() + returns.square().sum()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    frames = []
    for first in (0.1, 0.2, 0.3):
        lam = torch.linspace(first, 1, len(values), device=device)
        gradients = []
        for function in (compiled, step):
            leaf = values.clone().requires_grad_()
            gradients += torch.autograd.grad(function(leaf, lam, first), leaf)
        cases.assert_close(*gradients, 1e-6)
        frames.append(counter.frame_count)
    assert frames[1] == frames[2]  # the second number makes it a symbol


COMPILE_SECONDS = 3  # a Python loop over time is unrolled: 40 s at T = 256


def test_compiled_graph_does_not_grow_with_the_length(device):
    nodes, seconds = [], []

    def count(module, example_inputs):
        nodes.append(len(module.graph.nodes))
        return module

    for length in (16, 8192):
        torch._dynamo.reset()
        tensors = inputs(device, (2, length))
        run_step(torch.compile(critic_step, backend=count, fullgraph=True), tensors, STEPS[0])
        torch._dynamo.reset()
        start = time.perf_counter()
        run_step(torch.compile(critic_step, backend="aot_eager", fullgraph=True), tensors, STEPS[0])
        seconds.append(time.perf_counter() - start)
    assert len(nodes) == 2 and nodes[0] == nodes[1]
    assert seconds[1] < COMPILE_SECONDS


def test_compile_raw_operators(device):
    torch._dynamo.reset()
    values, old, returns, mask = inputs(device)

    def step(values):
        loss, stats, _ = ops.value_loss(values, old, returns, mask, reduction="seq-mean-token-mean")
        return loss + ops.gae(returns, values, mask, gamma=0.9, lam=0.8)[0].square().mean(), stats

    results = []
    for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        leaf = values.clone().requires_grad_()
        loss, stats = function(leaf)
        loss.backward()
        results.append((loss, stats, leaf.grad))
    for got, expected in zip(*results):
        cases.assert_close(got, expected, 1e-6)


class CriticStep(torch.nn.Module):
    def forward(self, values, old_values, rewards, mask):
        _, returns = fused_critic.gae(rewards, values, mask, gamma=0.99, lam=0.95)
        loss, stats = fused_critic.value_loss(values, old_values, returns, mask)
        return loss, stats.explained_variance


def test_export(device):
    rows, columns = torch.export.Dim("rows"), torch.export.Dim("columns")
    program = torch.export.export(CriticStep(), inputs(device), dynamic_shapes=({0: rows, 1: columns},) * 4)
    other = inputs(device, (7, 5), seed=1)
    for got, expected in zip(program.module()(*other), CriticStep()(*other)):
        cases.assert_close(got, expected, 1e-6)


def test_func_grad(device):
    values, old, returns, mask = inputs(device)
    function = lambda v: fused_critic.value_loss(v, old, returns, mask).loss  # noqa: E731
    leaf = values.clone().requires_grad_()
    function(leaf).backward()
    cases.assert_same_bits(torch.func.grad(function)(values), leaf.grad)
    grads, stats = torch.func.grad(lambda v: tuple(fused_critic.value_loss(v, old, returns, mask)), has_aux=True)(values)
    cases.assert_same_bits(grads, leaf.grad)
    assert isinstance(stats, fused_critic.ValueLossStats)
    through_gae = lambda v: fused_critic.gae(returns, v, mask, gamma=0.9, lam=0.8).advantages.square().sum()  # noqa: E731
    leaf = values.clone().requires_grad_()
    through_gae(leaf).backward()
    cases.assert_same_bits(torch.func.grad(through_gae)(values), leaf.grad)


def test_func_vmap(device):
    """An ensemble of critics: a leading dimension on values alone."""
    _, old, returns, mask = inputs(device)
    ensemble = torch.randn(3, 4, 9, generator=torch.Generator().manual_seed(1)).to(device)
    loss = lambda v: fused_critic.value_loss(v, old, returns, mask).loss  # noqa: E731
    advantages = lambda v: fused_critic.gae(returns, v, mask, gamma=0.9, lam=0.8).advantages  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's own fallback would warn
        for function in (loss, torch.func.grad(loss), advantages):
            cases.assert_same_bits(torch.func.vmap(function)(ensemble), torch.stack([function(v) for v in ensemble]))
        several = lambda lam: fused_critic.gae(returns, old, mask, gamma=0.9, lam=0.8, returns_lam=lam).returns  # noqa: E731
        lams = torch.linspace(0.5, 1, 12, device=device).view(3, 4)
        cases.assert_same_bits(torch.func.vmap(several)(lams), torch.stack([several(lam) for lam in lams]))
        cases.assert_same_bits(torch.func.vmap(loss, in_dims=2)(ensemble.movedim(0, 2)), torch.stack([loss(v) for v in ensemble]))


def test_func_vmap_over_ranges(device):
    """A range per token for each of several calls, and one number for each."""
    values, old, returns, mask = inputs(device)
    options = {"criterion": "huber", "clip_only": True, "loss_clamp": 0.5}
    loss = lambda v, r: fused_critic.value_loss(v, old, returns, mask, clip_range=r, **options).loss  # noqa: E731
    for ranges in (
        torch.rand(3, 4, 9, generator=torch.Generator().manual_seed(1)).to(device),
        torch.tensor([0.1, 0.2, 0.4], device=device),
    ):
        for function in (loss, torch.func.grad(loss)):
            got = torch.func.vmap(function, in_dims=(None, 0))(values, ranges)
            cases.assert_same_bits(got, torch.stack([function(values, r) for r in ranges]))


def test_compile_with_options(device):
    """A range per token and a clamp that change are not compiled again."""
    torch._dynamo.reset()
    values, old, returns, mask = inputs(device)

    def step(values, bounds, clamp):
        return tuple(fused_critic.value_loss(values, old, returns, mask, clip_range=bounds, criterion="smooth_l1", loss_clamp=clamp))

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    compilations = 0  # of the first call
    for clamp in (0.3, 0.2, 0.1):
        leaf, bounds = values.clone().requires_grad_(), old.abs() * clamp
        (loss, stats), (expected, expected_stats) = compiled(leaf, bounds, number(clamp, device)), step(leaf, bounds, clamp)
        cases.assert_close(loss, expected, 1e-6)
        cases.assert_close(stats.moments, expected_stats.moments, 1e-6)
        cases.assert_close(*(torch.autograd.grad(x, leaf)[0] for x in (loss, expected)), 1e-6)
        compilations = compilations or counter.frame_count
    assert counter.frame_count == compilations


def test_func_vmap_of_every_kind(device):
    """Per-token results, statistics, numbers, samples and nested ensembles, each against a loop."""
    values, old, returns, mask = inputs(device)
    ensemble = torch.randn(2, 3, 4, 9, generator=torch.Generator().manual_seed(1)).to(device)
    numbers = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64, device=device)

    def loss(values, old=old, returns=returns, mask=mask, **options):
        return fused_critic.value_loss(values, old, returns, mask, **options).loss

    def advantages(values, gamma=0.9):
        return fused_critic.gae(returns, values, mask, gamma=gamma, lam=0.8, whiten=True).advantages

    def statistics(values):
        return fused_critic.value_loss(values, old, returns, mask).stats

    losses = lambda v: loss(v, reduction="none")  # noqa: E731
    clipped, discounted = (lambda x: loss(values, clip_range=x)), (lambda x: advantages(values, x))
    for function, batch in ((losses, ensemble[0]), (advantages, ensemble[0]), (clipped, numbers), (discounted, numbers)):
        cases.assert_close(torch.func.vmap(function)(batch), torch.stack([function(x) for x in batch]), 1e-6)
    merged = torch.func.vmap(statistics)(ensemble[0])
    assert isinstance(merged, fused_critic.ValueLossStats)
    members = [statistics(v) for v in ensemble[0]]
    cases.assert_same_bits(merged.moments, torch.stack([x.moments for x in members]))
    for name in ("explained_variance", "clip_fraction", "value_min"):
        cases.assert_same_bits(getattr(merged, name), torch.stack([getattr(x, name) for x in members]), name)
    cases.assert_same_bits((merged + merged).value_mean, torch.stack([(x + x).value_mean for x in members]))
    for function in (loss, torch.func.grad(loss)):
        expected = torch.stack([torch.stack([function(v) for v in row]) for row in ensemble])
        cases.assert_same_bits(torch.func.vmap(torch.func.vmap(function))(ensemble), expected)
    per_sample = torch.func.vmap(torch.func.grad(loss))
    expected = torch.stack([torch.func.grad(loss)(*row) for row in zip(values, old, returns, mask)])
    cases.assert_same_bits(per_sample(values, old, returns, mask), expected)


def test_func_ensemble_of_critics(device):
    """A whole critic step per member, vectorised over the members' parameters, against one member at a time."""
    _, old, rewards, mask = inputs(device)
    torch.manual_seed(0)
    critics = [torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).to(device) for _ in range(3)]
    observations = torch.randn(4, 9, 5).to(device)

    def step(parameters, buffers):
        values = torch.func.functional_call(critics[0], (parameters, buffers), (observations,)).squeeze(-1)
        advantages, returns = fused_critic.gae(rewards, values.detach(), mask, gamma=0.9, lam=0.8)
        return fused_critic.value_loss(values, old, returns, mask).loss, advantages

    gradients, advantages = torch.func.vmap(torch.func.grad(step, has_aux=True))(*torch.func.stack_module_state(critics))
    for i, critic in enumerate(critics):
        expected, expected_advantages = torch.func.grad(step, has_aux=True)(dict(critic.named_parameters()), {})
        cases.assert_close(advantages[i], expected_advantages, 1e-6)
        for name, gradient in expected.items():
            cases.assert_close(gradients[name][i], gradient, 1e-6, name)


def test_func_jacobians(device):
    """jacrev of per-token results: the loss of a token depends on its own value alone; an advantage on those that follow."""
    values, old, returns, mask = inputs(device, SMALL)
    losses = lambda v: fused_critic.value_loss(v, old, returns, mask, reduction="none").loss.flatten()  # noqa: E731
    advantages = lambda v: fused_critic.gae(returns, v, mask, gamma=0.9, lam=0.8).advantages.flatten()  # noqa: E731
    for function in (losses, advantages):
        jacobian = torch.func.jacrev(function)(values)
        leaf = values.clone().requires_grad_()
        rows = [torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in function(leaf)]
        cases.assert_same_bits(jacobian, torch.stack(rows))
    diagonal = torch.func.jacrev(losses)(values).flatten(1)
    assert torch.equal(diagonal, diagonal.diagonal().diag())
    _, pull_back = torch.func.vjp(losses, values)
    cases.assert_same_bits(pull_back(torch.ones(values.numel(), device=device))[0].flatten(), diagonal.diagonal())


def test_forward_mode_is_refused(device):
    """Nothing may lose a tangent in silence, also not behind a reverse mode (a Hessian is jacfwd of jacrev)."""
    values, old, returns, mask = inputs(device)
    functions = {
        "value_loss": lambda v: fused_critic.value_loss(v, old, returns, mask).loss,
        "gae": lambda v: fused_critic.gae(returns, v, mask, gamma=0.9, lam=0.8).advantages.square().sum(),
    }
    for name, function in functions.items():
        refused = pytest.raises(NotImplementedError, match=f"fused_critic.{name}: forward-mode differentiation .* is not supported")
        with refused:
            torch.func.jvp(function, (values,), (torch.ones_like(values),))
        with refused:
            torch.func.jacfwd(function)(values)
        with refused:
            torch.func.hessian(function)(values)
        with refused, torch.autograd.forward_ad.dual_level():
            function(torch.autograd.forward_ad.make_dual(values, torch.ones_like(values)))
    with torch.autograd.forward_ad.dual_level():  # other tensors' tangents are no matter of these operators
        for function in functions.values():
            function(values)
    # Whitening is made of torch's own operators, which have the mode.
    whiten = lambda x: fused_critic.masked_whiten(x, mask)  # noqa: E731
    wide = values.double()
    cases.assert_close(torch.func.jacfwd(whiten)(wide), torch.func.jacrev(whiten)(wide), 1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(device, dtype):
    for input_dtype in (torch.float32, torch.bfloat16):
        tensors = [x if x.dtype == torch.bool else x.to(input_dtype) for x in inputs(device)]
        expected = run_step(critic_step, tensors, STEPS[0])
        white = fused_critic.masked_whiten(*tensors[::3])
        with torch.autocast(device, dtype=dtype):
            got = run_step(critic_step, tensors, STEPS[0])
            cases.assert_same_bits(fused_critic.masked_whiten(*tensors[::3]), white)
        for name, tensor in expected.items():
            cases.assert_same_bits(got[name], tensor, name)


def test_reduce_overhead(device):
    """On cuda the mode captures the operators in CUDA graphs and replays them with new inputs."""
    if device != "cpu" and not torch.utils._triton.has_triton():
        pytest.skip("inductor on cuda needs Triton, which needs a GPU")
    torch._dynamo.reset()
    compiled = torch.compile(critic_step, mode="reduce-overhead", fullgraph=True)
    for seed in range(4):  # a warm-up, the capture, replays
        torch.compiler.cudagraph_mark_step_begin()
        tensors = inputs(device, seed=seed)
        compare_results(run_step(compiled, tensors, STEPS[0]), run_step(critic_step, tensors, STEPS[0]), tolerance=1e-6)


def test_statistics_under_compile_and_pytree(device):
    arguments = inputs(device)
    stats = fused_critic.value_loss(*arguments).stats
    leaves, spec = torch.utils._pytree.tree_flatten(stats)
    assert len(leaves) == 1 and torch.utils._pytree.tree_unflatten(leaves, spec).moments is stats.moments
    merged = torch.compile(lambda a, b: a + b, backend="aot_eager", fullgraph=True)(stats, stats)
    assert math.isclose(merged.num_tokens.item(), 2 * stats.num_tokens.item())


def test_deterministic_algorithms_mode(device):
    arguments = inputs(device)
    expected = fused_critic.value_loss(*arguments).loss
    torch.use_deterministic_algorithms(True)
    try:
        cases.assert_same_bits(fused_critic.value_loss(*arguments).loss, expected)
    finally:
        torch.use_deterministic_algorithms(False)


# Rows walked by a warp, by a block, by several blocks: every launch of the library, together with the two layouts.
LAUNCHED = [(shape, time_dim) for shape in ((5, 40), (130, 520), (2, 9000)) for time_dim in (-1, 0)]


def run_everywhere(device, shape, time_dim):
    """GAE and the loss, forward and backward, with and without clipping."""
    generator = torch.Generator().manual_seed(0)
    rewards, old, values = (torch.randn(shape, generator=generator).to(device) for _ in range(3))
    advantages, returns = fused_critic.gae(rewards, values.requires_grad_(), gamma=0.99, lam=0.95, time_dim=time_dim)
    results = [advantages, *torch.autograd.grad(advantages.sum(), values)]
    for clip_range in (0.2, None):
        loss = fused_critic.value_loss(values, old, returns.detach(), clip_range=clip_range, time_dim=time_dim).loss
        results += [loss, *torch.autograd.grad(loss, values)]
    return results


def assert_like_cpu(got, shape, time_dim):
    for a, b in zip(got, run_everywhere("cpu", shape, time_dim), strict=True):
        cases.assert_close(a, b, 1e-5, f"{shape}, time_dim {time_dim}")


def test_side_stream(device):
    if device != "cuda":
        pytest.skip("needs a CUDA device")
    for shape, time_dim in LAUNCHED:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            got = run_everywhere(device, shape, time_dim)
        stream.synchronize()
        assert_like_cpu(got, shape, time_dim)


def test_second_device_while_the_first_is_current(device):
    if device != "cuda" or torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    assert torch.cuda.current_device() == 0
    for shape, time_dim in LAUNCHED:
        got = run_everywhere("cuda:1", shape, time_dim)
        assert all(tensor.device == torch.device("cuda:1") for tensor in got)
        assert_like_cpu(got, shape, time_dim)
    assert torch.cuda.current_device() == 0
