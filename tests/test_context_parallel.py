"""context_parallel_gae with real processes (gloo on the loopback interface), against gae of the whole sequences in one process."""

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

DRAWS = 60
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


def compare_drawn(rank, ranks):
    """Every layout, order, mask mode, flag and dtype; uneven and empty chunks, masked ones, gaps over bounds."""
    for seed in range(1000 * ranks, 1000 * ranks + DRAWS):
        tensors, options, lengths, order, layout = drawn(seed, ranks)
        what = f"draw {seed}: {order}, {layout}, {lengths}, { {k: v for k, v in options.items() if k != 'bootstrap_values'} }"
        rewards = tensors["rewards"]
        starts = torch.tensor([0, *map(sum, lengths)]).cumsum(0).tolist()
        parts = [own_tokens(of_sequence, rank, ranks, order) for of_sequence in lengths]
        own = torch.tensor([start + t for start, part in zip(starts, parts) for t in part], dtype=torch.int64)
        whole = fused_critic.gae(**tensors, **options, cu_seqlens=torch.tensor(starts))
        if options["mask_mode"] != "ignore" and tensors["mask"] is not None:
            for name in ("rewards", "values", "next_values"):  # what lies under the mask must not matter
                if tensors[name] is not None:
                    tensors[name] = tensors[name].masked_fill(tensors["mask"] == 0, float("nan"))
        mine = shaped({k: None if x is None else x[own] for k, x in tensors.items()}, layout, len(lengths))
        holds_end = rank == (ranks - 1 if order == "contiguous" else 0)
        call = {**options, **of_layout(layout, [len(part) for part in parts])}
        if seed % 2 and not holds_end:
            call["bootstrap_values"] = None  # it is read where the end is, and nowhere else
        with CollectiveBytes() as collectives:
            got = context_parallel_gae(**mine, **call, group=dist.group.WORLD, order=order)
        chunks = 1 if order == "contiguous" else 2
        assert collectives.sent == [16 * len(lengths) * chunks], f"{what}: sent {collectives.sent} bytes"
        mean = 100 if rewards.numel() and tensors["values"].double().nanmean().abs() > 50 else 0
        wide = rewards.dtype == torch.float64
        tolerance = 1e-12 if wide else FAR_TOLERANCE if mean else TOLERANCE
        for name in ("advantages", "returns"):
            x, expected = getattr(got, name), getattr(whole, name)[own]
            assert x.shape == mine["rewards"].shape and x.dtype == (torch.float64 if wide else torch.float32), what
            if layout == "time-major":
                x = x.t()
            x, expected = x.reshape(-1).double(), expected.double()
            scale = 1 if name == "advantages" else max(1.0, mean)
            if x.numel():
                size = max(1.0, float(getattr(whole, "advantages").abs().max()))
                difference = float((x - expected).abs().max())
                assert difference <= tolerance * max(size, scale), f"{what}: {name} differ by {difference:.3g} (size {size:.3g})"


CHECKS = (compare_drawn,)


def worker(rank, ranks, rendezvous, failures):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
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
