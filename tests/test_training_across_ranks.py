"""A critic that is trained on several ranks ends with the weights of one that is trained on one; a rank that is gone is noticed.

Real processes (gloo on the loopback interface), DDP and FSDP2.
"""

import multiprocessing
import os
import re
import time
from datetime import timedelta
from pathlib import Path

import fused_critic
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fused_critic.distributed import global_counts
from torch.nn.parallel import DistributedDataParallel

WORLD_SIZES = (2, 4, 8)
STEPS, ROWS, LENGTH, FEATURES = 20, 12, 7, 5
LEARNING_RATE = 1e-2
TOLERANCE = 1e-5  # relative and absolute
NEEDS_GLOO = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")


def critic():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(FEATURES, 16), torch.nn.Tanh(), torch.nn.Linear(16, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
    )


def batch(step):
    """States, old values, returns and mask of a whole batch; every batch has a row with nothing valid."""
    generator = torch.Generator().manual_seed(100 + step)
    states = torch.randn(ROWS, LENGTH, FEATURES, generator=generator)
    rewards, old_values = (torch.randn(ROWS, LENGTH, generator=generator) for _ in range(2))
    mask = torch.rand(ROWS, LENGTH, generator=generator) < 0.6
    mask[step % ROWS] = False
    returns = fused_critic.gae(rewards, old_values, mask, gamma=0.9, lam=0.9).returns
    return states, old_values, returns, mask


def rows_of(rank, ranks, step):
    """Uneven, another split at every step: at some steps a rank has no row, at some everything that is valid lies on one rank."""
    if step % 4 == 3:
        return list(range(ROWS)) if rank == step % ranks else []
    if step % 4 == 2:  # this rank has nothing but the masked row
        empty = step % ROWS
        others = [r for r in range(ROWS) if r != empty]
        return [empty] if rank == 0 else others[rank - 1 :: ranks - 1]
    bounds = [ROWS * i * (i + 1) // (ranks * (ranks + 1)) for i in range(ranks + 1)]
    return list(range(bounds[rank], bounds[rank + 1]))


def options_of(step):
    """The reductions take turns."""
    return (
        {"reduction": "token-mean"},
        {"reduction": "seq-mean-token-mean", "criterion": "huber"},
        {"reduction": "seq-mean-token-sum-norm", "loss_scale_factor": LENGTH},
        {"reduction": "seq-mean-token-sum"},
        {"reduction": "token-mean", "clip_range": None},
    )[step % 5]


def train(model, step_of):
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    for step in range(STEPS):
        optimizer.zero_grad()
        step_of(model, step)
        optimizer.step()


def one_process(options):
    def step_of(model, step):
        states, *others = batch(step)
        fused_critic.value_loss(model(states).squeeze(-1), *others, **options(step)).loss.backward()

    return step_of


def one_call(rank, ranks):
    """A step of one micro-batch a rank, counted by the loss itself."""

    def step_of(model, step):
        states, *others = (x[rows_of(rank, ranks, step)] for x in batch(step))
        loss = fused_critic.value_loss(model(states).squeeze(-1), *others, **options_of(step), group=dist.group.WORLD).loss
        loss.backward()

    return step_of


def accumulated(rank, ranks):
    """A step of three micro-batches a rank, some of them empty; the gradients are exchanged with the last."""

    def step_of(model, step):
        rows = rows_of(rank, ranks, step)
        parts = [rows[i::3] for i in range(3)]
        whole = batch(step)
        pending = global_counts([whole[3][part] for part in parts], group=dist.group.WORLD, async_op=True)
        for i, part in enumerate(parts):
            states, *others = (x[part] for x in whole)
            exchange = i == len(parts) - 1
            if isinstance(model, DistributedDataParallel):
                model.require_backward_grad_sync = exchange  # what no_sync() sets
            else:
                model.set_requires_gradient_sync(exchange)
            values = model(states).squeeze(-1)
            counts = pending.wait()
            loss = fused_critic.value_loss(values, *others, **options_of(step), **counts._asdict(), dp_size=ranks).loss
            loss.backward()

    return step_of


def the_page(model, group):
    """The steps as docs/distributed.md has them, in turns."""
    text = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text(encoding="utf-8")
    section = text[text.index("## Data parallel") :].split("\n## ")[0]
    names = {"fused_critic": fused_critic, "global_counts": global_counts}
    for code in re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL):
        exec(code, names)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    for step in range(STEPS):
        rows = rows_of(group.rank(), group.size(), step)
        parts = [[x[part] for x in batch(step)] for part in ((rows,) if step % 2 else (rows[::2], rows[1::2]))]
        if step % 2:
            names["step"](model, optimizer, parts[0], group)
        else:
            names["accumulated_step"](model, optimizer, parts, group)


def sharded(model):
    from torch.distributed.fsdp import fully_shard  # costs a process seconds

    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, torch.nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def weights(model):
    model = model.module if isinstance(model, DistributedDataParallel) else model
    return {name: getattr(x, "full_tensor", lambda x=x: x)().detach() for name, x in model.state_dict().items()}


def trainer(rank, ranks, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    start, expected = weights(critic()), {}
    for name, options in (("every reduction", options_of), ("default", lambda step: {})):
        model = critic()
        train(model, one_process(options))
        expected[name] = weights(model)
        assert all((x - start[layer]).abs().max() > 0.01 for layer, x in expected[name].items()), "nothing was learnt"

    def compare(model, name, what):
        for layer, got in weights(model).items():
            same = {"rtol": TOLERANCE, "atol": TOLERANCE}
            torch.testing.assert_close(
                got, expected[name][layer], **same, msg=lambda text: f"rank {rank} of {ranks}, {what}, {layer}: {text}"
            )

    fsdp = ranks < 8  # 8 processes would import it for longer than the file may take
    for wrap in (DistributedDataParallel, sharded) if fsdp else (DistributedDataParallel,):
        for kind in (one_call, accumulated):
            model = wrap(critic())
            train(model, kind(rank, ranks))
            compare(model, "every reduction", f"{wrap.__name__}, {kind.__name__}")
    if fsdp:
        model = sharded(critic())
        the_page(model, dist.group.WORLD)
        compare(model, "default", "docs/distributed.md")
    dist.destroy_process_group()


@NEEDS_GLOO
@pytest.mark.parametrize("ranks", WORLD_SIZES)
def test_weights_are_those_of_one_process(ranks, tmp_path):
    mp.spawn(trainer, (ranks, str(tmp_path)), nprocs=ranks)


def test_every_kind_of_shard_occurs():
    for ranks in WORLD_SIZES:
        for step in range(STEPS):
            shards = [rows_of(rank, ranks, step) for rank in range(ranks)]
            assert sorted(sum(shards, [])) == list(range(ROWS))
        assert any(not rows_of(rank, ranks, 3) for rank in range(ranks))
        assert not batch(2)[3][rows_of(0, ranks, 2)].any()


SECONDS = 10  # the group's timeout
STALLED, DEAD = 1, 2


def survivor(rank, ranks, folder):
    """Waits in value_loss for a rank that does not come, then for one that has died; writes how long that took and what was raised."""
    torch.set_num_threads(1)
    world = timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks, timeout=world)
    store = dist.FileStore(f"{folder}/store", ranks)
    store.set_timeout(timedelta(seconds=60))
    stall = dist.new_group(list(range(ranks)), timeout=timedelta(seconds=3))
    model = DistributedDataParallel(critic())
    one_call(rank, ranks)(model, 0)
    for missing, group in ((STALLED, stall), (DEAD, dist.group.WORLD)):
        states, *others = batch(0)
        values = model.module(states).squeeze(-1)
        dist.barrier()
        if rank == missing == DEAD:
            os._exit(3)
        if rank != missing:
            start = time.monotonic()
            try:
                fused_critic.value_loss(values, *others, group=group)
                what = "nothing was raised"
            except RuntimeError as error:
                what = f"raised after {time.monotonic() - start:.1f} s: {error}"
            with open(f"{folder}/{missing} {rank}", "w") as file:
                file.write(what)
        store.set(f"{missing} {rank}", "")
        if missing == STALLED:
            store.wait([f"{missing} {r}" for r in range(ranks)])
    os._exit(0)  # the groups are broken: there is nothing to take down in good order


@NEEDS_GLOO
def test_a_rank_that_is_gone_makes_the_others_raise(tmp_path):
    ranks = 3
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=survivor, args=(rank, ranks, str(tmp_path))) for rank in range(ranks)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 90
    try:
        for process in processes:
            process.join(max(0, deadline - time.monotonic()))
        assert [process.exitcode for process in processes] == [3 if rank == DEAD else 0 for rank in range(ranks)]
    finally:
        for process in processes:
            process.kill()
    for missing, seconds in ((STALLED, 3), (DEAD, SECONDS)):
        for rank in set(range(ranks)) - {missing}:
            what = (tmp_path / f"{missing} {rank}").read_text()
            assert what.startswith("raised after "), (missing, rank, what)
            assert float(what.split()[2]) < seconds + 5, (missing, rank, what)
