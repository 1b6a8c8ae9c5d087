"""context_parallel_gae with real processes (gloo on the loopback interface), against gae of the whole sequences in one process."""

import datetime
import random
import traceback

import fused_critic
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fused_critic import reference
from fused_critic.check import cases
from fused_critic.distributed import context_parallel_gae
from torch.utils._python_dispatch import TorchDispatchMode

DRAWS = {2: 60, 4: 40, 8: 25}  # by ranks
TIMEOUT = datetime.timedelta(seconds=60)  # of a collective: ranks that lost step fail
TOLERANCE = 1e-6  # float32, of the largest magnitude or of 1
FAR_TOLERANCE = 4e-5  # values of mean 100: half an ulp of them is 4e-6, and up to ten roundings of that size meet in an advantage
MODES = ("skip", "skip", "skip", "zero", "reset", "ignore")
LAYOUTS = ("padded", "padded", "time-major", "packed", "single")
PER_TOKEN = ("rewards", "values", "mask", "terminated", "truncated", "next_values")


class CollectiveBytes(TorchDispatchMode):
    """What every operator of torch.distributed is given to send, in bytes."""

    def __init__(self):
        super().__init__()
        self.sent = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional") and "gather" in func._schema.name:
            self.sent.append(args[1].numel() * args[1].element_size())
        return func(*args, **(kwargs or {}))


def lengths_of_chunks(choose, ranks, order):
    """How many tokens of one sequence each chunk has: [ranks], or [2 ranks] where a rank's two are of one length."""
    longest = choose.choice([0, 1, 3, 12, 40])
    lengths = [choose.choice([0, longest, choose.randint(0, longest)]) for _ in range(ranks)]
    return lengths if order == "contiguous" else lengths + lengths[::-1]


def own_tokens(lengths, rank, ranks, order):
    """The positions in the whole sequence that this rank has, in its order."""
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    own = [rank] if order == "contiguous" else [rank, 2 * ranks - 1 - rank]
    return [t for chunk in own for t in range(bounds[chunk], bounds[chunk + 1])]


def drawn(seed, ranks):
    """A call of gae, tensors first, and where its tokens lie."""
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    order, layout, mode = choose.choice(["contiguous", "head-tail"]), choose.choice(LAYOUTS), choose.choice(MODES)
    dtype = choose.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16])
    mean = choose.choice([0, 0, 100]) if dtype == torch.float32 else 0
    sequences = 1 if layout == "single" else choose.choice([0, 1, 4]) if seed % 7 == 0 else choose.choice([1, 3, 5])
    if layout == "packed":
        lengths = [lengths_of_chunks(choose, ranks, order) for _ in range(sequences)]
    else:
        lengths = [lengths_of_chunks(choose, ranks, order)] * sequences
    total = sum(map(sum, lengths))

    def floats():
        return (mean + torch.randn(total, generator=generator)).to(dtype)

    def flags(density):
        return (torch.rand(total, generator=generator) < density).to(choose.choice([torch.bool, torch.int32, torch.float32]))

    tensors = dict.fromkeys(PER_TOKEN)
    tensors["rewards"], tensors["values"] = torch.randn(total, generator=generator).to(dtype), floats()
    if choose.random() < 0.7:
        # Whole chunks masked, gaps that reach over bounds.
        tensors["mask"] = flags(choose.choice([0.05, 0.5, 0.95]))
        if total:
            for _ in range(3):
                start = choose.randrange(total)
                tensors["mask"][start : start + choose.randint(1, 40)] = 0
    if choose.random() < 0.4:
        tensors["terminated"] = flags(choose.choice([0.02, 0.3]))
    bootstrap = None
    if choose.random() < 0.4:
        tensors["next_values"] = floats()
        if choose.random() < 0.5:
            tensors["truncated"] = flags(choose.choice([0.02, 0.3]))
    elif choose.random() < 0.6:
        bootstrap = mean + torch.randn(sequences, generator=generator)

    def number(low):
        if choose.random() < 0.3:
            return low + (1 - low) * torch.rand(sequences, generator=generator, dtype=torch.float64)
        number = choose.choice([low, 1.0, 0.95 if low < 0.95 else 1.0, 0.0 if seed % 5 == 0 else 1.0])
        return torch.tensor(number) if choose.random() < 0.2 else number

    options = {"gamma": number(0.9), "lam": number(0.8), "mask_mode": mode, "bootstrap_values": bootstrap}
    return tensors, options, lengths, order, layout


def shaped(tensors, layout, sequences):
    if layout in ("packed", "single"):
        return tensors
    rows = {k: None if x is None else x.view(sequences, -1 if x.numel() else 0) for k, x in tensors.items()}
    return rows if layout == "padded" else {k: None if x is None else x.t().contiguous() for k, x in rows.items()}


def of_layout(layout, lengths):
    if layout == "packed":
        return {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0)}
    return {"time_dim": 0} if layout == "time-major" else {}


def compare_draw(seed, rank, ranks):
    tensors, options, lengths, order, layout = drawn(seed, ranks)
    starts = torch.tensor([0, *map(sum, lengths)]).cumsum(0).tolist()
    parts = [own_tokens(of_sequence, rank, ranks, order) for of_sequence in lengths]
    own = torch.tensor([start + t for start, part in zip(starts, parts) for t in part], dtype=torch.int64)
    whole = fused_critic.gae(**tensors, **options, cu_seqlens=torch.tensor(starts))
    wide = tensors["rewards"].dtype == torch.float64
    far = tensors["values"].numel() > 0 and float(tensors["values"].double().mean()) > 50
    if options["mask_mode"] != "ignore" and tensors["mask"] is not None:
        for name in ("rewards", "values", "next_values"):  # what lies under the mask must not matter
            if tensors[name] is not None:
                tensors[name] = tensors[name].masked_fill(tensors["mask"] == 0, float("nan"))
    mine = shaped({k: None if x is None else x[own] for k, x in tensors.items()}, layout, len(lengths))
    call = {**options, **of_layout(layout, [len(part) for part in parts])}
    if seed % 2 and rank != (ranks - 1 if order == "contiguous" else 0):
        call["bootstrap_values"] = None  # it is read where the end is, and nowhere else
    with CollectiveBytes() as collectives:
        got = context_parallel_gae(**mine, **call, group=dist.group.WORLD, order=order)
    assert collectives.sent == [16 * len(lengths) * (1 if order == "contiguous" else 2)]
    largest = max([1.0, *(float(x.abs().max()) for x in whole if x.numel())])
    for name in ("advantages", "returns"):
        x, expected = getattr(got, name), getattr(whole, name)[own]
        assert x.shape == mine["rewards"].shape and x.dtype == (torch.float64 if wide else torch.float32)
        x = (x.t() if layout == "time-major" else x).reshape(-1).double()
        difference = float((x - expected).abs().max()) if x.numel() else 0.0
        allowed = largest * (1e-12 if wide else TOLERANCE) if not far else FAR_TOLERANCE
        assert difference <= allowed, f"{name} differ by {difference:.3g}, allowed {allowed:.3g}"


def compare_drawn(rank, ranks):
    """Every layout, order, mask mode, flag and dtype; uneven and empty chunks, masked ones, gaps over bounds."""
    failed = []
    for seed in range(1000 * ranks, 1000 * ranks + DRAWS[ranks]):
        try:
            compare_draw(seed, rank, ranks)
        except AssertionError as error:  # after the collective: the ranks stay in step
            _, options, lengths, order, layout = drawn(seed, ranks)
            failed.append(f"draw {seed}: {error}; {order}, {layout}, {lengths}, {options}")
    assert not failed, "\n".join(failed)


def whole(seed, rows, length):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(rows, length, generator=generator) for _ in range(2))
    return rewards, values, torch.rand(rows, length, generator=generator) < 0.7


def chunk(x, rank, ranks):
    return x[:, rank * x.shape[1] // ranks : (rank + 1) * x.shape[1] // ranks]


def masked_chunks_are_transparent(rank, ranks):
    """Rank 1 has nothing valid in one row and no valid position at its bounds in another: what enters passes, in skip, whatever lies there."""
    rewards, values, mask = whole(1, 3, 8 * ranks)
    mask[0, 8:16] = False
    mask[1, 5:9] = False
    mask[2] = False
    mask[2, -1] = True
    expected = fused_critic.gae(rewards, values, mask, gamma=1.0, lam=0.9).advantages
    dirty = torch.where(mask, values, float("nan"))
    got = context_parallel_gae(*(chunk(x, rank, ranks) for x in (rewards, dirty, mask)), group=dist.group.WORLD, gamma=1.0, lam=0.9)
    cases.assert_close(got.advantages, chunk(expected, rank, ranks), TOLERANCE)


def flags_at_bounds(rank, ranks):
    """The last step of a chunk, and the first, end the episode; what enters stops there, and with next_values so does the trace alone."""
    rewards, values, _ = whole(2, 2, 6 * ranks)
    next_values, flags = torch.randn(2, 6 * ranks, generator=torch.Generator().manual_seed(3)), torch.zeros(2, 6 * ranks)
    flags[0, 5::6], flags[1, 6::6] = 1, 1
    for options in (
        {"terminated": flags},
        {"truncated": flags, "next_values": next_values},
        {"terminated": flags, "next_values": next_values},
    ):
        expected = fused_critic.gae(rewards, values, gamma=0.99, lam=0.95, **options)
        mine = {k: chunk(x, rank, ranks) for k, x in options.items()}
        call = dict(group=dist.group.WORLD, gamma=0.99, lam=0.95, **mine)
        got = context_parallel_gae(chunk(rewards, rank, ranks), chunk(values, rank, ranks), **call)
        for x, y in zip(got, expected):
            cases.assert_close(x, chunk(y, rank, ranks), TOLERANCE, str(list(options)))


def follows_the_definition(rank, ranks):
    """Against the plain loop in float64, in small: not only against the operator that it is built on."""
    rewards, values, mask = whole(4, 2, 3 * ranks + 1)
    bootstrap = torch.tensor([0.5, -2.0])
    for mode in ("skip", "zero", "reset", "ignore"):
        options = dict(gamma=0.97, lam=0.9, mask_mode=mode, bootstrap_values=bootstrap)
        expected = reference.gae(rewards, values, mask, **options)
        got = context_parallel_gae(*(chunk(x, rank, ranks) for x in (rewards, values, mask)), group=dist.group.WORLD, **options)
        cases.assert_close(got.advantages, chunk(expected.advantages, rank, ranks), TOLERANCE, mode)
        cases.assert_close(got.returns, chunk(expected.returns, rank, ranks), TOLERANCE, mode)


def sends_no_tokens(rank, ranks):
    """Two numbers for each row and chunk, however long the chunks are."""
    for length in (1, 1000):
        x = torch.ones(5, 2 * length)
        for order, chunks in (("contiguous", 1), ("head-tail", 2)):
            with CollectiveBytes() as collectives:
                context_parallel_gae(x, x, x, group=dist.group.WORLD, gamma=1.0, lam=0.95, order=order)
            assert collectives.sent == [5 * chunks * 2 * 8], (length, order, collectives.sent)
    with CollectiveBytes() as collectives:
        context_parallel_gae(x, x, x, group=dist.group.WORLD, gamma=1.0, lam=0.95, whiten=True)
    assert collectives.sent == [5 * 2 * 8, 3 * 8]


def whitens_over_the_group(rank, ranks):
    rewards, values, mask = whole(5, 3, 10 * ranks)
    expected = fused_critic.gae(rewards, values, mask, gamma=1.0, lam=0.9, whiten=True)
    mine = [chunk(x, rank, ranks) for x in (rewards, values, mask)]
    got = context_parallel_gae(*mine, group=dist.group.WORLD, gamma=1.0, lam=0.9, whiten=True)
    cases.assert_close(got.advantages, chunk(expected.advantages, rank, ranks), cases.WHITEN_TOLERANCE)
    cases.assert_close(got.returns, chunk(expected.returns, rank, ranks), TOLERANCE)


def takes_jagged(rank, ranks):
    offsets = torch.tensor([0, 4, 4, 4 + 2 * rank, 10 + 2 * rank])
    packed = torch.randn(2, 10 + 2 * rank, generator=torch.Generator().manual_seed(rank))
    call = dict(group=dist.group.WORLD, gamma=1.0, lam=0.9, order="head-tail")
    expected = context_parallel_gae(*packed, cu_seqlens=offsets, **call)
    for x, y in zip(context_parallel_gae(*(torch.nested.nested_tensor_from_jagged(x, offsets) for x in packed), **call), expected):
        cases.assert_same_bits(x.values(), y)


def alone_without_communication(rank, ranks):
    groups = [dist.new_group([i]) for i in range(ranks)]
    rewards, values, mask = whole(6, 3, 8)
    for order in ("contiguous", "head-tail"):
        with CollectiveBytes() as collectives:
            got = context_parallel_gae(rewards, values, mask, group=groups[rank], gamma=1.0, lam=0.9, order=order, whiten=True)
        assert collectives.sent == []
        for x, y in zip(got, fused_critic.gae(rewards, values, mask, gamma=1.0, lam=0.9, whiten=True)):
            cases.assert_same_bits(x, y)
    if rank == 0:
        with pytest.raises(TypeError, match="group: expected a torch.distributed process group that this rank is in"):
            context_parallel_gae(rewards, values, mask, group=groups[1], gamma=1.0, lam=0.9)


def in_a_subgroup(rank, ranks):
    """The order of the chunks is that of the ranks in the group."""
    group = dist.new_group([0, ranks - 1])
    if rank in (0, ranks - 1):
        rewards, values, mask = whole(7, 3, 10)
        mine = [chunk(x, dist.get_rank(group), 2) for x in (rewards, values, mask)]
        got = context_parallel_gae(*mine, group=group, gamma=1.0, lam=0.9)
        expected = fused_critic.gae(rewards, values, mask, gamma=1.0, lam=0.9).advantages
        cases.assert_close(got.advantages, chunk(expected, dist.get_rank(group), 2), TOLERANCE)


def compiles_whole(rank, ranks):
    if ranks != 2:
        return  # the graph is the same, and compiling in 8 processes takes minutes
    rewards, values, mask = (chunk(x, rank, ranks) for x in whole(8, 3, 8 * ranks))
    for order in ("contiguous", "head-tail"):

        def call(*tensors, **options):
            return context_parallel_gae(*tensors, group=dist.group.WORLD, lam=0.9, order=order, **options)

        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        for options in ({"gamma": 0.99}, {"gamma": torch.tensor([0.9, 1.0, 0.95]), "terminated": rewards > 1, "whiten": True}):
            for x, y in zip(compiled(rewards, values, mask, **options), call(rewards, values, mask, **options)):
                cases.assert_close(x, y, 1e-6)


def refuses(rank, ranks):
    """Every rank alike, before the collective."""
    x, numbers = torch.ones(2, 4), {"group": dist.group.WORLD, "gamma": 1.0, "lam": 0.9}
    packed, bounds = {"cu_seqlens": torch.tensor([0, 3, 4])}, torch.tensor([0, 3, 5])
    for error, message, tensors, options in (
        (ValueError, "order: expected one of contiguous, head-tail, got 'ring'", (x, x), {"order": "ring"}),
        (ValueError, "mask_mode: expected one of", (x, x, x), {"mask_mode": "hide"}),
        (ValueError, "order: expected an even length", (x[:, :3], x[:, :3]), {"order": "head-tail"}),
        (ValueError, "order: expected an even length", (x[0], x[0]), {"order": "head-tail", **packed}),
        (ValueError, "cu_seqlens: expected offsets from 0 to 4", (x[0], x[0]), {"cu_seqlens": bounds}),
        (ValueError, "cu_seqlens: expected int32 or int64", (x, x), packed),
        (ValueError, "values: expected shape", (x, x[:1]), {}),
        (ValueError, "mask: expected shape", (x, x, x[:, :1]), {}),
        (ValueError, "rewards: expected 1 or 2 dimensions", (x[None], x[None]), {}),
        (ValueError, "bootstrap_values: expected None beside next_values", (x, x), {"next_values": x, "bootstrap_values": x[:, 0]}),
        (ValueError, "bootstrap_values: expected shape", (x, x), {"bootstrap_values": torch.ones(())}),
        (ValueError, "lam: expected shape", (x, x), {"lam": torch.ones(3)}),
        (ValueError, "gamma: expected a number in", (x, x), {"gamma": 1.5}),
        (ValueError, "next_values: expected a tensor beside truncated", (x, x), {"truncated": x}),
        (ValueError, r"values: expected a tensor without gradient.*detach\(\) it", (x, x.clone().requires_grad_()), {}),
        (TypeError, "rewards: expected a floating dtype", (x.long(), x), {}),
        (TypeError, "bootstrap_values: expected a floating dtype", (x, x), {"bootstrap_values": torch.ones(2, dtype=torch.int64)}),
        (TypeError, "group: expected a torch.distributed process group", (x, x), {"group": None}),
    ):
        with pytest.raises(error, match=message):
            context_parallel_gae(*tensors, **{**numbers, **options})
    with torch.no_grad():
        context_parallel_gae(x, x.clone().requires_grad_(), **numbers)


CHECKS = (
    compare_drawn,
    masked_chunks_are_transparent,
    flags_at_bounds,
    follows_the_definition,
    sends_no_tokens,
    whitens_over_the_group,
    takes_jagged,
    in_a_subgroup,
    refuses,
    alone_without_communication,
    compiles_whole,
)


def worker(rank, ranks, rendezvous, failures):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks, timeout=TIMEOUT)
    for check in CHECKS:
        failed = torch.zeros(1)
        try:
            check(rank, ranks)
        except BaseException:
            failures[f"{check.__name__}, rank {rank} of {ranks}"] = traceback.format_exc()
            failed += 1
        dist.all_reduce(failed)
        if failed.item():
            break
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_compute_what_one_process_does(ranks, tmp_path):
    with mp.Manager() as manager:
        failures = manager.dict()
        mp.spawn(worker, (ranks, str(tmp_path / "rendezvous"), failures), nprocs=ranks)
        assert not failures, "\n".join(f"{name}:\n{trace}" for name, trace in failures.items())


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_head_tail_is_the_order_of_torch(ranks):
    """torch's context_parallel balances the load of causal attention so."""
    load_balancer = pytest.importorskip("torch.distributed.tensor.experimental._context_parallel._load_balancer")
    order = load_balancer._HeadTailLoadBalancer(16, ranks, "cpu")._generate_indices().flatten().tolist()
    assert order == [t for rank in range(ranks) for t in own_tokens([16 // (2 * ranks)] * 2 * ranks, rank, ranks, "head-tail")]
