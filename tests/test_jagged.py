"""Nested tensors of layout torch.jagged: the results of the packed call, bit for bit, jagged again."""

import fused_critic
import pytest
import torch
from fused_critic.check import cases
from fused_critic.check.runner import Context
from fused_critic.check.torch_features import compare_jagged
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

ops = torch.ops.fused_critic
BOUNDS = [0, 3, 3, 10, 24]


def jagged(x, offsets):
    return torch.nested.nested_tensor_from_jagged(x, offsets)


def tokens(device, count, how_many, n=BOUNDS[-1], dtype=torch.float32):
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(n, generator=generator).to(device, dtype) for _ in range(how_many)]


def offsets_on(device, bounds=BOUNDS):
    return torch.tensor(bounds, device=device)


def assert_jagged_like(got, like, packed):
    assert got.is_nested and got.layout == torch.jagged
    assert got.shape == like.shape and got.offsets() is like.offsets()
    cases.assert_same_bits(got.values(), packed)


@pytest.mark.parametrize("mask_dtype", [None, torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
def test_value_loss(device, reduction, mask_dtype):
    offsets = offsets_on(device)
    values, old, returns = tokens(device, 0, 3)
    mask = cases.mask(values.shape, mask_dtype, torch.Generator().manual_seed(1))
    mask = mask if mask is None else mask.to(device)
    options = {"reduction": reduction, "loss_scale_factor": 7.0}
    flat = values.clone().requires_grad_()
    loss, stats = fused_critic.value_loss(flat, old, returns, mask, cu_seqlens=offsets, **options)
    upstream = torch.ones_like(loss)
    (grad,) = torch.autograd.grad(loss, flat, upstream)

    leaf = values.clone().requires_grad_()
    nested = jagged(leaf, offsets)
    got, got_stats = fused_critic.value_loss(
        nested, jagged(old, offsets), jagged(returns, offsets), None if mask is None else jagged(mask, offsets), **options
    )
    if reduction == "none":
        assert_jagged_like(got, nested, loss)
        got = got.values()
    cases.assert_same_bits(got, loss)
    cases.assert_same_bits(got_stats.moments, stats.moments)
    cases.assert_same_bits(torch.autograd.grad(got, leaf, upstream)[0], grad)


def test_a_jagged_leaf_gets_a_jagged_gradient(device):
    offsets = offsets_on(device)
    values, old, returns = tokens(device, 1, 3, dtype=torch.bfloat16)
    leaf = jagged(values, offsets).detach().requires_grad_()
    fused_critic.value_loss(leaf, jagged(old, offsets), jagged(returns, offsets)).loss.backward()
    flat = values.clone().requires_grad_()
    fused_critic.value_loss(flat, old, returns, cu_seqlens=offsets).loss.backward()
    assert_jagged_like(leaf.grad, leaf, flat.grad)


@pytest.mark.parametrize("follow", ["nothing", "bootstrap_values", "next_values"])
@pytest.mark.parametrize("whiten", [False, True])
def test_gae(device, follow, whiten):
    offsets = offsets_on(device)
    rewards, values, following, upstream = tokens(device, 2, 4)
    mask = cases.mask(values.shape, torch.bool, torch.Generator().manual_seed(1)).to(device)
    flags = {"mask": mask, "terminated": mask.roll(2)}
    if follow == "next_values":
        flags["truncated"] = mask.roll(3)
    others = {"bootstrap_values": following[: len(BOUNDS) - 1]} if follow == "bootstrap_values" else {}
    others |= {"next_values": following} if follow == "next_values" else {}

    def run(arrange, **layout):
        leaves = [x.clone().requires_grad_() for x in (rewards, values, *others.values())]
        per_token = [arrange(x) for x in leaves[:2]]
        extra = {name: x if name == "bootstrap_values" else arrange(x) for name, x in zip(others, leaves[2:])}
        output = fused_critic.gae(
            *per_token, **{name: arrange(x) for name, x in flags.items()}, **extra, gamma=0.9, lam=0.8, whiten=whiten, **layout
        )
        flat = [x.values() if x.is_nested else x for x in output]
        return per_token[0], output, flat, torch.autograd.grad(flat, leaves, [upstream, upstream])

    _, _, expected, expected_grads = run(lambda x: x, cu_seqlens=offsets)
    like, output, got, got_grads = run(lambda x: jagged(x, offsets))
    for x, packed in zip(output, expected):
        assert_jagged_like(x, like, packed)
    for x, y in zip(got_grads, expected_grads, strict=True):
        cases.assert_same_bits(x, y)


def test_recurrences(device):
    """reverse_scan with every kind of decay and its gradients, V-trace, and what gae composes of scans."""
    offsets = offsets_on(device)
    x, decay, init, upstream = tokens(device, 5, 4)
    init = init[: len(BOUNDS) - 1]
    for decays in (0.9, decay[: len(BOUNDS) - 1], decay):

        def run(arrange, **layout):
            tensors = [decays] if isinstance(decays, torch.Tensor) else []
            leaves = [t.clone().requires_grad_() for t in (x, init, *tensors)]
            number = leaves[2] if tensors else decays
            number = arrange(number) if tensors and number.shape == x.shape else number
            y = fused_critic.reverse_scan(arrange(leaves[0]), number, leaves[1], **layout)
            flat = y.values() if y.is_nested else y
            return y, torch.autograd.grad(flat, leaves, upstream)

        expected, expected_grads = run(lambda t: t, cu_seqlens=offsets)
        got, got_grads = run(lambda t: jagged(t, offsets))
        assert got.is_nested and got.offsets() is offsets
        cases.assert_same_bits(got.values(), expected)
        for a, b in zip(got_grads, expected_grads, strict=True):
            cases.assert_same_bits(a, b)

    rewards, values, log_rhos, _ = tokens(device, 6, 4)
    mask = cases.mask(x.shape, torch.bool, torch.Generator().manual_seed(1)).to(device)
    turn_ids = torch.arange(x.shape[0], device=device) // 3
    calls = [
        lambda arrange, **layout: fused_critic.vtrace(*(arrange(t) for t in (rewards, values, log_rhos, mask)), gamma=0.9, **layout),
        lambda arrange, **layout: fused_critic.gae(
            *(arrange(t) for t in (rewards, values, mask)), gamma=0.9, lam=0.8, carry_masked_rewards=True, whiten=True, **layout
        ),
        lambda arrange, **layout: fused_critic.gae(
            *(arrange(t) for t in (rewards, values, mask)), gamma=0.9, lam=0.8, turn_ids=arrange(turn_ids), bootstrap_values=init, **layout
        ),
    ]
    for call in calls:
        for got, expected in zip(call(lambda t: jagged(t, offsets)), call(lambda t: t, cu_seqlens=offsets), strict=True):
            assert got.is_nested and got.offsets() is offsets
            cases.assert_same_bits(got.values(), expected)


def test_masked_whiten(device):
    offsets = offsets_on(device)
    (x,) = tokens(device, 3, 1)
    mask = cases.mask(x.shape, torch.int64, torch.Generator().manual_seed(1)).to(device)
    nested = jagged(x, offsets)
    assert_jagged_like(fused_critic.masked_whiten(nested, jagged(mask, offsets)), nested, fused_critic.masked_whiten(x, mask))
    assert_jagged_like(fused_critic.masked_whiten(nested, shift_mean=False), nested, fused_critic.masked_whiten(x, shift_mean=False))


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    dtype=st.sampled_from(cases.DTYPES),
    mask_dtype=st.sampled_from(cases.MASKS),
    how=st.sampled_from(["contiguous", "misaligned", "every-other"]),
    seed=st.integers(0, 99),
)
def test_any_lengths(lengths, dtype, mask_dtype, how, seed):
    """Every sequence of the jagged result is what the sequence alone gives."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    rewards, values = (cases.restride(torch.randn(sum(lengths), generator=generator).to(dtype), how) for _ in range(2))
    mask = cases.mask(values.shape, mask_dtype, generator)
    output = fused_critic.gae(
        jagged(rewards, offsets), jagged(values, offsets), None if mask is None else jagged(mask, offsets), gamma=0.9, lam=0.8
    )
    for nested in output:
        for s, sequence in enumerate(nested.unbind()):
            part = slice(int(offsets[s]), int(offsets[s + 1]))
            alone = fused_critic.gae(rewards[part], values[part], None if mask is None else mask[part], gamma=0.9, lam=0.8)
            cases.assert_close(sequence, alone.advantages if nested is output.advantages else alone.returns, 1e-6)


class Recorded(TorchDispatchMode):
    """Every operator that is called on plain tensors, with the addresses of its tensor arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        arguments = list(args) + list((kwargs or {}).values())
        if any(isinstance(x, torch.Tensor) and x.is_nested for x in arguments):
            return NotImplemented  # the tensor's own turn, then ours again
        self.calls.append((func.name(), [x.data_ptr() for x in arguments if isinstance(x, torch.Tensor)]))
        return func(*args, **(kwargs or {}))


def test_nothing_is_copied(device):
    offsets = offsets_on(device)
    packed = tokens(device, 4, 3)
    nested = [jagged(x, offsets) for x in packed]
    with Recorded() as recorded:
        fused_critic.value_loss(*nested, reduction="none")
    (call,) = [arguments for name, arguments in recorded.calls if name == "fused_critic::value_loss"]
    assert call == [x.data_ptr() for x in (*packed, offsets)]
    assert not {"aten::copy_", "aten::clone", "aten::_to_copy", "aten::constant_pad_nd"} & {name for name, _ in recorded.calls}


def test_without_a_synchronisation(device):
    """The check of the command line: on CUDA the contents of the offsets are never read by the host."""
    compare_jagged(Context(torch.device(device)))


def test_raw_operators(device):
    offsets = offsets_on(device)
    values, old, returns = tokens(device, 5, 3)
    nested = [jagged(x, offsets) for x in (values, old, returns)]
    losses, stats, _ = ops.value_loss(*nested, reduction="none")
    expected, expected_stats, _ = ops.value_loss(values, old, returns, cu_seqlens=offsets, reduction="none")
    assert_jagged_like(losses, nested[0], expected)
    cases.assert_same_bits(stats, expected_stats)
    gamma, lam = (torch.tensor(x, dtype=torch.float64, device=device) for x in (0.9, 0.8))
    advantages, _ = ops.gae.tensor(nested[2], nested[0], gamma, lam)
    assert_jagged_like(advantages, nested[0], ops.gae.tensor(returns, values, gamma, lam, cu_seqlens=offsets)[0])


def test_a_strided_gradient_of_jagged_losses_is_refused():
    nested = jagged(torch.ones(BOUNDS[-1]), OFFSETS)
    _, _, residuals = ops.value_loss(nested, nested, nested, reduction="none")
    with pytest.raises(
        ValueError, match=r"value_loss_backward: grad_loss: expected a jagged tensor or a number, got a strided tensor of shape \[24\]"
    ):
        ops.value_loss_backward(
            torch.ones(BOUNDS[-1]), nested, nested, nested, None, None, residuals, clip=True, reduction="none", time_dim=-1
        )


OFFSETS = offsets_on("cpu")
X = torch.ones(BOUNDS[-1])
J = jagged(X, OFFSETS)
HOLES = torch.nested.nested_tensor_from_jagged(X, OFFSETS, OFFSETS.diff().clamp(max=2))
SAME_CONTENTS = jagged(X, OFFSETS.clone())
DEEP = jagged(X.view(-1, 2), OFFSETS // 2)
STRIDED_LAYOUT = torch.nested.nested_tensor([X[:3], X[3:]], layout=torch.strided)


def loss(values=J, old_values=J, returns=J, mask=None, **options):
    return fused_critic.value_loss(values, old_values, returns, mask, **options)


def gae(rewards=J, values=J, mask=None, **options):
    return fused_critic.gae(rewards, values, mask, gamma=0.9, lam=0.8, **options)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: loss(mask=X > 0), r"value_loss: mask: expected a jagged tensor \(as values is\), got a strided tensor"),
        (lambda: loss(X, X, J), r"value_loss: returns: expected a strided tensor \(as values is\), got a jagged tensor"),
        (lambda: loss(X, X, X, J), r"value_loss: mask: expected a strided tensor"),
        (lambda: gae(values=X), r"gae: values: expected a jagged tensor \(as rewards is\)"),
        (lambda: gae(terminated=X), r"gae: terminated: expected a jagged tensor"),
        (lambda: gae(next_values=X), r"gae: next_values: expected a jagged tensor"),
        (lambda: gae(bootstrap_values=J), r"gae: bootstrap_values: expected a strided tensor, got a nested one"),
        (lambda: gae(bootstrap_values=X), r"gae: bootstrap_values: expected shape \[4\]"),
        (lambda: loss(returns=SAME_CONTENTS), r"value_loss: returns: expected the offsets of values, got another offsets tensor"),
        (lambda: gae(mask=SAME_CONTENTS), r"gae: mask: expected the offsets of rewards"),
        (lambda: loss(cu_seqlens=OFFSETS), r"value_loss: cu_seqlens: expected None beside jagged tensors.*got a tensor"),
        (lambda: gae(cu_seqlens=OFFSETS), r"gae: cu_seqlens: expected None beside jagged tensors"),
        (lambda: loss(time_dim=0), r"value_loss: time_dim: expected -1 beside jagged tensors.*got 0"),
        (lambda: gae(time_dim=1), r"gae: time_dim: expected -1 beside jagged tensors.*got 1"),
        (lambda: loss(HOLES, HOLES, HOLES), r"value_loss: values: expected a jagged tensor without holes"),
        (lambda: loss(DEEP, DEEP, DEEP), r"value_loss: values: expected a jagged tensor of shape \[B, T\*\], got 3 dimensions"),
        (lambda: loss(old_values=STRIDED_LAYOUT), r"value_loss: old_values: expected a nested tensor of layout torch.jagged"),
        (lambda: loss(reduction="seq-mean-token-sum-norm"), r"value_loss: loss_scale_factor: expected a number"),
        (lambda: fused_critic.masked_whiten(J, X), r"masked_whiten: mask: expected a jagged tensor \(as x is\)"),
        (lambda: fused_critic.masked_whiten(X, J), r"masked_whiten: mask: expected a strided tensor \(as x is\)"),
        (lambda: fused_critic.masked_whiten(J, SAME_CONTENTS), r"masked_whiten: mask: expected the offsets of x"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match="fused_critic." + message):
        call()


def critic_step(values, old_values, rewards, mask):
    advantages, returns = fused_critic.gae(rewards, values.detach(), mask, gamma=0.99, lam=0.95, whiten=True)
    loss, stats = fused_critic.value_loss(values, old_values, returns, mask)
    return advantages, loss, stats


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(device, backend):
    if backend == "inductor" and device != "cpu" and not torch.utils._triton.has_triton():
        pytest.skip("inductor on cuda needs Triton, which needs a GPU")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(critic_step, backend=counter, fullgraph=True, dynamic=True)
    for bounds in (BOUNDS, [0, 4, 9, 20, 21]):
        offsets = offsets_on(device, bounds)
        values, old, rewards = tokens(device, 6, 3, n=bounds[-1])
        mask = cases.mask(values.shape, torch.bool, torch.Generator().manual_seed(1)).to(device)
        results = []
        for step in (critic_step, compiled):
            leaf = values.clone().requires_grad_()
            advantages, loss, stats = step(*(jagged(x, offsets) for x in (leaf, old, rewards, mask)))
            assert advantages.is_nested
            results.append((advantages.values(), loss, stats.moments, *torch.autograd.grad(loss, leaf)))
        for got, expected in zip(*reversed(results)):
            cases.assert_close(got, expected, 1e-6)
    assert counter.frame_count == 1, "other lengths were compiled again"


def test_compile_notices_other_offsets():
    torch._dynamo.reset()
    with pytest.raises(Exception, match="returns: expected the offsets of values"):
        torch.compile(loss, backend="aot_eager", fullgraph=True)(returns=SAME_CONTENTS)
