"""carry_masked_rewards and turn_ids of gae, against the float64 reference, on every device."""

import math

import fused_critic
import pytest
import torch
from fused_critic import reference
from fused_critic.check import cases
from hypothesis import given
from hypothesis import strategies as st

FACTORS = {"gamma": 0.95, "lam": 0.9}
FOLLOW = ("nothing", "bootstrap", "terminated", "truncated")


def turn_ids(shape, time_dim, generator):
    """Runs of a few tokens; ids come back later in a sequence."""
    changes = torch.rand(shape, generator=generator) < 0.3
    return changes.cumsum(time_dim) % 3


def build(kind, size, follow, masked, dtype, seed, device):
    """rewards, values, ids, options."""
    generator = torch.Generator().manual_seed(seed)
    layout = cases.layout(kind, *size, generator, device)

    def numbers(shape=layout.shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    def flags():
        return (torch.rand(layout.shape, generator=generator) < 0.1).to(device)

    rewards, values = numbers(), numbers()
    options = dict(layout.options)
    if masked:
        options["mask"] = cases.mask(layout.shape, torch.bool, generator).to(device)
    if follow == "bootstrap":
        options["bootstrap_values"] = numbers((layout.num_seqs,))
    if follow in ("terminated", "truncated"):
        options["terminated"] = flags()
    if follow == "truncated":
        options |= {"truncated": flags(), "next_values": numbers()}
    ids = turn_ids(layout.shape, layout.time_dim, generator).to(device)
    return rewards, values, ids, options


problems = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(cases.LAYOUTS),
        "size": st.sampled_from([(1, 1), (1, 40), (3, 33), (5, 7), (40, 3)]),
        "follow": st.sampled_from(FOLLOW),
        "masked": st.booleans(),
        "dtype": st.sampled_from(cases.DTYPES),
        "seed": st.integers(0, 2**20),
    }
)


def test_carried_by_hand(device):
    rewards = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], device=device)
    mask = torch.tensor([0, 1, 0, 0, 1, 0], device=device)
    options = {"gamma": 0.0, "lam": 0.0}
    got = fused_critic.gae(rewards, torch.zeros_like(rewards), mask, carry_masked_rewards=True, **options)
    assert got.advantages.tolist() == [0, 14, 0, 0, 48, 0]
    packed = torch.tensor([0, 3, 6], device=device)
    got = fused_critic.gae(rewards, torch.zeros_like(rewards), mask, carry_masked_rewards=True, cu_seqlens=packed, **options)
    assert got.advantages.tolist() == [0, 6, 0, 0, 48, 0]


@given(problem=problems)
def test_carried_rewards(device, problem):
    rewards, values, _, options = build(**problem, device=device)
    layout = {name: options[name] for name in ("cu_seqlens", "time_dim")}
    carried = rewards if "mask" not in options else reference.carried_rewards(rewards, options["mask"], **layout)
    expected = reference.gae(carried, values, **options, **FACTORS)
    got = fused_critic.gae(rewards, values, carry_masked_rewards=True, **options, **FACTORS)
    for a, b in zip(got, (expected.advantages, expected.returns)):
        cases.assert_close(a, b, cases.tolerance(problem["dtype"]))


def test_turns_by_hand(device):
    rewards = torch.tensor([1.0, 2.0, 9.0, 3.0, 4.0, 5.0, 6.0], device=device)
    values = torch.tensor([0.5, 7.0, 7.0, 7.0, 2.0, 7.0, 3.0], device=device)
    ids = torch.tensor([4, 4, 0, 4, 1, 1, 4], device=device)
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 1], device=device)
    gamma, lam = 0.5, 0.5
    third = 6.0 - 3.0
    second = 9.0 + gamma * 3.0 - 2.0 + gamma * lam * third
    first = 6.0 + gamma * 2.0 - 0.5 + gamma * lam * second
    got = fused_critic.gae(rewards, values, mask, gamma=gamma, lam=lam, turn_ids=ids)
    cases.assert_close(got.advantages, [first, first, 0, first, second, second, third], 1e-6)
    cases.assert_close(got.returns, [first + 0.5, first + 0.5, 0, first + 0.5, second + 2.0, second + 2.0, 6.0], 1e-6)


@given(problem=problems)
def test_turns(device, problem):
    rewards, values, ids, options = build(**problem, device=device)
    expected = reference.turn_gae(rewards, values, ids, **options, **FACTORS)
    got = fused_critic.gae(rewards, values, turn_ids=ids, **options, **FACTORS)
    for a, b in zip(got, (expected.advantages, expected.returns)):
        assert a.dtype == (torch.float64 if problem["dtype"] == torch.float64 else torch.float32) and a.shape == rewards.shape
        cases.assert_close(a, b, cases.tolerance(problem["dtype"]))


@pytest.mark.parametrize("kind", cases.LAYOUTS)
def test_a_turn_per_token_is_gae(device, kind):
    rewards, values, _, options = build(kind, (3, 50), "truncated", True, torch.float32, 1, device)
    ids = torch.arange(rewards.numel(), device=device).view(rewards.shape)
    got, expected = (
        fused_critic.gae(rewards, values, turn_ids=ids, **options, **FACTORS),
        fused_critic.gae(rewards, values, **options, **FACTORS),
    )
    for a, b in zip(got, expected):
        cases.assert_close(a, b, 1e-6)


def test_ids_beyond_floating_precision_are_told_apart(device):
    x = torch.ones(4, device=device)
    got = fused_critic.gae(x, x, gamma=1.0, lam=1.0, turn_ids=torch.tensor([2**60, 2**60, 2**60 + 1, 2**60 + 1], device=device))
    cases.assert_close(got.returns, [4, 4, 2, 2], 1e-6)


def test_both_together_and_whitened(device):
    """A reward behind the last token of a turn is that turn's."""
    rewards, values, ids, options = build("padded", (4, 30), "bootstrap", True, torch.float64, 2, device)
    carried = reference.carried_rewards(rewards, options["mask"]).to(device)
    expected = reference.turn_gae(carried, values, ids, **options, **FACTORS)
    got = fused_critic.gae(rewards, values, turn_ids=ids, carry_masked_rewards=True, whiten=True, **options, **FACTORS)
    cases.assert_close(got.advantages, reference.masked_whiten(expected.advantages, options["mask"]), 1e-10)
    cases.assert_close(got.returns, expected.returns, 1e-10)


@pytest.mark.parametrize("kind", cases.LAYOUTS)
@pytest.mark.parametrize("follow", ["bootstrap", "truncated"])
def test_gradients(device, kind, follow):
    rewards, values, ids, options = build(kind, (2, 3), follow, True, torch.float64, 3, device)
    names = [name for name in ("bootstrap_values", "next_values") if name in options]
    leaves = [t.requires_grad_() for t in (rewards, values, *(options[name] for name in names))]

    def function(rewards, values, *others):
        given = {**options, **dict(zip(names, others)), **FACTORS}
        return tuple(fused_critic.gae(rewards, values, turn_ids=ids, carry_masked_rewards=True, **given))

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("kind", cases.LAYOUTS)
def test_masked_contents_have_no_influence(device, kind):
    """On turns; rewards are handed over only where that is asked for."""
    rewards, values, ids, options = build(kind, (3, 40), "truncated", True, torch.float32, 4, device)
    mask = options["mask"]

    def run(poison):
        tensors = {name: torch.where(mask, x, poison) for name, x in (("rewards", rewards), ("values", values))}
        following = torch.where(mask, options["next_values"], poison)
        ends = {name: torch.where(mask, options[name].float(), poison) for name in ("terminated", "truncated")}
        given = {**options, **ends, "next_values": following, "turn_ids": torch.where(mask, ids, 7)}
        return fused_critic.gae(**tensors, **given, **FACTORS)

    for a, b in zip(run(0.0), run(math.nan)):
        cases.assert_same_bits(a, b)


def test_same_bits_on_every_run(device):
    rewards, values, ids, options = build("packed", (5, 700), "nothing", True, torch.float32, 5, device)
    leaves = [t.requires_grad_() for t in (rewards, values)]

    def run():
        out = fused_critic.gae(rewards, values, turn_ids=ids, carry_masked_rewards=True, **options, **FACTORS)
        return *out, *torch.autograd.grad(out.advantages.square().sum() + out.returns.sum(), leaves)

    for a, b in zip(run(), run()):
        cases.assert_same_bits(a, b)


def test_compiled(device):
    rewards, values, ids, options = build("padded", (3, 20), "bootstrap", True, torch.float32, 6, device)

    def function(rewards, values, ids):
        return tuple(fused_critic.gae(rewards, values, turn_ids=ids, carry_masked_rewards=True, **options, **FACTORS))

    torch._dynamo.reset()
    for a, b in zip(torch.compile(function, backend="aot_eager", fullgraph=True)(rewards, values, ids), function(rewards, values, ids)):
        cases.assert_close(a, b, 1e-6)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,)])
def test_empty(device, shape):
    x, ids = torch.empty(shape, device=device), torch.empty(shape, dtype=torch.int64, device=device)
    got = fused_critic.gae(x, x, x, turn_ids=ids, carry_masked_rewards=True, **FACTORS)
    assert got.advantages.shape == got.returns.shape == shape


V = torch.ones(4, 6)
BAD = [
    ({"turn_ids": V}, TypeError, "turn_ids: expected an integer dtype, got torch.float32"),
    ({"turn_ids": V.bool()}, TypeError, "turn_ids: expected an integer dtype, got torch.bool"),
    ({"turn_ids": V[0].long()}, ValueError, r"turn_ids: expected shape \[4, 6\] \(that of rewards\), got \[6\]; nothing is broadcast"),
    ({"turn_ids": V.long(), "mask_mode": "reset"}, ValueError, "turn_ids: expected mask_mode 'skip' beside them, got 'reset'"),
    (
        {"carry_masked_rewards": True, "mask_mode": "zero"},
        ValueError,
        "carry_masked_rewards: expected mask_mode 'skip' beside it, got 'zero'",
    ),
    ({"turn_ids": V.long().to("meta")}, ValueError, r"turn_ids: expected device cpu \(that of rewards\), got meta"),
]


@pytest.mark.parametrize("arguments, error, message", BAD, ids=[f"{i}-{'-'.join(b[0])}" for i, b in enumerate(BAD)])
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match="fused_critic.gae: " + message):
        fused_critic.gae(V, V, **arguments, **FACTORS)


def test_cu_seqlens_on_cuda_stay_in_bounds(device):
    if device != "cuda":
        pytest.skip("on the CPU cu_seqlens is always validated")
    x, ids = torch.randn(24, device=device), torch.zeros(24, dtype=torch.int64, device=device)
    nonsense = torch.tensor([-7, 5, 9, 2**40, -(2**50)], device=device)
    fused_critic.gae(x, x, x > 0, cu_seqlens=nonsense, turn_ids=ids, carry_masked_rewards=True, **FACTORS)
