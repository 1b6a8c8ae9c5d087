"""What the CUDA kernels cost, counted: launches, bytes, sectors and executed instructions, on the simulated device (tests/fakecuda).

Compulsory bytes are every input read once and every output written once. Instructions are those of the PTX for the simulated card,
per warp; the limits are regressions' alarm, a little above what each kernel reaches (docs/kernels.md has the figures).
"""

from __future__ import annotations

import importlib
import math
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import fused_critic
import pytest
import torch

SECTOR = 32
ROWS, COLUMNS = (256, 1024), (2048, 128)  # [B, T]; [T, B], as 128 sequences of 2048
MILLION = (1024, 1024)
FACTORS = {"gamma": 0.99, "lam": 0.95}
LOSS, LOSS_BACKWARD = "value_loss_kernel", "value_loss_backward_kernel"
OPTIONS, OPTIONS_BACKWARD = "value_loss_options_kernel", "value_loss_options_backward_kernel"
HUBER = {"criterion": "huber", "loss_clamp": 1.0}
SCAN_ROWS, SCAN_COLUMNS, SPLIT = "scan_rows_kernel", "scan_columns_kernel", ("reduce_chunks_kernel", "scan_chunks_kernel")


@pytest.fixture
def simulator():
    if os.environ.get("FAKECUDA") != "1":
        pytest.skip("costs are counted on the simulated device (make test-cuda)")
    return importlib.import_module("fakecuda")


def everything(shape):
    return torch.ones(shape, dtype=torch.bool)


def right_padded(shape):
    """Sequences of every length up to the full one."""
    lengths = torch.randint(1, shape[1] + 1, (shape[0], 1), generator=torch.Generator().manual_seed(0))
    return torch.arange(shape[1]) < lengths


def random_70_percent(shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.7


@dataclass(frozen=True)
class Case:
    """One call and what it may cost."""

    name: str
    operator: str  # gae, reverse_scan, vtrace, value_loss or value_loss_backward
    kernels: tuple[str, ...]  # launched in this order
    instructions: int | None = None  # per 1000 tokens, at most; None: for sizes at which only bytes are of interest
    shape: tuple[int, ...] = ROWS
    mask: Callable | None = None
    mask_dtype: torch.dtype = torch.bool
    values_dtype: torch.dtype = torch.float32
    layout: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    range_per_token: bool = False
    bytes_moved: float | None = 1.02  # times the compulsory bytes, at most; None: rows split over blocks are read twice
    load_efficiency: float = 0.95  # used share of the sectors' bytes, at least
    store_efficiency: float = 0.95

    @property
    def tokens(self):
        return math.prod(self.shape)

    @property
    def compulsory_bytes(self):
        """Per token."""
        mask = 0 if self.mask is None else self.mask_dtype.itemsize
        operands = {"gae": 3, "reverse_scan": 2, "vtrace": 5, "value_loss": 2, "value_loss_backward": 2}[self.operator]
        others = (operands + 2 * self.range_per_token) * torch.float32.itemsize
        gradient = self.values_dtype.itemsize if self.operator == "value_loss_backward" else 0
        return self.values_dtype.itemsize + others + mask + gradient


@dataclass(frozen=True)
class Cost:
    """What the launches of a case did: bytes per token, warp instructions per 1000 tokens, used share of the sectors' bytes."""

    bytes_moved: float
    load_efficiency: float
    store_efficiency: float
    instructions: float

    @classmethod
    def of(cls, case, launches):
        total = Counter()
        for launch in launches:
            total.update({name: launch[name] for name in ("warp_insts", "gld_bytes", "gst_bytes", "gld_sectors", "gst_sectors")})
        return cls(
            SECTOR * (total["gld_sectors"] + total["gst_sectors"]) / case.tokens,
            total["gld_bytes"] / (SECTOR * total["gld_sectors"]),
            total["gst_bytes"] / (SECTOR * total["gst_sectors"]),
            1000 * total["warp_insts"] / case.tokens,
        )


def packed(tokens, length):
    return {"cu_seqlens": torch.arange(0, tokens + 1, length)}


CASES = [
    Case("gae", "gae", (SCAN_ROWS,), 895),
    Case("gae-padded", "gae", (SCAN_ROWS,), 1390, mask=right_padded),
    Case("gae-random-mask", "gae", (SCAN_ROWS,), 1390, mask=random_70_percent),
    Case("gae-bfloat16-values", "gae", (SCAN_ROWS,), 1990, values_dtype=torch.bfloat16),
    Case("gae-short-rows", "gae", (SCAN_ROWS,), 995, shape=(2048, 128)),
    Case("gae-time-major", "gae", (SCAN_COLUMNS,), 725, shape=COLUMNS, layout={"time_dim": 0}),
    Case("gae-packed", "gae", (SCAN_ROWS,), 2520, shape=(256 * 1000,), layout=packed(256 * 1000, 1000)),
    Case("gae-split-rows", "gae", SPLIT, 1805, shape=(16, 16384), bytes_moved=None),
    Case("gae-zero-mode", "gae", (SCAN_ROWS,), 2310, mask=random_70_percent, options={"mask_mode": "zero"}),
    Case("gae-reset-mode", "gae", (SCAN_ROWS,), 2310, mask=random_70_percent, options={"mask_mode": "reset"}),
    Case("gae-lam-per-row", "gae", (SCAN_ROWS,), 1670, mask=random_70_percent, options={"lam": torch.linspace(0.9, 1, ROWS[0])}),
    Case("gae-returns-lam", "gae", (SCAN_ROWS,), 4070, mask=random_70_percent, options={"returns_lam": 1.0}),
    Case("gae-returns-lam-time-major", "gae", (SCAN_COLUMNS,), 4090, shape=COLUMNS, layout={"time_dim": 0}, options={"returns_lam": 1.0}),
    Case("gae-1M", "gae", (SCAN_ROWS,), shape=MILLION),
    Case("gae-1M-random-mask", "gae", (SCAN_ROWS,), shape=MILLION, mask=random_70_percent),
    Case("gae-1M-time-major", "gae", (SCAN_COLUMNS,), shape=MILLION, layout={"time_dim": 0}),
    Case("reverse-scan", "reverse_scan", (SCAN_ROWS,), 1000),
    Case("reverse-scan-time-major", "reverse_scan", (SCAN_COLUMNS,), 1100, shape=COLUMNS, layout={"time_dim": 0}),
    # The values of the next positions are written and read in between: 12 bytes beside 24, or 13 beside 25.
    Case("vtrace", "vtrace", (SCAN_ROWS, SCAN_ROWS), 3150, bytes_moved=1.53),
    Case("vtrace-padded", "vtrace", (SCAN_ROWS, SCAN_ROWS), 3150, mask=right_padded, bytes_moved=1.55),
    Case("vtrace-time-major", "vtrace", (SCAN_COLUMNS, SCAN_COLUMNS), 3850, shape=COLUMNS, layout={"time_dim": 0}, bytes_moved=1.53),
    Case("loss", "value_loss", (LOSS,), 1220, mask=everything),
    Case("loss-padded", "value_loss", (LOSS,), 1010, mask=right_padded),
    Case("loss-random-mask", "value_loss", (LOSS,), 1620, mask=random_70_percent),
    Case("loss-bfloat16-values", "value_loss", (LOSS,), 2000, mask=everything, values_dtype=torch.bfloat16),
    # Forward stores nothing per token; here a word of bits per warp and part, 0.1% of the bytes, stands alone in its sector.
    Case("loss-time-major", "value_loss", (LOSS,), 1620, shape=COLUMNS, mask=everything, layout={"time_dim": 0}, store_efficiency=0.65),
    Case("loss-packed", "value_loss", (LOSS,), 1260, shape=(256 * 1024,), mask=everything, layout=packed(256 * 1024, 1024)),
    Case("loss-1M", "value_loss", (LOSS,), shape=MILLION, mask=everything),
    Case("loss-1M-random-mask", "value_loss", (LOSS,), shape=MILLION, mask=random_70_percent),
    Case("loss-backward", "value_loss_backward", (LOSS_BACKWARD,), 900, mask=everything),
    Case("loss-backward-padded", "value_loss_backward", (LOSS_BACKWARD,), 900, mask=right_padded),
    Case("loss-backward-random-mask", "value_loss_backward", (LOSS_BACKWARD,), 900, mask=random_70_percent),
    Case("loss-backward-time-major", "value_loss_backward", (LOSS_BACKWARD,), 900, shape=COLUMNS, mask=everything, layout={"time_dim": 0}),
    Case(
        "loss-backward-packed",
        "value_loss_backward",
        (LOSS_BACKWARD,),
        980,
        shape=(256 * 1024,),
        mask=everything,
        layout=packed(256 * 1024, 1024),
    ),
    Case("loss-backward-1M", "value_loss_backward", (LOSS_BACKWARD,), shape=MILLION, mask=everything),
    Case("loss-huber", "value_loss", (OPTIONS,), 3150, mask=everything, options=HUBER),
    Case(
        "loss-huber-time-major",
        "value_loss",
        (OPTIONS,),
        3100,
        shape=COLUMNS,
        mask=everything,
        options=HUBER,
        layout={"time_dim": 0},
        store_efficiency=0.65,
    ),
    Case("loss-range-per-token", "value_loss", (OPTIONS,), 4040, mask=everything, options=HUBER, range_per_token=True),
    Case("loss-backward-huber", "value_loss_backward", (OPTIONS_BACKWARD,), 2970, mask=everything, options=HUBER),
    Case(
        "loss-backward-range-per-token",
        "value_loss_backward",
        (OPTIONS_BACKWARD,),
        3830,
        mask=everything,
        options=HUBER,
        range_per_token=True,
    ),
]


def run(case, simulator):
    """-> the launches of the operator."""
    generator = torch.Generator().manual_seed(1)
    x, values, old_values = (torch.randn(case.shape, generator=generator).cuda() for _ in range(3))
    values = values.to(case.values_dtype)
    mask = None if case.mask is None else case.mask(case.shape).to(case.mask_dtype).cuda()
    layout, options = (
        {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in given.items()}
        for given in (case.layout, case.options)
    )
    start = len(simulator.launches())
    if case.operator == "gae":
        fused_critic.gae(x, values, mask, **{**FACTORS, **options}, **layout)
    elif case.operator == "reverse_scan":
        fused_critic.reverse_scan(x, values, **layout)
    elif case.operator == "vtrace":
        fused_critic.vtrace(x, values, old_values, mask, **FACTORS, **layout)
    else:
        values.requires_grad_(case.operator == "value_loss_backward")
        options |= {"clip_range": (-old_values.abs(), old_values.abs())} if case.range_per_token else {}
        loss = fused_critic.value_loss(values, old_values, x, mask, **options, **layout).loss
        if case.operator == "value_loss_backward":
            start = len(simulator.launches())
            loss.backward()
    return simulator.launches()[start:]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cost(case, simulator):
    launches = run(case, simulator)
    assert [re.search(r"\w+_kernel(?=<)", launch["kernel"])[0] for launch in launches] == list(case.kernels)
    cost = Cost.of(case, launches)
    if case.bytes_moved is not None:
        assert cost.bytes_moved <= case.bytes_moved * case.compulsory_bytes, cost
    assert cost.load_efficiency >= case.load_efficiency, cost
    assert cost.store_efficiency >= case.store_efficiency, cost
    if case.instructions is not None:
        assert cost.instructions <= case.instructions, cost


def test_memsets(simulator):
    """Only the ticket of a loss that many blocks share is initialised, which is one memset of 4 bytes."""
    for shape, expected in (((2, 16), 0), (ROWS, 1)):
        x, values = torch.randn(shape).cuda(), torch.randn(shape).cuda().requires_grad_()

        def memsets():
            return simulator.calls().get("cudaMemsetAsync", 0)

        before = memsets()
        loss = fused_critic.value_loss(values, x, x).loss
        assert memsets() - before == expected
        before = memsets()
        fused_critic.gae(x, x, **FACTORS)
        loss.backward()
        assert memsets() == before
